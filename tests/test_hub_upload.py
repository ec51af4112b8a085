"""What is published: a model's files and nothing else. A local server stands for the Hub."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

import hub_upload


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, text in {
        "config.json": "{}",
        "model.safetensors": "0123456",
        "tokenizer.json": "{}",
        "optimizer.pt": "states",
        "training_args.bin": "args",
        ".env": "HF_TOKEN=hf_secret",
        "id_rsa": "secret",
        "train.jsonl": "{}",
    }.items():
        (folder / name).write_text(text)
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "model.safetensors").write_text("old")
    return folder


def test_only_the_files_of_a_model_are_sent_and_every_other_is_refused_by_name(model_folder):
    plan = hub_upload.plan_upload(model_folder)
    assert plan.files == ("config.json", "model.safetensors", "tokenizer.json")
    assert plan.refused == (
        ".env", "checkpoint-3/model.safetensors", "id_rsa", "optimizer.pt", "train.jsonl", "training_args.bin",
    )  # fmt: skip
    assert plan.num_bytes == 2 + 7 + 2


def test_a_folder_without_any_config_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(ValueError, match=r"holds none of config\.json"):
        hub_upload.plan_upload(tmp_path)


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "x").write_text("x")
    with pytest.raises(ValueError, match="is not a folder"):
        hub_upload.plan_upload(tmp_path / "x")


def test_a_missing_shard_is_named_with_both_numbers(model_folder):
    shards = {"a": "model.safetensors", "b": "model-00002.safetensors", "c": "model-00003.safetensors"}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(
        ValueError, match=r"names 3 shards, 1 are here; missing: model-00002\.safetensors, model-00003"
    ):
        hub_upload.plan_upload(model_folder)


@pytest.fixture
def hub():
    """A server that answers the calls which huggingface_hub makes, and keeps what it was sent: .calls, .committed."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, content):
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def read(self):
            return self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()

        def do_GET(self):
            self.server.calls.append(("GET", self.path, ""))
            self.answer({"id": "me/tiny", "sha": "0" * 40, "siblings": []})

        def do_POST(self):
            body = self.read()
            self.server.calls.append(("POST", self.path, body))
            if self.path.endswith("/preupload/main"):
                wanted = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
                self.answer({"files": [{**f, "shouldIgnore": False} for f in wanted]})
            elif "/commit/" in self.path:
                for line in body.splitlines():
                    if json.loads(line)["key"] == "file":
                        self.server.committed.append(json.loads(line)["value"]["path"])
                self.answer({"commitUrl": self.server.address + "/me/tiny/commit/1", "commitOid": "1" * 40})
            else:
                self.answer({"url": self.server.address + "/me/tiny", "id": "me/tiny", "name": "me/tiny"})

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.calls, server.committed = [], []
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_upload_creates_a_private_repository_and_sends_exactly_the_plan(model_folder, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub_upload.upload(hub_upload.plan_upload(model_folder), "me/tiny", endpoint=hub.address)
    created = [json.loads(body) for method, path, body in hub.calls if path.endswith("/repos/create")]
    assert len(created) == 1
    assert created[0].get("private") is True or created[0].get("visibility") == "private"
    assert sorted(hub.committed) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_without_the_upload_flag_nothing_is_sent(model_folder, monkeypatch):
    monkeypatch.setattr(hub_upload, "upload", lambda *_, **__: pytest.fail("a dry run sent something"))
    app = hub_upload.typer.Typer()
    app.command()(hub_upload.main)
    result = CliRunner().invoke(app, [str(model_folder), "me/tiny"])
    assert result.exit_code == 0, result.output
    assert "Dry run: 3 files, 11 bytes" in result.output
    assert "optimizer.pt" in result.output
