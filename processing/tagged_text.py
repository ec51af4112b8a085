"""Qwen-VL's tags inside a text, as typed parts that render back to the identical text.

`<img>path</img>`, `<ref>phrase</ref>`, `<box>(x1,y1),(x2,y2)</box>`, `<quad>(x1,y1),(x2,y2),(x3,y3),(x4,y4)</quad>`;
coordinates are whole numbers in [0, 1000) of the picture.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .parts import SHAPES, Part, shorten

_TAGGED = re.compile(r"<(img|ref|box|quad)>(.*?)</\1>", re.DOTALL)
_TAG = re.compile(r"</?(?:img|ref|box|quad)>")
_POINT = r"\((\d{1,3}),(\d{1,3})\)"
_COORDINATES = {"box": re.compile(",".join([_POINT] * 2)), "quad": re.compile(",".join([_POINT] * 4))}
_SHAPE_NOTATION = {"box": "(x1,y1),(x2,y2)", "quad": "(x1,y1),(x2,y2),(x3,y3),(x4,y4)"}


def parts_from_tags(text: str, picture: Callable[[str], Any] = str) -> list[Part]:
    """`text` as typed parts.

    A `<ref>` directly before a shape becomes its label, and shapes directly after one another become one part with
    several shapes; both are written the same way again. Pictures are marked `"numbered": False`, because `Picture 1: `
    and the line break around them are part of the text and stay there.

    Args:
        picture: what to make of the path inside `<img>`.

    Raises:
        ValueError: a tag without its partner, or coordinates that are not whole numbers in [0, 1000).

    Example:
        >>> parts_from_tags("<ref>dog</ref><box>(1,2),(3,4)</box>!")
        [{'type': 'box', 'bbox': [1, 2, 3, 4], 'normalized': 1000, 'label': 'dog'}, {'type': 'text', 'text': '!'}]
    """
    parts: list[Part] = []
    end = 0
    for match in _TAGGED.finditer(text):
        _add_text(parts, text[end : match.start()])
        tag, inside = match.groups()
        if stray := _TAG.search(inside):
            raise ValueError(f"{stray.group()} inside <{tag}>..</{tag}>: {shorten(match.group())}")
        if tag == "img":
            if not inside.strip():
                raise ValueError("<img></img> is empty: the path of a picture is missing")
            parts.append({"type": "image", "image": picture(inside), "numbered": False})
        elif tag == "ref":
            parts.append({"type": "ref", "text": inside})
        else:
            _add_shape(parts, tag, inside)
        end = match.end()
    _add_text(parts, text[end:])
    return parts


def _add_text(parts: list[Part], text: str) -> None:
    if stray := _TAG.search(text):
        raise ValueError(f"{stray.group()} without its partner in {shorten(text)}")
    if text:
        parts.append({"type": "text", "text": text})


def _add_shape(parts: list[Part], tag: str, inside: str) -> None:
    match = _COORDINATES[tag].fullmatch(inside)
    if not match:
        raise ValueError(
            f"<{tag}> holds {shorten(inside)}, wanted is {_SHAPE_NOTATION[tag]} in whole numbers from 0 to 999, "
            f"without blanks"
        )
    numbers = [int(number) for number in match.groups()]
    key, _ = SHAPES[tag]
    last = parts[-1] if parts else {}
    if last.get("type") == tag:
        first = last[key]
        last[key] = [*(first if isinstance(first[0], list) else [first]), numbers]
    elif last.get("type") == "ref":
        parts[-1] = {"type": tag, key: numbers, "normalized": 1000, "label": last["text"]}
    else:
        parts.append({"type": tag, key: numbers, "normalized": 1000})
