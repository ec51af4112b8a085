"""Qwen-VL's tags inside a text, as typed parts that render back to the identical text.

`<img>path</img>`, `<ref>phrase</ref>`, `<box>(x1,y1),(x2,y2)</box>`, `<quad>(x1,y1),(x2,y2),(x3,y3),(x4,y4)</quad>`,
and a point as `<box>(x,y)</box>`; coordinates are whole numbers in [0, 1000) of the picture.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .parts import SHAPES, Part, shorten

_TAGGED = re.compile(r"<(img|ref|box|quad)>(.*?)</\1>", re.DOTALL)
_TAG = re.compile(r"</?(?:img|ref|box|quad)>")
_PAIR = r"\((\d{1,3}),(\d{1,3})\)"
_NOTATIONS = {  # tag: what it may hold, as (type of the part, pattern)
    "box": (("box", re.compile(f"{_PAIR},{_PAIR}")), ("point", re.compile(_PAIR))),
    "quad": (("quad", re.compile(",".join([_PAIR] * 4))),),
}
_WANTED = {"box": "(x1,y1),(x2,y2) or (x,y)", "quad": "(x1,y1),(x2,y2),(x3,y3),(x4,y4)"}


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
    matches = [(kind, match) for kind, pattern in _NOTATIONS[tag] if (match := pattern.fullmatch(inside))]
    if not matches:
        raise ValueError(
            f"<{tag}> holds {shorten(inside)}, wanted is {_WANTED[tag]} in whole numbers from 0 to 999, without blanks"
        )
    kind, match = matches[0]
    key, _ = SHAPES[kind]
    shape: Part = {"type": kind, key: [int(number) for number in match.groups()], "normalized": 1000}
    last = parts[-1] if parts else {}
    if last.get("type") == kind:
        first = last[key]
        last[key] = [*(first if isinstance(first[0], list) else [first]), shape[key]]
    elif last.get("type") == "ref" and (len(parts) == 1 or parts[-2].get("label") != last["text"]):
        parts[-1] = {**shape, "label": last["text"]}
    else:  # also after the same phrase as just before: shapes of one label side by side share one <ref> when written
        parts.append(shape)
