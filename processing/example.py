"""Example: one training example as everything after the reader sees it, checked when it is made.

In: a conversation of typed parts (`parts.py`). Out: a frozen dataclass that later steps need not check again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .document_parsing import check_markup
from .parts import Part, check_part, is_number, picture_of, refuse_unknown_keys, shorten

Message = dict[str, Any]
Kind = Literal["sft", "preference", "reward"]
Style = Literal["chat", "plain"]

ROLES = ("system", "user", "assistant")
COMMON_KEYS = ("id", "task", "weight")  # columns that rows of every format may have
MESSAGE_KEYS = ("role", "content", "weight", "train")


@dataclass(frozen=True)
class Source:
    """Where an example came from.

    `line` counts from 1. In a text file it is the line where the row starts; in parquet and in datasets, which have no
    lines, it is the number of the row.

    Example:
        >>> Source("train.jsonl", 17, "vg_993").where
        'train.jsonl:17 (id=vg_993)'
    """

    file: str = "<memory>"
    line: int | None = None
    id: str | None = None

    @property
    def where(self) -> str:
        line = "" if self.line is None else f":{self.line}"
        name = "" if self.id is None else f" (id={self.id})"
        return f"{self.file}{line}{name}"


class RowError(ValueError):
    """A row that cannot become an example: `source` says which one, `reason` why."""

    def __init__(self, source: Source, reason: str):
        super().__init__(f"{source.where}: {reason}")
        self.source, self.reason = source, reason

    def __reduce__(self) -> tuple[Any, ...]:  # ValueError would be rebuilt from the message alone, which has no source
        return RowError, (self.source, self.reason)


@dataclass(frozen=True)
class Example:
    """One example. What `messages` holds depends on `kind`.

    | kind         | messages                                    | also                                             |
    |--------------|---------------------------------------------|--------------------------------------------------|
    | "sft"        | the whole conversation, ends with an answer |                                                  |
    | "preference" | the prompt, ends with the user              | chosen, rejected: lists of assistant turns       |
    | "reward"     | the prompt, ends with the user              | solution: what the reward functions compare with |

    A message is `{"role": "system" | "user" | "assistant", "content": str | list[part]}` and may carry `"weight"`
    (loss weight, a number >= 0) and `"train"` (bool). The parts are described in `parts.py`.

    style: "chat" is rendered with the model's chat template; "plain" is prompt and answer one after the other without
        roles, as in stages 1 and 2 (Qwen-VL paper, appendix B.1): exactly one user and one assistant message.
    weight: loss weight of the whole example, > 0.
    columns: columns of the row that no format reads; reward functions receive them by name.
    left_out: what the reader left out of this row on purpose, counted by reason (crowd annotations of COCO, ...).

    Raises ValueError for anything that is not so, with the nearest name for unknown keys.

    Example:
        >>> Example([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]).num_pictures
        0
    """

    messages: Sequence[Message]
    kind: Kind = "sft"
    style: Style = "chat"
    chosen: Sequence[Message] | None = None
    rejected: Sequence[Message] | None = None
    solution: Any = None
    task: str | None = None
    weight: float = 1.0
    source: Source = Source()
    columns: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is {self.kind!r}, it must be one of {', '.join(get_args(Kind))}")
        if self.style not in get_args(Style):
            raise ValueError(f"style is {self.style!r}, it must be one of {', '.join(get_args(Style))}")
        if self.task is not None and (not isinstance(self.task, str) or not self.task):
            raise ValueError(f"task is {shorten(self.task)}, it must be text, or None")
        if not is_number(self.weight) or self.weight <= 0:
            raise ValueError(f"weight is {self.weight!r}, it must be a number > 0 (leave the row out to weigh it 0)")
        given = {name: getattr(self, name) is not None for name in ("chosen", "rejected", "solution")}
        wanted = {"sft": set(), "preference": {"chosen", "rejected"}, "reward": {"solution"}}[self.kind]
        for name, is_given in given.items():
            if is_given != (name in wanted):
                raise ValueError(f"kind {self.kind!r} {'needs' if name in wanted else 'has no'} {name!r}")
        self._check_messages()

    def _check_messages(self) -> None:
        num_pictures = check_messages(self.messages, "messages")
        last = self.messages[-1]["role"]
        if self.kind == "sft" and last != "assistant":
            raise ValueError(f"the conversation ends with a {last} turn, so there is no answer to train on")
        if self.kind == "sft" and not any(is_trained(message) for message in self.messages):
            raise ValueError("no assistant turn is trained: each has train false or weight 0")
        if self.kind != "sft" and last != "user":
            raise ValueError(f"a {self.kind} prompt must end with a user turn, this one ends with a {last} turn")
        for name, answer in (("chosen", self.chosen), ("rejected", self.rejected)):
            if answer is not None:
                check_messages(answer, name, num_pictures)
                if wrong := [message["role"] for message in answer if message["role"] != "assistant"]:
                    raise ValueError(f"{name} may hold assistant turns only, it holds a {wrong[0]} turn")
                if num_answer_pictures := sum(count_pictures(message) for message in answer):
                    raise ValueError(f"{name} holds {num_answer_pictures} picture(s): pictures belong to the prompt")
                if any(videos_in(message) for message in answer):
                    raise ValueError(f"{name} holds a video: videos belong to the prompt")
        if self.kind == "preference" and self.chosen == self.rejected:
            raise ValueError("chosen and rejected are equal, so there is nothing to prefer")
        if self.style == "plain" and [message["role"] for message in self.messages] != ["user", "assistant"]:
            roles = ", ".join(message["role"] for message in self.messages)
            raise ValueError(f"style 'plain' is one user turn and one assistant turn, this has: {roles}")

    @property
    def pictures(self) -> list[Any]:
        """What the image parts hold (path, bytes, PIL picture, ...), in order of appearance."""
        parts = [part for turn in self.messages if not isinstance(turn["content"], str) for part in turn["content"]]
        return [picture_of(part) for part in parts if part["type"] == "image"]

    @property
    def num_pictures(self) -> int:
        return len(self.pictures)

    @property
    def videos(self) -> list[Part]:
        """The video parts, in order of appearance."""
        return [part for turn in self.messages for part in videos_in(turn)]


def check_messages(messages: Sequence[Message], name: str, num_pictures_before: int = 0) -> int:
    """Refuses (ValueError) malformed messages; returns the number of pictures up to and with them."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"{name} must be a list with at least one message, it is {shorten(messages)}")
    num_pictures = num_pictures_before
    total = num_pictures + sum(count_pictures(message) for message in messages)
    for number, message in enumerate(messages):
        where = f"{name}[{number}]"
        if not isinstance(message, dict):
            raise ValueError(f"{where} must be a dictionary with role and content, it is {shorten(message)}")
        refuse_unknown_keys(message, MESSAGE_KEYS, where)
        if message.get("role") not in ROLES:
            raise ValueError(f"{where} has role {message.get('role')!r}, it must be one of {', '.join(ROLES)}")
        if message["role"] == "system" and number > 0:
            raise ValueError(f"{where} is a system turn, which only the first message may be")
        if not is_number(message.get("weight", 1.0)) or message.get("weight", 1.0) < 0:
            raise ValueError(f"{where} has weight {message['weight']!r}, it must be a number >= 0")
        if not isinstance(message.get("train", True), bool):
            raise ValueError(f"{where} has train {message['train']!r}, it must be true or false")
        content = message.get("content")
        if isinstance(content, str):
            continue
        if not isinstance(content, Sequence) or isinstance(content, bytes):
            raise ValueError(f"{where} has content {shorten(content)}, it must be text or a list of parts")
        for index, part in enumerate(content):
            check_part(part, f"{where} part {index}", num_pictures, total)
            if part["type"] == "document":
                check_markup(part["html"], f"{where} part {index} (type 'document')")
            num_pictures += part["type"] == "image"
    return num_pictures


def is_trained(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("train", True) and message.get("weight", 1.0) > 0


def videos_in(message: Any) -> list[Part]:
    """The video parts of a message."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list | tuple):
        return []
    return [part for part in content if isinstance(part, dict) and part.get("type") == "video"]


def count_pictures(message: Any) -> int:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list | tuple):
        return 0
    return sum(1 for part in content if isinstance(part, dict) and part.get("type") == "image")
