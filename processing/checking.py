"""A whole file of rows read as training reads it: what is in it, and every row that training would refuse."""

from __future__ import annotations

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from .coordinates import Box, Frame, refuse_outside
from .document_boxes import map_boxes
from .example import Example, RowError
from .grounding_mixin import shapes_in_pixels
from .parts import SHAPES
from .pictures import ANYTHING, PictureLimits, picture_size
from .raw_rows import RawRow
from .row_formats import recognise
from .rows import RowReader
from .supervision import Supervision
from .videos import open_clip

_BOX_IN_TEXT = re.compile(r"bbox_2d|<box>|<\|box_start\|>|data-bbox\s*=")
BOX_IN_TEXT = "examples with boxes written as text, which do not follow the resize of their picture"


@dataclass
class TaskCounts:
    """What a task's examples are like. lengths: tokens, pictures included; empty without a processor."""

    num_examples: int = 0
    num_pictures: int = 0
    lengths: array = field(default_factory=lambda: array("L"))


@dataclass
class DataReport:
    """What a file holds.

    tasks: by the task of the row, or its kind ("sft", "preference", "reward") where it names none.
    widths, heights: of the pictures, in pixels. notes: what is worth knowing and no error, counted.
    """

    num_rows: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    tasks: dict[str, TaskCounts] = field(default_factory=lambda: defaultdict(TaskCounts))
    widths: array = field(default_factory=lambda: array("L"))
    heights: array = field(default_factory=lambda: array("L"))
    notes: Counter[str] = field(default_factory=Counter)
    problems: list[RowError] = field(default_factory=list)


def check_rows(
    reader: RowReader,
    *,
    processor: Any = None,
    open_pictures: bool = True,
    limits: PictureLimits = ANYTHING,
    on_row: Callable[[RawRow, RowError | None], None] = lambda raw, problem: None,
) -> DataReport:
    """Reads all rows; a row is bad if reading it, opening its pictures, placing its boxes or encoding it fails.

    Args:
        processor: with one, each example is measured in tokens, as `Supervision.measure` does: a preference pair by
            its longer answer, a reward example by its prompt.
        open_pictures: reads the head of each picture for its size; without, boxes are not compared with it.
        limits: which pictures may be read, from where.
        on_row: called for each row with what is wrong with it, or None.

    Raises:
        ValueError: a processor but no pictures: their sizes are needed to count tokens.

    Example:
        >>> from processing.rows import read_rows
        >>> report = check_rows(read_rows([{"prefix": "1+1?", "suffix": "2"}, {"prefix": "?"}]))
        >>> report.num_rows, dict(report.formats), str(report.problems[0])[:33]
        (2, {'prefix_suffix': 1}, '<memory>:2: the row has the keys ')
    """
    if processor is not None and not open_pictures:
        raise ValueError(
            "lengths in tokens need the sizes of the pictures: leave open_pictures on, or the processor out"
        )
    supervision = None if processor is None else Supervision(processor, limits=limits)
    report = DataReport()
    for raw in reader.raw_rows():
        report.num_rows += 1
        try:
            examples = reader.read(raw)
            measured = [_measure(example, supervision, open_pictures, limits) for example in examples]
        except RowError as problem:
            report.problems.append(problem)
            on_row(raw, problem)
            continue
        report.formats[reader.format or recognise(raw.value)] += 1
        for example, (sizes, length) in zip(examples, measured, strict=True):
            _count(report, example, sizes, length)
        on_row(raw, None)
    return report


def _measure(
    example: Example, supervision: Supervision | None, open_pictures: bool, limits: PictureLimits
) -> tuple[list[tuple[int, int]], int | None]:
    """(height, width) of the pictures, and the length in tokens where there is a processor; RowError."""
    if not open_pictures:
        return [], None
    try:
        sizes = [picture_size(picture, limits) for picture in example.pictures]
        for part in example.videos:
            open_clip(part, limits)
        for conversation in conversations_of(example):
            _check_places(conversation, sizes)
    except ValueError as error:
        raise RowError(example.source, str(error)) from error
    if supervision is None:
        return sizes, None
    lengths = [supervision.measure(conversation) for conversation in conversations_of(example)]
    return sizes, max(length for length in lengths if length is not None)


def conversations_of(example: Example) -> list[Example]:
    """The conversations that training makes of an example: itself; prompt with each answer; prompt with none yet."""
    if example.kind == "sft":
        return [example]
    empty = [{"role": "assistant", "content": ""}]
    answers = [example.chosen, example.rejected] if example.kind == "preference" else [empty]
    return [
        replace(
            example,
            kind="sft",
            messages=[*example.messages, *(answer or ())],
            chosen=None,
            rejected=None,
            solution=None,
        )
        for answer in answers
    ]


def _check_places(example: Example, sizes: list[tuple[int, int]]) -> None:
    """ValueError for a box, quad, point or document that leaves its picture."""
    frames = [Frame(height, width, height, width) for height, width in sizes]
    num_before = 0
    for message in example.messages:
        for part in message["content"] if not isinstance(message["content"], str) else ():
            num_before += part["type"] == "image"
            if part["type"] in SHAPES:
                shapes_in_pixels(part, frames, num_before, "refuse", None)
            elif part["type"] == "document":
                frame = frames[part.get("image_index", num_before - 1)]
                map_boxes(part["html"], partial(_within, frame))


def _within(frame: Frame, box: Box) -> list[float]:
    refuse_outside(box, frame)
    return [box.x1, box.y1, box.x2, box.y2]


def _count(report: DataReport, example: Example, sizes: list[tuple[int, int]], length: int | None) -> None:
    counts = report.tasks[example.task or example.kind]
    counts.num_examples += 1
    counts.num_pictures += example.num_pictures
    if length is not None:
        counts.lengths.append(length)
    for height, width in sizes:
        report.heights.append(height)
        report.widths.append(width)
    report.notes.update({f"left out: {reason}": count for reason, count in example.left_out.items()})
    if any(_BOX_IN_TEXT.search(text) for text in _texts(example)):
        report.notes[BOX_IN_TEXT] += 1


def _texts(example: Example) -> list[str]:
    contents = [turn["content"] for turn in (*example.messages, *(example.chosen or ()), *(example.rejected or ()))]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    return [content for content in contents if isinstance(content, str)] + [
        part["text"] for part in parts if part["type"] == "text"
    ]
