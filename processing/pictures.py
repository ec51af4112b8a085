"""Anything that stands for a picture -> an upright RGB PIL picture, or a ValueError that names it.

Boxes are given in the frame of the upright picture: as viewers and annotation tools show it, after the camera's EXIF
rotation. That rotation is applied here and its tag removed, so nothing later can rotate the picture again. With
`exif="ignore"` the pixels stay as stored; use it for data whose boxes were measured on the stored pixels.
"""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from .picture_sources import ANYTHING, PictureLimits, describe, read_source

__all__ = ["ANYTHING", "PictureLimits", "describe", "load_picture", "picture_size"]

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


def _open(source: Any, name: str, limits: PictureLimits) -> Image.Image:
    """A PIL picture whose head is read and whose size is checked, perhaps not yet decoded."""
    if isinstance(source, Image.Image):
        picture = source
    else:
        data = read_source(source, name, limits)
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


def _reason(error: BaseException) -> str:
    text = str(error)
    # Pillow names its in-memory file by address, which tells nobody anything.
    return "not a known picture format" if "cannot identify image file" in text else text or type(error).__name__
