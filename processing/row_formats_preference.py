"""Rows for preference training (DPO, ...) and for training with rewards (GRPO, RLOO, PPO)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .example import Message
from .parts import shorten
from .row_pictures import PictureRoot, pictures_of_row, videos_of_row, with_pictures

Fields = dict[str, Any]
Row = Mapping[str, Any]


def read_preference(row: Row, root: PictureRoot) -> Fields:
    """{"images": ["a.png"], "prompt": "Who?", "chosen": "Ada.", "rejected": "Bob."}; texts or lists of messages."""
    return {
        "kind": "preference",
        "messages": _prompt(row, "prompt", root),
        "chosen": with_pictures(
            _as_messages(row["chosen"], "chosen", "assistant"), [], root, placeholders_required=False
        ),
        "rejected": with_pictures(
            _as_messages(row["rejected"], "rejected", "assistant"), [], root, placeholders_required=False
        ),
    }


def read_reward(row: Row, root: PictureRoot) -> Fields:
    """{"image": "a.png", "problem": "1+1?", "solution": "2", ...}: the other columns go to the reward functions."""
    given = [key for key in ("problem", "prompt") if row.get(key) is not None]
    if len(given) != 1:
        raise ValueError("the row has both 'problem' and 'prompt': keep one of them")
    return {
        "kind": "reward",
        "messages": _prompt(row, given[0], root),
        "solution": row["solution"],
    }


def _prompt(row: Row, name: str, root: PictureRoot) -> list[Message]:
    pictures, videos = pictures_of_row(row, root), videos_of_row(row, root)
    messages = _as_messages(row[name], name, "user")
    return with_pictures(messages, pictures, root, placeholders_required=False, videos=videos)


def _as_messages(value: Any, name: str, role: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list) and value and all(isinstance(message, Mapping) for message in value):
        return [dict(message) for message in value]
    raise ValueError(f"{name} must be text or a list of messages, it is {shorten(value)}")
