"""A path, an address, a data URI or a Hub dataset's dictionary -> the encoded bytes of a picture, within limits.

Whoever reads rows of unknown origin sets `root` and `allow_network=False`. What that does not cover: a file that is
replaced by a link between the check and the reading.
"""

from __future__ import annotations

import base64
import binascii
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from PIL import Image, ImageFile

MAX_PIXELS = 89_478_485  # Pillow's own border for "this may be a decompression bomb"
MAX_BYTES = 256 * 2**20


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


def describe(source: Any) -> str:
    """How messages name a picture: its path or URL, or what kind of thing it is.

    Example:
        >>> describe("data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAMAAAAC")
        'data:image/png;base64,iVBORw0KGgoAAAANSU... (54 characters)'
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


def read_source(source: Any, name: str, limits: PictureLimits) -> bytes:
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
        return checked_file(path, f"picture {name}", limits, limits.max_bytes).read_bytes()
    except OSError as error:
        raise ValueError(f"picture {name} cannot be opened: {error}") from error


def checked_file(path: Path, what: str, limits: PictureLimits, max_bytes: int | None) -> Path:
    """`path` as it may be opened; ValueError where it is no file, lies outside the limits' root or is too large.

    what: how messages call it, "picture a.png".
    """
    try:
        if limits.root is not None:
            root = Path(limits.root).resolve(strict=True)
            path = (root / path).resolve()
            if not path.is_relative_to(root):
                raise ValueError(f"{what} lies outside {root}: it is {path}")
        if not path.exists():
            raise ValueError(f"{what} does not exist (looked for {path.absolute()})")
        if not path.is_file():  # a folder, or a device or pipe that would never end
            raise ValueError(f"{what} is not a file")
        if max_bytes is not None and (size := path.stat().st_size) > max_bytes:
            raise ValueError(f"{what} has {size} bytes, the limit is {max_bytes}")
        return path
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise ValueError(f"{what} cannot be opened: {error}") from error


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
        raise ValueError(f"picture {name} cannot be fetched: {error}") from error
    except (OSError, HTTPException) as error:  # OSError: also URLError and timeouts
        raise ValueError(f"picture {name} cannot be fetched: {error}") from error
    return b"".join(chunks)
