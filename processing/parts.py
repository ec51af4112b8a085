"""The typed parts of a message, and what makes one malformed.

| type       | holds                                                      | may also hold                           |
|------------|------------------------------------------------------------|-----------------------------------------|
| "text"     | "text": str                                                |                                         |
| "image"    | one of "image", "path", "url", "base64"                    | "numbered": false, see below            |
| "video"    | one of "video", "path", "url": a file, or a list of frames | which frames, see VIDEO_OPTIONS         |
| "box"      | "bbox": [x1, y1, x2, y2] or a list of them                 | "label", "normalized", "image_index"    |
| "quad"     | "quad": [x1, y1, ..., x4, y4] or a list of them            | "label", "normalized", "image_index"    |
| "point"    | "point": [x, y] or a list of them                          | "label", "normalized", "image_index"    |
| "ref"      | "text": a phrase marked without a box                      |                                         |
| "document" | "html": QwenVL HTML (documents.py), boxes in pixels        | "image_index"                           |

Coordinates are pixels of the original picture, origin top left, unless "normalized" is 1 (range [0, 1]) or 1000 (range
[0, 1000)). "image_index" counts the pictures of the conversation from 0; without it, it is the latest picture before
the part. A picture with "numbered": false stands for `<img>..</img>` alone: the text around it already says what
Qwen-VL's chat template would add (`Picture k: ` before and a line break after), or does without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

Part = dict[str, Any]

IMAGE_KEYS = ("image", "path", "url", "base64")
VIDEO_KEYS = ("video", "path", "url")
# Which frames of a video are seen, by the names that qwen-vl-utils gives them: "fps" frames per second, at least
# "min_frames" and at most "max_frames", or "nframes" in all; from "video_start" to "video_end", in seconds.
# "sample_fps" says how many frames of a list of frames make a second.
VIDEO_OPTIONS = ("fps", "nframes", "min_frames", "max_frames", "video_start", "video_end", "sample_fps")
_SIZE_OPTIONS = ("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width")
SHAPES = {"box": ("bbox", 4), "quad": ("quad", 8), "point": ("point", 2)}  # (key, how many numbers one shape has)
_SHAPE_OPTIONS = ("label", "normalized", "image_index")
PART_KEYS: dict[str, tuple[str, ...]] = {
    "text": ("type", "text"),
    "image": ("type", *IMAGE_KEYS, "numbered"),
    "video": ("type", *VIDEO_KEYS, *VIDEO_OPTIONS),
    **{name: ("type", key, *_SHAPE_OPTIONS) for name, (key, _) in SHAPES.items()},
    "ref": ("type", "text"),
    "document": ("type", "html", "image_index"),
}


def check_part(part: Any, where: str, num_pictures_before: int, num_pictures: int) -> None:
    """Refuses a malformed part.

    Args:
        where: how messages call this part, such as "messages[0] part 2".
        num_pictures_before: pictures of the conversation before this part; what the default of "image_index" looks at.
        num_pictures: pictures of the whole conversation; "image_index" must be smaller.

    Raises:
        ValueError: unknown type or key (with the nearest name), a missing or wrong value, a shape without a picture.
    """
    if not isinstance(part, dict):
        raise ValueError(f"{where} must be a dictionary with a type, it is {shorten(part)}")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in PART_KEYS:
        hint = _nearest(kind, tuple(PART_KEYS)) or f"; known are {', '.join(PART_KEYS)}"
        raise ValueError(f"{where} has the unknown type {kind!r}{hint}")
    if sizes := [key for key in _SIZE_OPTIONS if key in part]:
        raise ValueError(
            f"{where} has {sizes[0]!r}: sizes are set in one place, on the processor (min_pixels and max_pixels when "
            f"loading, data.picture_side in a recipe), so that training and use agree"
        )
    refuse_unknown_keys(part, PART_KEYS[kind], f"{where} (type {kind!r})")
    if kind in ("text", "ref"):
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where} (type {kind!r}) needs 'text' to be text, it is {shorten(part.get('text'))}")
    elif kind in ("image", "video"):
        accepted = IMAGE_KEYS if kind == "image" else VIDEO_KEYS
        keys = [key for key in accepted if part.get(key) is not None]
        if len(keys) != 1:
            given = " and ".join(repr(key) for key in keys) or "none"
            raise ValueError(f"{where} (type {kind!r}) needs one of {', '.join(accepted)}, it has {given}")
        if isinstance(part[keys[0]], str) and not part[keys[0]].strip():
            raise ValueError(f"{where} (type {kind!r}) has an empty {keys[0]!r}")
        if not isinstance(part.get("numbered", True), bool):
            raise ValueError(f"{where} has numbered {part['numbered']!r}, it must be true or false")
        if kind == "video":
            _check_video(part, f"{where} (type 'video')")
    else:
        _check_picture_index(part, f"{where} (type {kind!r})", num_pictures_before, num_pictures)
        if kind == "document":
            if not isinstance(part.get("html"), str) or not part["html"].strip():
                raise ValueError(
                    f"{where} (type 'document') needs 'html' to be text, it is {shorten(part.get('html'))}"
                )
        else:
            _check_shape(part, kind, f"{where} (type {kind!r})")


def _check_video(part: Part, where: str) -> None:
    is_list = isinstance(video_of(part), list | tuple)
    if is_list and not video_of(part):
        raise ValueError(f"{where} has an empty list of frames")
    for key in VIDEO_OPTIONS:
        if part.get(key) is None:
            continue
        if not is_number(part[key]) or part[key] < 0 or (part[key] == 0 and key != "video_start"):
            raise ValueError(f"{where} has {key} {part[key]!r}, it must be a number > 0")
        if is_list != (key == "sample_fps"):
            holds = "a list of frames, which is taken whole" if is_list else "no list of frames"
            raise ValueError(f"{where} has {key!r}, but it holds {holds}")
    if part.get("fps") is not None and part.get("nframes") is not None:
        raise ValueError(f"{where} has both 'fps' and 'nframes': each says how many frames are seen")


def _check_picture_index(part: Part, where: str, num_pictures_before: int, num_pictures: int) -> None:
    index = part.get("image_index")
    if index is None:
        if num_pictures_before == 0:
            after = (
                f"; the conversation has {num_pictures} after it: name one with image_index" if num_pictures else ""
            )
            raise ValueError(f"{where} stands before any picture{after}")
    elif isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < num_pictures:
        raise ValueError(f"{where} has image_index {index!r}, but the conversation has {num_pictures} picture(s)")


def _check_shape(part: Part, kind: str, where: str) -> None:
    key, size = SHAPES[kind]
    normalized = part.get("normalized")
    if normalized is not None and (isinstance(normalized, bool) or normalized not in (1, 1000)):
        raise ValueError(f"{where} has normalized {normalized!r}, it must be 1, 1000, or absent for pixels")
    if not isinstance(part.get("label", ""), str | None):
        raise ValueError(f"{where} has label {shorten(part['label'])}, it must be text")
    for shape in shapes_of(part, kind, where):
        wrong = f"{where} has {key} {shape}"
        if len(shape) != size or not all(is_number(value) for value in shape):
            raise ValueError(f"{wrong}, it must be {size} finite numbers")
        if min(shape) < 0:
            raise ValueError(f"{wrong}, which lies left of or above the picture: coordinates are >= 0")
        if normalized == 1 and max(shape) > 1:
            raise ValueError(f"{wrong} with normalized 1, whose range is [0, 1]")
        if normalized == 1000 and max(shape) >= 1000:
            raise ValueError(f"{wrong} with normalized 1000, whose range is [0, 1000)")
        # Equal corners are allowed: whole numbers in [0, 1000) round thin things to nothing.
        if kind == "box" and (shape[2] < shape[0] or shape[3] < shape[1]):
            raise ValueError(f"{wrong}, whose second corner lies left of or above the first: xyxy is wanted, not xywh")


def shapes_of(part: Part, kind: str, where: str) -> list[list[float]]:
    """The shapes of a box, quad or point part as a list, also where the part gives a single one."""
    value = part.get(SHAPES[kind][0])
    if isinstance(value, list | tuple) and value:
        if all(isinstance(item, list | tuple) for item in value):
            return [list(item) for item in value]
        return [list(value)]
    raise ValueError(f"{where} needs {SHAPES[kind][0]!r} to be a list of numbers, it is {shorten(value)}")


def picture_of(part: Part) -> Any:
    """What an image part holds, whichever of the accepted keys holds it; base64 as a data URI."""
    key = next(key for key in IMAGE_KEYS if part.get(key) is not None)
    is_bare = key == "base64" and not part[key].startswith("data:")
    return f"data:image/*;base64,{part[key]}" if is_bare else part[key]


def video_of(part: Part) -> Any:
    """What a video part holds, whichever of the accepted keys holds it."""
    return next(part[key] for key in VIDEO_KEYS if part.get(key) is not None)


def refuse_unknown_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """ValueError for a key outside `known`, naming the nearest known one."""
    for key in given:
        if key not in known:
            hint = _nearest(key, known) or f"; known are {', '.join(known)}"
            raise ValueError(f"{where} has the unknown key {key!r}{hint}")


def _nearest(name: Any, known: Sequence[str]) -> str:
    nearest = get_close_matches(str(name), known, n=1)
    return f", did you mean {nearest[0]!r}?" if nearest else ""


def is_number(value: Any) -> bool:
    """True for a finite int or float; not for a bool, which Python counts as an int."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def shorten(value: Any, limit: int = 60) -> str:
    """`value` as it would be typed, cut to `limit` characters, for messages."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
