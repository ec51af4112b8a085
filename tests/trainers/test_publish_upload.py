"""What is sent: a model's files and nothing else, beside what lies there. A local server stands for the Hub."""

import hashlib
import json
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trainers.publish_card import MARK
from trainers.publish_files import plan_upload
from trainers.publish_upload import upload

# huggingface_hub 2.4 sends a file's bytes in a way that its HTTP library has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

WEIGHTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, text in {
        "config.json": "{}",
        "README.md": f"{MARK}\n# Mine",
        "model.safetensors": "0123456",
        "tokenizer.json": "{}",
        "optimizer.pt": "states",
        "training_args.bin": "args",
        ".env": "HF_TOKEN=hf_secret",
        "id_rsa": "secret",
        "LICENSE_secret": "x",
        "train.jsonl": "{}",
    }.items():
        (folder / name).write_text(text)
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "model.safetensors").write_text("old")
    return folder


# What may leave


def test_only_the_files_of_a_model_are_sent_and_every_other_is_refused_by_name(model_folder):
    plan = plan_upload(model_folder)
    assert plan.files == ("README.md", "config.json", "model.safetensors", "tokenizer.json")
    assert plan.refused == (
        ".env", "LICENSE_secret", "checkpoint-3/model.safetensors", "id_rsa", "optimizer.pt", "train.jsonl",
        "training_args.bin",
    )  # fmt: skip
    assert plan.num_bytes == len(MARK) + 7 + 2 + 7 + 2


SECRETS = ["hf_" + "a1B2" * 8, "sk-" + "a1B2" * 9, "ghp_" + "a1B2" * 9, "AKIA" + "A1B2" * 4]


@pytest.mark.parametrize("secret", [*SECRETS, "-----BEGIN RSA PRIVATE KEY-----"])
def test_an_access_token_inside_a_file_of_the_model_stops_everything(model_folder, secret):
    (model_folder / "config.json").write_text(json.dumps({"note": secret}))
    with pytest.raises(ValueError, match=r"config\.json holds what looks like an access token"):
        plan_upload(model_folder)


def test_a_folder_without_any_config_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(ValueError, match=r"holds none of config\.json"):
        plan_upload(tmp_path)


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "x").write_text("x")
    with pytest.raises(ValueError, match="is not a folder"):
        plan_upload(tmp_path / "x")


def test_a_missing_shard_is_named_with_both_numbers(model_folder):
    shards = {"a": "model.safetensors", "b": "model-00002.safetensors", "c": "model-00003.safetensors"}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(
        ValueError, match=r"names 3 shards, 1 are here; missing: model-00002\.safetensors, model-00003"
    ):
        plan_upload(model_folder)


# The Hub


class Hub(ThreadingHTTPServer):
    """Answers the calls which huggingface_hub makes without hf_xet.

    files: what the repository holds, by name. stored: contents of large files (*.safetensors) by SHA-256, kept from
    the moment they were sent. puts: their names in the order they were sent. broken: large contents it refuses.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.puts: list[str] = []
        self.created: list[dict] = []
        self.broken: set[str] = set()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def reply(self, content, status=200, headers=()):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def read(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        if "/resolve/" not in self.path:
            return self.reply({"id": "me/tiny", "sha": "0" * 40, "siblings": []})
        name = self.path.rsplit("/", 1)[1]
        if name not in self.server.files:
            return self.reply({}, 404, [("X-Error-Code", "EntryNotFound")])
        etag = hashlib.sha256(self.server.files[name]).hexdigest()
        return self.reply(self.server.files[name], 200, [("X-Repo-Commit", "0" * 40), ("ETag", f'"{etag}"')])

    do_HEAD = do_GET

    def do_PUT(self):
        body, digest = self.read(), self.path.rsplit("/", 1)[1]
        if digest in self.server.broken:
            return self.reply({}, 400)
        self.server.stored[digest] = body
        self.server.puts.append(digest)
        return self.reply({})

    def do_POST(self):
        body = self.read()
        if self.path.endswith("/repos/create"):
            self.server.created.append(json.loads(body))
            if len(self.server.created) > 1:
                return self.reply({"url": self.server.address + "/me/tiny"}, 409)
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "lfs" if "safetensors" in f["path"] else "regular",
                      "shouldIgnore": False} for f in files]  # fmt: skip
            return self.reply({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = []
            for wanted in json.loads(body)["objects"]:
                here = wanted["oid"] in self.server.stored
                href = f"{self.server.address}/storage/{wanted['oid']}"
                objects.append(wanted | ({} if here else {"actions": {"upload": {"href": href}}}))
            return self.reply({"objects": objects})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[value["path"]] = b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.stored[value["oid"]]
                elif line["key"] != "header":
                    raise AssertionError(f"{line['key']}: nothing may be deleted")
            return self.reply({"commitUrl": self.server.address + "/me/tiny/commit/1", "commitOid": "1" * 40})
        return self.reply({"url": self.server.address + "/me/tiny", "id": "me/tiny", "name": "me/tiny"})

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    # hf_xet talks to servers of its own, which a test cannot stand for.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_upload_creates_a_private_repository_and_sends_exactly_the_plan(model_folder, hub):
    plan = plan_upload(model_folder)
    assert upload(plan, "me/tiny", endpoint=hub.address).endswith("/commit/1")
    (created,) = hub.created
    assert created.get("private") is True or created.get("visibility") == "private"
    assert hub.files == {name: (model_folder / name).read_bytes() for name in plan.files}


def test_an_interrupted_upload_goes_on_where_it_stopped(model_folder, hub):
    (model_folder / "model.safetensors").unlink()
    contents = {name: name.encode() for name in WEIGHTS}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    for name, content in contents.items():
        (model_folder / name).write_bytes(content)
    hub.broken = {digests[WEIGHTS[1]]}
    with pytest.raises(RuntimeError, match=f"uploading '{WEIGHTS[1]}'"):
        upload(plan_upload(model_folder), "me/tiny", endpoint=hub.address)
    assert hub.puts == [digests[WEIGHTS[0]]]
    assert hub.files == {}

    hub.broken = set()
    upload(plan_upload(model_folder), "me/tiny", endpoint=hub.address)
    assert hub.puts == [digests[name] for name in WEIGHTS]  # the first was not sent again
    assert hub.files[WEIGHTS[0]] == contents[WEIGHTS[0]]


def test_what_others_put_into_the_repository_stays(model_folder, hub):
    theirs = {"demo.gif": b"moving", "README.md": b"# written by hand"}
    hub.files = dict(theirs)
    upload(plan_upload(model_folder), "me/tiny", endpoint=hub.address)
    assert {name: hub.files[name] for name in theirs} == theirs
    assert hub.files["config.json"] == b"{}"


def test_a_card_that_this_package_wrote_is_written_anew(model_folder, hub):
    hub.files = {"README.md": f"{MARK}\n# Old".encode()}
    upload(plan_upload(model_folder), "me/tiny", endpoint=hub.address)
    assert hub.files["README.md"] == (model_folder / "README.md").read_bytes()
