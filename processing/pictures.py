"""Anything that stands for a picture -> an upright RGB PIL picture, or a ValueError that names it.

Boxes are given in the frame of the upright picture: as viewers and annotation tools show it, after the camera's EXIF
rotation. That rotation is applied here and its tag removed, so nothing later can rotate the picture again. With
`exif="ignore"` the pixels stay as stored; use it for data whose boxes were measured on the stored pixels.

Whoever reads rows of unknown origin sets `root` and `allow_network=False`. What that does not cover: a file that is
replaced by a link between the check and the reading.
"""

from __future__ import annotations

import base64
import binascii
import struct
import time
import urllib.request
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps

MAX_PIXELS = 89_478_485  # Pillow's own border for "this may be a decompression bomb"
MAX_BYTES = 256 * 2**20
# What Pillow's decoders and EXIF reader raise on damaged files (tests/processing/test_pictures.py damages some).
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    struct.error,
    zlib.error,
)
_TOO_BIG = (Image.DecompressionBombError, Image.DecompressionBombWarning)


@dataclass(frozen=True)
class PictureLimits:
    """What may be loaded, from where.

    root: folder that files must lie in, after following links and `..`; relative paths start there. None: any file.
    allow_network: whether http and https are fetched.
    max_pixels: largest width times height, before any decoding. max_bytes: largest file or download.
    timeout: seconds for a download, all of it.
    exif: "apply" turns the picture upright as its EXIF tag says; "ignore" leaves the pixels as stored.
    """

    root: str | Path | None = None
    allow_network: bool = True
    max_pixels: int = MAX_PIXELS
    max_bytes: int = MAX_BYTES
    timeout: float = 20.0
    exif: Literal["apply", "ignore"] = "apply"

    def __post_init__(self) -> None:
        if self.exif not in ("apply", "ignore"):
            raise ValueError(f"exif is {self.exif!r}, it must be 'apply' or 'ignore'")


ANYTHING = PictureLimits()


def load_picture(source: Any, limits: PictureLimits = ANYTHING) -> Image.Image:
    """The picture, upright, RGB, decoded, without metadata.

    Args:
        source: a PIL picture; a numpy array (H, W) or (H, W, 1 | 3 | 4), or a torch tensor (1 | 3 | 4, H, W), either
            uint8 or floating in [0, 1]; encoded bytes; a path; "file://..."; "http(s)://...";
            "data:image/...;base64,..."; or the dictionary {"bytes", "path"} of a Hub dataset whose pictures are not
            decoded. The first frame of an animation is taken; transparency is dropped, as transformers does.

    Raises:
        ValueError: missing, corrupt, truncated, empty or too large; outside `root`, or network not allowed; more than
            8 bits per channel (their range is unknown). The message names the picture.

    Example:
        >>> load_picture(np.zeros((2, 3), np.uint8)).size
        (3, 2)
    """
    name = describe(source)
    if isinstance(source, np.ndarray | torch.Tensor):
        picture = _from_array(source, name)
        _check_size(picture, name, limits)
        return picture
    return _decode(_open(source, name, limits), name, limits)


def picture_size(source: Any, limits: PictureLimits = ANYTHING) -> tuple[int, int]:
    """(height, width) of the picture that `load_picture` would give, from the head of the file where that is enough.

    PNG is decoded: its EXIF tag may stand at the end of the file.

    Raises:
        ValueError: as `load_picture`, as far as the head of a file tells.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        picture = load_picture(source, limits)
    else:
        picture = _open(source, describe(source), limits)
        if limits.exif == "apply" and _is_turned(picture, describe(source)):
            return picture.width, picture.height
    return picture.height, picture.width


def describe(source: Any) -> str:
    """How messages name a picture: its path or URL, or what kind of thing it is.

    Example:
        >>> describe("data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAMAAAAC")
        'data:image/png;base64,iVBORw0KGgoAAAANS... (50 characters)'
    """
    if isinstance(source, str | Path):
        text = str(source)
        return text if not text.startswith("data:") else f"{text[:40]}... ({len(text)} characters)"
    if isinstance(source, bytes | bytearray):
        return f"{len(source)} bytes"
    if isinstance(source, Image.Image):
        filename = source.filename if isinstance(source, ImageFile.ImageFile) else ""
        return str(filename) or f"PIL picture {source.width}x{source.height}"
    if isinstance(source, np.ndarray | torch.Tensor):
        return f"{type(source).__name__} of shape {tuple(source.shape)} and type {source.dtype}"
    if isinstance(source, Mapping) and source.get("path"):
        return str(source["path"])
    return f"{type(source).__name__} {source!r:.60}"


def _open(source: Any, name: str, limits: PictureLimits) -> Image.Image:
    """A PIL picture whose head is read and whose size is checked, perhaps not yet decoded."""
    if isinstance(source, Image.Image):
        picture = source
    else:
        data = _read(source, name, limits)
        if not data:
            raise ValueError(f"picture {name} is empty (0 bytes)")
        try:
            picture = Image.open(BytesIO(data))
        except _TOO_BIG as error:
            raise ValueError(f"picture {name} is too large: {error}") from error
        except _DAMAGED as error:
            raise ValueError(f"picture {name} cannot be read: {_reason(error)}") from error
    _check_size(picture, name, limits)
    return picture


def _check_size(picture: Image.Image, name: str, limits: PictureLimits) -> None:
    if picture.width < 1 or picture.height < 1:
        raise ValueError(f"picture {name} is empty: {picture.width}x{picture.height} pixels")
    if picture.width * picture.height > limits.max_pixels:
        raise ValueError(
            f"picture {name} is too large: {picture.width}x{picture.height} = {picture.width * picture.height} "
            f"pixels, the limit is {limits.max_pixels} (PictureLimits.max_pixels)"
        )


def _decode(picture: Image.Image, name: str, limits: PictureLimits) -> Image.Image:
    try:
        picture.load()
        if limits.exif == "apply":
            picture = ImageOps.exif_transpose(picture)
    except _TOO_BIG as error:
        raise ValueError(f"picture {name} is too large: {error}") from error
    except _DAMAGED as error:
        raise ValueError(f"picture {name} is damaged: {_reason(error)}") from error
    if picture.mode.startswith(("I", "F")):
        raise ValueError(
            f"picture {name} has mode {picture.mode!r}, more than 8 bits per channel: scale it to 8 bits first, its "
            f"range is unknown here"
        )
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    # Pillow returns the very same object where nothing is to convert; the caller's picture must keep its metadata.
    picture = picture.copy() if picture.mode == "RGB" else picture.convert("RGB")
    picture.info = {}
    return picture


def _is_turned(picture: Image.Image, name: str) -> bool:
    try:
        return picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except _DAMAGED as error:
        raise ValueError(f"picture {name} is damaged: {_reason(error)}") from error


def _from_array(array: np.ndarray | torch.Tensor, name: str) -> Image.Image:
    values = array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else array
    if isinstance(array, torch.Tensor):
        if values.ndim != 3 or values.shape[0] not in (1, 3, 4):
            raise ValueError(f"picture {name}: a tensor must have shape (1 | 3 | 4, H, W)")
        values = np.moveaxis(values, 0, -1)
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim != 2 and not (values.ndim == 3 and values.shape[-1] in (3, 4)):
        raise ValueError(f"picture {name}: an array must have shape (H, W) or (H, W, 1 | 3 | 4)")
    if values.size == 0:
        raise ValueError(f"picture {name} is empty")
    if np.issubdtype(values.dtype, np.floating):
        # The negated comparison is also true for NaN.
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(f"picture {name} holds {values.min():g} ... {values.max():g}, floats must be in [0, 1]")
        values = np.rint(values * 255)
    elif values.dtype != np.uint8:
        raise ValueError(f"picture {name}: values must be uint8 in [0, 255] or floating in [0, 1]")
    return Image.fromarray(np.ascontiguousarray(values.astype(np.uint8))).convert("RGB")


def _read(source: Any, name: str, limits: PictureLimits) -> bytes:
    """The encoded bytes behind a path, an address, a data URI or bytes."""
    if isinstance(source, Mapping):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if isinstance(source, bytes | bytearray):
        return bytes(source)
    if isinstance(source, Path):
        return _read_file(source, name, limits)
    if not isinstance(source, str) or not source:
        raise ValueError(f"a picture must be a PIL picture, array, tensor, bytes, path or address, not {name}")
    scheme = source[:8].lower()
    if scheme.startswith(("http://", "https://")):
        return _download(source, name, limits)
    if scheme.startswith("data:"):
        return _from_data_uri(source, name)
    if scheme.startswith("file://"):
        address = urlsplit(source)
        if address.netloc not in ("", "localhost"):
            raise ValueError(f"picture {name}: a file address names no host, this one names {address.netloc!r}")
        return _read_file(Path(unquote(address.path)), name, limits)
    return _read_file(Path(source), name, limits)


def _from_data_uri(source: str, name: str) -> bytes:
    head, comma, body = source.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ValueError(f"picture {name}: only data:image/...;base64,... is read")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"picture {name} is not valid base64: {error}") from error


def _read_file(path: Path, name: str, limits: PictureLimits) -> bytes:
    try:
        if limits.root is not None:
            root = Path(limits.root).resolve(strict=True)
            path = (root / path).resolve()
            if not path.is_relative_to(root):
                raise ValueError(f"picture {name} lies outside {root}: it is {path}")
        if not path.exists():
            raise ValueError(f"picture {name} does not exist (looked for {path.absolute()})")
        if not path.is_file():  # a folder, or a device or pipe that would never end
            raise ValueError(f"picture {name} is not a file")
        if (size := path.stat().st_size) > limits.max_bytes:
            raise ValueError(f"picture {name} has {size} bytes, the limit is {limits.max_bytes}")
        return path.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise ValueError(f"picture {name} cannot be opened: {_reason(error)}") from error


def _download(url: str, name: str, limits: PictureLimits) -> bytes:
    if not limits.allow_network:
        raise ValueError(f"picture {name} would be fetched from the network, which is switched off (allow_network)")
    deadline = time.monotonic() + limits.timeout
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        with urllib.request.urlopen(url, timeout=limits.timeout) as response:
            if not response.geturl().lower().startswith(("http://", "https://")):
                raise ValueError(f"picture {name} was redirected to {response.geturl()}")
            while chunk := response.read1(2**16):
                chunks.append(chunk)
                num_bytes += len(chunk)
                if num_bytes > limits.max_bytes:
                    raise ValueError(
                        f"picture {name} has more than {limits.max_bytes} bytes (PictureLimits.max_bytes)"
                    )
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not complete after {limits.timeout:g} s")
            # read1() ends quietly when the connection breaks early.
            announced = response.headers.get("Content-Length")
            if announced is not None and announced.isdigit() and int(announced) != num_bytes:
                raise ValueError(f"picture {name}: {num_bytes} of {announced} bytes arrived")
    except HTTPError as error:
        error.close()  # it is the response, with an open connection
        raise ValueError(f"picture {name} cannot be fetched: {_reason(error)}") from error
    except (OSError, HTTPException) as error:  # OSError: also URLError and timeouts
        raise ValueError(f"picture {name} cannot be fetched: {_reason(error)}") from error
    return b"".join(chunks)


def _reason(error: BaseException) -> str:
    text = str(error)
    # Pillow names its in-memory file by address, which tells nobody anything.
    return "not a known picture format" if "cannot identify image file" in text else text or type(error).__name__
