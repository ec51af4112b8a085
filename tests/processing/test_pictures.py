"""Pictures from anywhere, upright and RGB, or an error that names them. The server of these tests is on 127.0.0.1."""

import base64
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from processing.picture_sources import MAX_PIXELS, PictureLimits, describe
from processing.pictures import load_picture, picture_size

LEFT_RED = np.zeros((4, 6, 3), np.uint8)  # 4 high, 6 wide: the left column is red
LEFT_RED[:, 0] = (255, 0, 0)
TURNED = 6  # EXIF orientation: the viewer turns the stored pixels by 90 degrees clockwise


def encoded(array=LEFT_RED, format="PNG", **options):
    stream = BytesIO()
    Image.fromarray(array).save(stream, format, **options)
    return stream.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


@pytest.fixture(scope="module")
def address():
    """http://127.0.0.1:port, which answers /picture, /missing, /large, /short, /slow and /elsewhere."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = encoded()
            if self.path == "/missing":
                return self.send_error(404)
            self.send_response(302 if self.path == "/elsewhere" else 200)
            if self.path == "/elsewhere":
                self.send_header("Location", "ftp://127.0.0.1/picture")
            self.send_header("Content-Length", str(len(body) + (100 if self.path == "/short" else 0)))
            self.end_headers()
            if self.path == "/slow":
                stop.wait(5)
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    stop = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    stop.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def test_every_way_of_giving_a_picture_gives_the_same_picture(tmp_path, address):
    path = tmp_path / "a b.png"
    path.write_bytes(encoded())
    sources = [
        Image.fromarray(LEFT_RED),
        LEFT_RED,
        LEFT_RED.astype(np.float32) / 255,
        torch.from_numpy(LEFT_RED).permute(2, 0, 1),
        torch.from_numpy(LEFT_RED).permute(2, 0, 1) / 255,
        encoded(),
        path,
        str(path),
        path.as_uri(),
        f"{address}/picture",
        "data:image/png;base64," + base64.b64encode(encoded()).decode(),
        {"bytes": encoded(), "path": "gone.png"},
        {"bytes": None, "path": str(path)},
    ]
    for source in sources:
        picture = load_picture(source)
        assert (picture.mode, picture_size(source)) == ("RGB", (4, 6)), describe(source)
        np.testing.assert_array_equal(np.asarray(picture), LEFT_RED, describe(source))


def test_grey_palette_and_transparent_pictures_become_rgb():
    grey = np.arange(35, dtype=np.uint8).reshape(5, 7)
    for picture in (load_picture(grey), load_picture(torch.from_numpy(grey)[None]), load_picture(grey[..., None])):
        np.testing.assert_array_equal(np.asarray(picture), np.repeat(grey[..., None], 3, axis=2))
    transparent = np.dstack([LEFT_RED, np.zeros((4, 6), np.uint8)])
    np.testing.assert_array_equal(np.asarray(load_picture(encoded(transparent))), LEFT_RED)
    palette = Image.fromarray(LEFT_RED).convert("P")
    palette.info["transparency"] = bytes(256)
    np.testing.assert_array_equal(np.asarray(load_picture(palette)), LEFT_RED)


def test_a_photo_is_turned_upright_once_and_boxes_are_in_the_upright_frame():
    data = encoded(format="JPEG", exif=exif(TURNED), quality=100, subsampling=0)
    upright = load_picture(data)
    assert (upright.width, upright.height) == (4, 6)
    assert picture_size(data) == (6, 4)
    assert np.asarray(upright)[0].mean(0)[0] > 200, "the left column is on top after turning clockwise"
    again = load_picture(upright)
    np.testing.assert_array_equal(np.asarray(again), np.asarray(upright))
    assert again.getexif() == {}


def test_stored_pixels_can_be_asked_for_and_nothing_later_can_turn_them():
    data = encoded(format="JPEG", exif=exif(TURNED))
    stored = PictureLimits(exif="ignore")
    picture = load_picture(data, stored)
    assert (picture.width, picture.height) == (6, 4)
    assert picture_size(data, stored) == (4, 6)
    assert 0x0112 not in picture.getexif()


def test_the_callers_picture_is_left_as_it_was():
    theirs = Image.open(BytesIO(encoded(format="JPEG", exif=exif(TURNED))))
    load_picture(theirs)
    assert theirs.getexif()[0x0112] == TURNED
    plain = Image.fromarray(LEFT_RED)
    plain.info["note"] = "mine"
    load_picture(plain).paste((0, 0, 255), (0, 0, 6, 4))
    assert plain.info == {"note": "mine"}
    np.testing.assert_array_equal(np.asarray(plain), LEFT_RED)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", r"picture 0 bytes is empty"),
        (b"GIF89a but no more", "cannot be read: not a known picture format"),
        (encoded()[:45], "picture 45 bytes"),
        ("data:image/png;base64,@@@", "data:image/png;base64,@@@.* is not valid base64"),
        ("data:image/png,abc", "only data:image/...;base64,... is read"),
        ("", "a picture must be .* not "),
        (None, "a picture must be .* not NoneType None"),
        ({"bytes": None, "path": None}, "a picture must be"),
        (7, "not int 7"),
        ("nowhere/cat.png", "picture nowhere/cat.png does not exist"),
        ("file://server/cat.png", "a file address names no host, this one names 'server'"),
        (np.zeros((4, 6)) + 1.5, r"ndarray of shape \(4, 6\) and type float64 holds 1.5 ... 1.5, floats must be in"),
        (np.full((4, 6), np.nan), "floats must be in"),
        (np.zeros((4, 6), np.int64), "values must be uint8"),
        (np.zeros((3, 4, 6), np.uint8), r"an array must have shape \(H, W\)"),
        (np.zeros((0, 6), np.uint8), "is empty"),
        (torch.zeros(5, 6, 3), r"a tensor must have shape \(1 \| 3 \| 4, H, W\)"),
        (Image.fromarray(np.zeros((4, 6), np.uint16)), "more than 8 bits per channel"),
        (Image.fromarray(np.zeros((4, 6), np.float32)), "more than 8 bits per channel"),
    ],
    ids=lambda value: None,
)
def test_what_is_no_picture_is_refused_by_name(source, message):
    with pytest.raises(ValueError, match=message):
        load_picture(source)


def test_a_truncated_picture_is_refused_although_its_size_can_be_read(tmp_path):
    path = tmp_path / "cut.jpg"
    path.write_bytes(encoded(np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8), "JPEG")[:2000])
    assert picture_size(path) == (64, 64)
    with pytest.raises(ValueError, match=r"cut\.jpg is damaged: .*truncated"):
        load_picture(path)


SAMPLES = {
    format: encoded(np.random.default_rng(5).integers(0, 256, (16, 24, 3), dtype=np.uint8), format, **options)
    for format, options in {"PNG": {}, "JPEG": {"exif": exif(3)}, "GIF": {}, "BMP": {}, "TIFF": {}, "WEBP": {}}.items()
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns of damaged TIFF and EXIF before it fails
@pytest.mark.parametrize("format", SAMPLES)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_damaged_file_gives_a_picture_or_a_value_error_and_nothing_else(format, data):
    damaged = bytearray(SAMPLES[format])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    source = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    for read in (load_picture, picture_size):
        problem = ""
        try:
            read(source)
        except ValueError as error:
            problem = str(error)
        assert problem == "" or problem.startswith(f"picture {len(source)} bytes")


def test_a_picture_beyond_the_pixel_limit_is_refused_before_decoding():
    bomb = Image.new("1", (20_000, 20_000))
    stream = BytesIO()
    bomb.save(stream, "PNG")
    assert len(stream.getvalue()) < 100_000
    with pytest.raises(ValueError, match="is too large"):
        load_picture(stream.getvalue())
    with pytest.raises(ValueError, match=r"is too large: 20000x20000 = 400000000 pixels, the limit is 89478485"):
        load_picture(bomb)
    with pytest.raises(ValueError, match="6x4 = 24 pixels, the limit is 23"):
        load_picture(LEFT_RED, PictureLimits(max_pixels=23))
    assert load_picture(LEFT_RED, PictureLimits(max_pixels=24)).size == (6, 4)
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS


def test_files_larger_than_the_byte_limit_are_not_read(tmp_path, address):
    path = tmp_path / "a.png"
    path.write_bytes(encoded())
    limits = PictureLimits(max_bytes=10)
    with pytest.raises(ValueError, match=f"has {len(encoded())} bytes, the limit is 10"):
        load_picture(path, limits)
    with pytest.raises(ValueError, match="has more than 10 bytes"):
        load_picture(f"{address}/picture", limits)


def test_a_root_keeps_all_paths_inside(tmp_path):
    root, outside = tmp_path / "data", tmp_path / "secret.png"
    (root / "sub").mkdir(parents=True)
    outside.write_bytes(encoded())
    (root / "in.png").write_bytes(encoded())
    (root / "link.png").symlink_to(outside)
    (root / "fine.png").symlink_to(root / "in.png")
    (root / "away").symlink_to(tmp_path)
    (tmp_path / "data-2").mkdir()
    (tmp_path / "data-2" / "a.png").write_bytes(encoded())
    limits = PictureLimits(root=root)
    for inside in (
        "in.png",
        "sub/../in.png",
        "fine.png",
        root / "in.png",
        (root / "in.png").as_uri(),
        {"path": "in.png"},
    ):
        assert load_picture(inside, limits).size == (6, 4)
    escapes = ["../secret.png", "link.png", "away/secret.png", str(outside), outside.as_uri(), "../data-2/a.png"]
    for escape in (
        *escapes,
        "file:///etc/../" + str(outside),
        "sub/../../secret.png",
        "file://" + str(root) + "/%2e%2e/secret.png",
    ):
        with pytest.raises(ValueError, match="lies outside"):
            load_picture(escape, limits)
    with pytest.raises(ValueError, match=r"gone\.png does not exist"):
        load_picture("gone.png", limits)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, message in (
        ("pipe", "is not a file"),
        (".", "is not a file"),
        ("loop", r"cannot be opened|does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            load_picture(tmp_path / name)
    with pytest.raises(ValueError, match=r"null byte|does not exist|cannot be opened"):
        load_picture("a\0b.png")


def test_the_network_can_be_switched_off(address):
    for url in (f"{address}/picture", f"{address}/picture".upper().replace("PICTURE", "picture")):
        with pytest.raises(ValueError, match="the network, which is switched off"):
            load_picture(url, PictureLimits(allow_network=False))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/missing", "cannot be fetched: HTTP Error 404"),
        ("/short", "bytes arrived|cannot be fetched"),
        ("/slow", "cannot be fetched: .*timed out"),
        ("/elsewhere", "cannot be fetched|was redirected"),
    ],
)
def test_a_download_that_fails_names_the_address(address, path, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_picture(address + path, PictureLimits(timeout=0.3))
    assert address + path in str(caught.value)


def test_an_address_where_nobody_answers_is_refused():
    with pytest.raises(ValueError, match="cannot be fetched"):
        load_picture("http://127.0.0.1:9/cat.png", PictureLimits(timeout=2))


def test_a_long_data_uri_is_cut_in_messages():
    assert len(describe("data:image/png;base64," + "A" * 10_000)) < 80
    assert describe(Path("a/b.png")) == "a/b.png"


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="exif is 'rotate'"):
        PictureLimits(exif="rotate")
