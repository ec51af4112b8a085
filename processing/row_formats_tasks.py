"""Rows of stage 2: a task's name and its fields, as `tasks.py` lists them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .parts import refuse_unknown_keys
from .row_pictures import PictureRoot
from .tasks import TASKS, fields_of

Fields = dict[str, Any]
Row = Mapping[str, Any]
FIELDS = tuple(dict.fromkeys(field for task in TASKS for fields in fields_of(task) for field in fields))


def fits_task(row: Row) -> bool:
    """Whether the row names a task and has what it needs; other formats use "task" as a label of their rows."""
    task = row.get("task")
    return isinstance(task, str) and task in TASKS and all(row.get(key) is not None for key in fields_of(task)[0])


def read_task(row: Row, root: PictureRoot) -> Fields:
    """{"task": "vqa", "image": "a.png", "question": "Who?", "answer": "Ada", "language": "en"}."""
    if not isinstance(row["task"], str) or row["task"] not in TASKS:
        raise ValueError(f"task is {row['task']!r}, it must be one of {', '.join(TASKS)}")
    needed, optional = fields_of(row["task"])
    fields = {key: row[key] for key in FIELDS if row.get(key) is not None}
    refuse_unknown_keys(fields, (*needed, *optional), f"a row of task {row['task']!r}")
    if missing := [key for key in needed if key not in fields]:
        raise ValueError(f"task {row['task']!r} needs {', '.join(missing)}; the row has {', '.join(map(str, row))}")
    if "image" in fields:
        fields["image"] = root(fields["image"])
    example = TASKS[row["task"]](**fields)
    return {"messages": example.messages, "style": example.style}
