"""Rows that hold a conversation: Qwen-VL's own, LLaVA's, Hugging Face messages, and prefix with suffix."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .example import Message
from .parts import SHAPES, Part, shorten
from .row_pictures import PictureRoot, pictures_of_row, videos_of_row, with_pictures
from .tagged_text import parts_from_tags

Fields = dict[str, Any]
Row = Mapping[str, Any]

_LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_QWENVL_ROLES = {"user": "user", "assistant": "assistant"}
_PALIGEMMA_LOCATION = re.compile(r"<loc\d{4}>")
_HTML_BOX = re.compile(r"<\w+[^<>]*\bdata-bbox\s*=", re.IGNORECASE)


def fits_qwenvl(row: Row) -> bool:
    return bool(_speakers(row)) and _speakers(row) <= set(map(repr, _QWENVL_ROLES))


def fits_llava(row: Row) -> bool:
    return bool(_speakers(row)) and _speakers(row) <= set(map(repr, _LLAVA_ROLES))


def _speakers(row: Row) -> set[str]:
    """The speakers as they would be typed: whatever a row holds there can stand in a set."""
    turns = row.get("conversations")
    return (
        {repr(turn.get("from")) for turn in turns if isinstance(turn, Mapping)} if isinstance(turns, list) else set()
    )


def read_qwenvl(row: Row, root: PictureRoot) -> Fields:
    """{"conversations": [{"from": "user", "value": "Picture 1: <img>a.png</img>\\nWho?"}, ...]}.

    The turns are from user and assistant, and every character of a value is kept. A leading assistant turn is dropped,
    as the original finetuning code does; the example counts it in `left_out`.
    """
    turns = _turns(row, _QWENVL_ROLES)
    dropped = bool(turns) and turns[0][0] == "assistant"
    messages: list[Message] = []
    early_shapes: list[Part] = []  # those before the first picture can only mean that picture
    num_pictures = 0
    for role, value in turns[dropped:]:
        parts = parts_from_tags(value, root)
        for part in parts:
            num_pictures += part["type"] == "image"
            if part["type"] in SHAPES and num_pictures == 0:
                early_shapes.append(part)
        messages.append({"role": role, "content": value if all(part["type"] == "text" for part in parts) else parts})
    if num_pictures:
        for part in early_shapes:
            part["image_index"] = 0
    return {"messages": messages, "left_out": {"leading assistant turn": 1} if dropped else {}}


def read_llava(row: Row, root: PictureRoot) -> Fields:
    """{"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWho?"}, {"from": "gpt", ...}]}."""
    messages: list[Message] = [{"role": role, "content": value} for role, value in _turns(row, _LLAVA_ROLES)]
    if row.get("system") is not None:
        messages.insert(0, {"role": "system", "content": row["system"]})
    pictures, videos = pictures_of_row(row, root), videos_of_row(row, root)
    return {"messages": with_pictures(messages, pictures, root, placeholders_required=True, videos=videos)}


def read_messages(row: Row, root: PictureRoot) -> Fields:
    """{"images": ["a.png"], "messages": [{"role": "user", "content": [{"type": "image"}, ...]}, ...]}."""
    pictures = pictures_of_row(row, root)
    videos = videos_of_row(row, root)
    return {"messages": with_pictures(row["messages"], pictures, root, placeholders_required=False, videos=videos)}


def read_prefix_suffix(row: Row, root: PictureRoot) -> Fields:
    """{"image": "page.png", "prefix": "QwenVL HTML", "suffix": "<body>..data-bbox..</body>"}.

    A suffix with a `data-bbox` attribute is a document: its boxes, pixels of the original picture, follow the resize.
    """
    for key in ("prefix", "suffix"):
        if not isinstance(row[key], str):
            raise ValueError(f"{key} must be text, it is {shorten(row[key])}")
    if location := _PALIGEMMA_LOCATION.search(row["suffix"]) or _PALIGEMMA_LOCATION.search(row["prefix"]):
        raise ValueError(
            f"the row writes {location.group()}, a location token of PaliGemma that this family does not know: give "
            f"the boxes as box parts in a messages row"
        )
    is_document = _HTML_BOX.search(row["suffix"]) is not None
    answer = [{"type": "document", "html": row["suffix"]}] if is_document else row["suffix"]
    messages = [{"role": "user", "content": row["prefix"]}, {"role": "assistant", "content": answer}]
    pictures, videos = pictures_of_row(row, root), videos_of_row(row, root)
    return {"messages": with_pictures(messages, pictures, root, placeholders_required=False, videos=videos)}


def _turns(row: Row, roles: dict[str, str]) -> list[tuple[str, str]]:
    """(role, text) of each turn of `conversations`."""
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"conversations must be a list with at least one turn, it is {shorten(turns)}")
    found = []
    for number, turn in enumerate(turns):
        where = f"conversations[{number}]"
        if not isinstance(turn, Mapping) or set(turn) != {"from", "value"}:
            raise ValueError(f"{where} must be {{'from': .., 'value': ..}}, it is {shorten(turn)}")
        if not isinstance(turn["from"], str) or turn["from"] not in roles:
            raise ValueError(f"{where} is from {turn['from']!r}, it must be one of {', '.join(roles)}")
        if not isinstance(turn["value"], str):
            raise ValueError(f"{where} has the value {shorten(turn['value'])}, it must be text")
        found.append((roles[turn["from"]], turn["value"]))
    return found
