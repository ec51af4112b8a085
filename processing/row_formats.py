"""The shapes a row may have, how each is recognised, and the step from a row to an Example.

A format is one entry in ROW_FORMATS and one function from a row (a dictionary) to the fields of an Example. To add
one, write the function and the entry; `docs/data.md` shows an example row of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .example import COMMON_KEYS, Example, RowError, Source
from .parts import shorten
from .row_formats_conversations import (
    fits_llava,
    fits_qwenvl,
    read_llava,
    read_messages,
    read_prefix_suffix,
    read_qwenvl,
)
from .row_formats_detection import read_coco, read_refcoco, rows_of_refcoco
from .row_formats_preference import read_preference, read_reward
from .row_formats_tasks import FIELDS, fits_task, read_task
from .row_pictures import PictureRoot

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RowFormat:
    """One shape of row.

    needs: keys that must all be there for the format to be recognised; "a|b" means one of them.
    may: keys that the format also reads.
    read: from the row and the folder of its pictures to the fields of an Example.
    split: cuts a row that holds several examples into one row each.
    fits: a further condition for recognition, where two formats have the same keys; `note` says it in words.
    """

    needs: tuple[str, ...]
    may: tuple[str, ...]
    read: Callable[[Row, PictureRoot], dict[str, Any]]
    fits: Callable[[Row], bool] = lambda row: True
    note: str = ""
    split: Callable[[Row], list[Row]] = lambda row: [row]

    @property
    def keys(self) -> tuple[str, ...]:
        return (*(key for need in self.needs for key in need.split("|")), *self.may)

    def recognises(self, row: Row) -> bool:
        present = {key for key, value in row.items() if value is not None}
        return all(present & set(need.split("|")) for need in self.needs) and self.fits(row)


ROW_FORMATS: dict[str, RowFormat] = {
    "qwenvl": RowFormat(("conversations",), (), read_qwenvl, fits_qwenvl, "from user and assistant"),
    "llava": RowFormat(
        ("conversations",),
        ("image", "images", "video", "videos", "system"),
        read_llava,
        fits_llava,
        "from human and gpt",
    ),
    "messages": RowFormat(("messages",), ("image", "images", "video", "videos"), read_messages),
    "prefix_suffix": RowFormat(("prefix", "suffix"), ("image", "images", "video", "videos"), read_prefix_suffix),
    "preference": RowFormat(("prompt", "chosen", "rejected"), ("image", "images", "video", "videos"), read_preference),
    "reward": RowFormat(("problem|prompt", "solution"), ("image", "images", "video", "videos"), read_reward),
    "coco": RowFormat(("image", "annotations", "categories"), ("question",), read_coco),
    "refcoco": RowFormat(
        ("image", "bbox", "sent|sentence|sentences"),
        ("bbox_format", "width", "height", "question"),
        read_refcoco,
        split=rows_of_refcoco,
    ),
    "task": RowFormat(("task",), FIELDS, read_task, fits_task, "with the fields of the task"),
}


def describe_formats() -> str:
    """The formats and the keys that each needs, one a line, for messages."""
    lines = []
    for name, entry in ROW_FORMATS.items():
        lines.append(f"  {name}: {', '.join(entry.needs)}{f' ({entry.note})' if entry.note else ''}")
    return "\n".join(lines)


def recognise(row: Row) -> str:
    """Name of the one format whose keys the row has; ValueError where none or several fit."""
    fitting = [name for name, entry in ROW_FORMATS.items() if entry.recognises(row)]
    if len(fitting) == 1:
        return fitting[0]
    found = f"fits {' and '.join(fitting)}" if fitting else "fits no format"
    raise ValueError(
        f"the row has the keys {', '.join(map(str, row)) or 'none'} and {found}: name one with format=, or rename its "
        f"columns. Formats and the keys they need:\n{describe_formats()}"
    )


def check_format_name(name: str) -> None:
    if name not in ROW_FORMATS:
        nearest = get_close_matches(name, ROW_FORMATS, n=1)
        hint = f", did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(ROW_FORMATS)}"
        raise ValueError(f"unknown row format {name!r}{hint}")


def examples_from_row(
    row: Row, *, format: str | None = None, root: str | Path | None = None, source: Source | None = None
) -> list[Example]:
    """Makes Examples of one row: one, unless the format says that a row may hold several (RefCOCO's sentences).

    Args:
        format: a key of ROW_FORMATS; recognised from the row's keys where None.
        root: folder that relative picture paths start from; they are left as written where None.
        source: where the row came from. The row's own "id" is added to it.

    Raises:
        RowError: the row is malformed; its message starts with file, line and id.

    Example:
        >>> row = {"id": "7", "image": "a.png", "prefix": "Read the text.", "suffix": "STOP"}
        >>> examples_from_row(row)[0].messages[1]
        {'role': 'assistant', 'content': 'STOP'}
    """
    source = source or Source()
    if format is not None:
        check_format_name(format)
    if not isinstance(row, Mapping):
        raise RowError(source, f"a row must be a dictionary, this is {shorten(row)}")
    if row.get("id") is not None:
        source = Source(source.file, source.line, str(row["id"]))
    try:
        name = format or recognise(row)
        entry = ROW_FORMATS[name]
        if missing := [need for need in entry.needs if all(row.get(key) is None for key in need.split("|"))]:
            raise ValueError(f"format {name!r} needs {', '.join(missing)}; the row has {', '.join(map(str, row))}")
        _refuse_misspelt_columns(row, entry)
        columns = {key: value for key, value in row.items() if key not in (*entry.keys, *COMMON_KEYS)}
        common = {key: row[key] for key in ("task", "weight") if row.get(key) is not None}
        return [
            Example(**{**entry.read(part, PictureRoot(root)), **common}, columns=columns, source=source)
            for part in entry.split(row)
        ]
    except ValueError as error:
        raise RowError(source, str(error)) from error


def _refuse_misspelt_columns(row: Row, entry: RowFormat) -> None:
    """A column that is nearly one the format reads is a slip of the pen; any other is the user's own and is kept."""
    absent = [key for key in (*entry.keys, *COMMON_KEYS) if key not in row]
    for key in row:
        if key not in entry.keys and key not in COMMON_KEYS:
            nearest = get_close_matches(str(key), absent, n=1, cutoff=0.8)
            if nearest and abs(len(nearest[0]) - len(key)) <= 1:  # question_id is not a misspelt question
                raise ValueError(f"the row has the column {key!r}, did you mean {nearest[0]!r}?")
