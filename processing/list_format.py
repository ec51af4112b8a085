"""Qwen-VL's list format, elements of a message <-> the text that the original model reads; equal to the original's.

An element is one of

    {"image": "a.png"}                                   Picture 1: <img>a.png</img>, then a line break
    {"text": "Where is it?"}                             Where is it?
    {"box": [[1, 2, 3, 4], [5, 6, 7, 8]], "ref": "dog"}  <ref>dog</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>

with boxes xyxy in integers of [0, 1000) and an optional "ref". To go on to a model, `list_format_parts` makes the
parts of a message, which carry the pictures themselves.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from .special_tokens import (
    BOX_END,
    BOX_START,
    EXTRAS,
    IM_END,
    IM_START,
    IMG_END,
    IMG_START,
    IMGPAD,
    QUAD_END,
    QUAD_START,
    REF_END,
    REF_START,
)

_TAGS = {
    "image": (IMG_START, IMG_END),
    "ref": (REF_START, REF_END),
    "box": (BOX_START, BOX_END),
    "quad": (QUAD_START, QUAD_END),
}
_KIND_OF_START = {start: kind for kind, (start, _) in _TAGS.items()}
_STARTS = re.compile("|".join(map(re.escape, _KIND_OF_START)))
_CONTROL = re.compile("|".join(map(re.escape, (IM_START, IM_END, *EXTRAS))))


def from_list_format(elements: Sequence[dict[str, Any]]) -> str:
    """The text of a message. Pictures are numbered from 1; coordinates lose their decimals.

    Raises:
        ValueError: an element holds neither image, text nor box.

    Example:
        >>> from_list_format([{"image": "a.png"}, {"ref": "dog", "box": [[1, 2, 3.9, 4]]}])
        'Picture 1: <img>a.png</img>\\n<ref>dog</ref><box>(1,2),(3,4)</box>'
    """
    texts = []
    num_pictures = 0
    for index, element in enumerate(elements):
        if "image" in element:
            num_pictures += 1
            texts.append(f"Picture {num_pictures}: {IMG_START}{element['image']}{IMG_END}\n")
        elif "text" in element:
            texts.append(element["text"])
        elif "box" in element:
            if "ref" in element:
                texts.append(f"{REF_START}{element['ref']}{REF_END}")
            for x1, y1, x2, y2 in element["box"]:
                texts.append(f"{BOX_START}({int(x1)},{int(y1)}),({int(x2)},{int(y2)}){BOX_END}")
        else:
            raise ValueError(f"Element {index} is {element!r}: it needs one of 'image', 'text', 'box'")
    return "".join(texts)


def to_list_format(text: str) -> list[dict[str, str]]:
    """The pieces of a text: `{"text" | "image" | "ref" | "box" | "quad": what is inside}`, in their order.

    A picture's `<imgpad>` are left out: of a decoded prompt, where no path is known, it is `{"image": ""}`.

    Raises:
        ValueError: a tag is not closed, or the text holds ChatML or reserved tokens.

    Example:
        >>> to_list_format("A <ref>dog</ref><box>(1,2),(3,4)</box>")
        [{'text': 'A '}, {'ref': 'dog'}, {'box': '(1,2),(3,4)'}]
    """
    text = unicodedata.normalize("NFC", text)
    if match := _CONTROL.search(text):
        raise ValueError(f"The text holds {match.group()} at character {match.start()}: take one message's text only")
    elements: list[dict[str, str]] = []
    position = 0
    while match := _STARTS.search(text, position):
        if match.start() > position:
            elements.append({"text": text[position : match.start()]})
        kind = _KIND_OF_START[match.group()]
        end_tag = _TAGS[kind][1]
        end = text.find(end_tag, match.end())
        if end < 0:
            raise ValueError(
                f"{match.group()} at character {match.start()} is never closed by {end_tag}: {text[:200]!r}"
            )
        inside = text[match.end() : end]
        elements.append({kind: inside.replace(IMGPAD, "") if kind == "image" else inside})
        position = end + len(end_tag)
    if position < len(text):
        elements.append({"text": text[position:]})
    return elements


def boxes_with_ref(text: str) -> list[dict[str, Any]]:
    """Every box of an answer as four integers, with the phrase right before it, if there is one, as "ref".

    Of several boxes behind one phrase only the first carries it, as in the original. `answer_parsing.parse_shapes`
    reads more (quads, all boxes of a phrase) and reports what is malformed.

    Raises:
        ValueError: a box that is not four integers.

    Example:
        >>> boxes_with_ref("<ref> dog</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>")
        [{'box': (1, 2, 3, 4), 'ref': 'dog'}, {'box': (5, 6, 7, 8)}]
    """
    elements = to_list_format(text)
    boxes: list[dict[str, Any]] = []
    for before, element in zip([{}, *elements], elements, strict=False):
        if "box" not in element:
            continue
        numbers = element["box"].replace("(", "").replace(")", "").split(",")
        if len(numbers) != 4 or not all(re.fullmatch(r"\s*-?\d+\s*", number) for number in numbers):
            raise ValueError(f"{BOX_START}{element['box']}{BOX_END} is not four integers (x1,y1),(x2,y2)")
        box: dict[str, Any] = {"box": tuple(int(number) for number in numbers)}
        if "ref" in before:
            box["ref"] = before["ref"].strip()
        boxes.append(box)
    return boxes


def list_format_parts(elements: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of a message for `QwenVLProcessor.apply_chat_template`, which numbers the pictures itself.

    An image may be whatever an image part takes (path, URL, PIL picture).

    Raises:
        ValueError: an element holds neither image, text nor box.

    Example:
        >>> list_format_parts([{"image": "a.png"}, {"text": "This is "}, {"box": [[1, 2, 3, 4]], "ref": "a dog"}])
        [{'type': 'image', 'image': 'a.png'}, {'type': 'text', 'text': 'This is '},
         {'type': 'box', 'bbox': [[1, 2, 3, 4]], 'label': 'a dog', 'normalized': 1000}]
    """
    parts: list[dict[str, Any]] = []
    for index, element in enumerate(elements):
        if "image" in element:
            parts.append({"type": "image", "image": element["image"]})
        elif "text" in element:
            parts.append({"type": "text", "text": element["text"]})
        elif "box" in element:
            boxes = [list(box) for box in element["box"]]
            parts.append({"type": "box", "bbox": boxes, "label": element.get("ref"), "normalized": 1000})
        else:
            raise ValueError(f"Element {index} is {element!r}: it needs one of 'image', 'text', 'box'")
    return parts
