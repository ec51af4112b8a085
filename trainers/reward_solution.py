"""What rewards compare: the answer inside a completion, and the truth in a row's `solution`.

TRL hands a reward function one list per column, an entry per completion. A completion is a list with one message; our
trainers leave the tags of boxes in its text and take the end token off.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from processing.coordinates import Box
from processing.document_boxes import document_from_model
from processing.grounding_text import ParsedAnswer

Completion = Sequence[Mapping[str, Any]]
# `reward(prompts=, completions=, completion_ids=, <columns>=, trainer_state=, log_extra=, log_metric=)` as TRL calls
# it; one number per completion, or None where the reward does not apply.
RewardFunction = Callable[..., list[float | None]]
_ANSWER = re.compile(r"<answer>(.*)</answer>", re.DOTALL)
_KEYS = ("text", "boxes", "html", "image_index")


def text_of(completion: Completion) -> str:
    """The text of a completion."""
    return completion[0]["content"]


def prompt_text(prompt: Sequence[Mapping[str, Any]]) -> str:
    """The texts of a prompt's messages, a line each."""
    lines = []
    for message in prompt:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
        lines.append("".join(parts))
    return "\n".join(lines)


def answer_of(text: str) -> str:
    """What a completion answers: the inside of <answer>, or what follows </think>, or all of it.

    Everything between the first <answer> and the last </answer> counts, so a second answer makes the first one wrong.

    Example:
        >>> answer_of("<think>2 or 3?</think> <answer> 3 </answer>"), answer_of("<think>hm</think>3"), answer_of("3")
        ('3', '3', '3')
    """
    match = _ANSWER.search(text)
    return (match[1] if match else text.rpartition("</think>")[2]).strip()


@dataclass(frozen=True)
class AnswerReader:
    """Reads answers in the convention of `processor`; `image_sizes` are (height, width) of a row's original pictures.

    Our trainers give reward functions one per completion, in the column `reader`.

    Example:
        >>> AnswerReader(processor, ((600, 800),)).shapes("<box>(100,100),(200,200)</box>").shapes
        (Box(x1=80.0, y1=60.0, x2=160.0, y2=120.0, label=None, image_index=0),)
    """

    processor: Any
    image_sizes: Sequence[tuple[int, int]]

    def shapes(self, text: str, image_index: int | None = None) -> ParsedAnswer:
        """The shapes of an answer in original pixels; see `GroundingMixin.parse_answer`."""
        return self.processor.parse_answer(text, self.image_sizes, image_index=image_index)

    def page(self, html: str, image_index: int | None = None) -> str:
        """A page with its boxes in original pixels.

        Raises ValueError for a box that cannot be read or lies outside its picture.
        """
        frames = self.processor.frames(self.image_sizes)
        if not frames:
            raise ValueError("the row has no picture that a page could lie in")
        return document_from_model(html, frames[-1 if image_index is None else image_index], self.processor.convention)


@dataclass(frozen=True)
class Solution:
    """What the row says is right; None for what it does not say.

    texts: accepted answers. boxes: in pixels of the original pictures. html: a page as QwenVL HTML, boxes likewise.
    image_index: the picture that the answer is about; None is the last one.
    """

    texts: tuple[str, ...] | None = None
    boxes: tuple[Box, ...] | None = None
    html: str | None = None
    image_index: int | None = None


def read_solution(value: Any) -> Solution:
    """A row's `solution`.

    | in the row | means |
    |---|---|
    | `"cat"`, `3`, `["cat", "kitty"]` | accepted answers |
    | `[x1, y1, x2, y2]`, `[[x1, y1, x2, y2], ...]` | boxes in original pixels |
    | `{"text": .., "boxes": .., "html": .., "image_index": ..}` | several of them, or boxes in another picture |

    Raises ValueError for anything else.

    Example:
        >>> read_solution([1, 2, 30, 50]).boxes
        (Box(x1=1, y1=2, x2=30, y2=50, label=None, image_index=0),)
        >>> read_solution(["cat", "kitty"]).texts
        ('cat', 'kitty')
    """
    if isinstance(value, Mapping):
        if unknown := sorted(set(value) - set(_KEYS)):
            raise ValueError(f"a solution has the keys {', '.join(_KEYS)}; this one also has {', '.join(unknown)}")
        index = value.get("image_index")
        return Solution(
            texts=None if value.get("text") is None else _texts(value["text"]),
            boxes=None if value.get("boxes") is None else _boxes(value["boxes"], index),
            html=value.get("html"),
            image_index=index,
        )
    if isinstance(value, list | tuple) and value and not all(isinstance(entry, str) for entry in value):
        return Solution(boxes=_boxes(value, None))
    return Solution(texts=_texts(value))


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    if not values or not all(isinstance(entry, str | int | float) for entry in values):
        raise ValueError(f"an accepted answer must be text or a number, or a list of them, it is {value!r}")
    return tuple(str(entry) for entry in values)


def _boxes(value: Any, image_index: int | None) -> tuple[Box, ...]:
    boxes = [value] if value and isinstance(value[0], int | float) else list(value)
    if not all(isinstance(box, list | tuple) and len(box) == 4 for box in boxes):
        raise ValueError(f"boxes must be [x1, y1, x2, y2] or a list of such, they are {value!r}")
    # A row of several pictures whose solution names none is about the last one, as parse_answer assumes; boxes of one
    # picture are then compared with each other whatever its number.
    return tuple(Box(x1, y1, x2, y2, image_index=image_index or 0) for x1, y1, x2, y2 in boxes)
