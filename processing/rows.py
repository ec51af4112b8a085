"""Files and datasets of rows, read lazily into Examples; what cannot be read is refused with its file, line and id.

`raw_rows.py` takes the rows out of the file, `row_formats.py` makes Examples of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .example import Example, RowError, Source
from .raw_rows import RawRow, check_place, folder_of, raw_rows
from .row_formats import check_format_name, examples_from_row

__all__ = ["Example", "RawRow", "RowError", "RowReader", "Source", "read_rows"]


@dataclass
class RowReader:
    """The Examples of a file or a dataset, in order. Iterating reads; iterating again reads again.

    problems: with on_error="collect", the rows that the latest iteration has refused so far.
    """

    rows: Any
    format: str | None = None
    root: str | Path | None = None
    on_error: Literal["raise", "collect"] = "raise"
    split: str = "train"
    streaming: bool = True
    problems: list[RowError] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "collect"):
            raise ValueError(f"on_error is {self.on_error!r}, it must be 'raise' or 'collect'")
        if self.format is not None:
            check_format_name(self.format)
        check_place(self.rows)
        if self.root is None:
            self.root = folder_of(self.rows)

    def __iter__(self) -> Iterator[Example]:
        self.problems = []
        for raw in self.raw_rows():
            try:
                examples = self.read(raw)
            except RowError as problem:
                if self.on_error == "raise":
                    raise
                self.problems.append(problem)
                continue
            yield from examples

    def raw_rows(self) -> Iterator[RawRow]:
        """The rows before they are understood; `read` makes Examples of each."""
        return raw_rows(self.rows, split=self.split, streaming=self.streaming)

    def read(self, raw: RawRow) -> list[Example]:
        """The Examples of one row: one, or as many as it has sentences (RefCOCO). Raises RowError."""
        if raw.error is not None:
            raise RowError(raw.source, raw.error)
        return examples_from_row(raw.value, format=self.format, root=self.root, source=raw.source)


def read_rows(
    rows: Any,
    *,
    format: str | None = None,
    root: str | Path | None = None,
    on_error: Literal["raise", "collect"] = "raise",
    split: str = "train",
    streaming: bool = True,
) -> RowReader:
    """Reads rows of any of the shapes in `row_formats.py`.

    Args:
        rows: a .jsonl, .json, .csv or .parquet file; a folder that `datasets` saved; the name of a dataset on the
            Hub; a `datasets.Dataset` or `IterableDataset`; or an iterable of dictionaries. All but .json are read row
            by row.
        format: a key of ROW_FORMATS. Where None, each row is recognised by its keys.
        root: folder that relative picture paths start from. Where None, it is the folder of the file; paths in
            datasets and dictionaries are left as they are.
        on_error: "raise" stops at the first bad row; "collect" goes on and keeps them in `.problems`.
        split, streaming: for the name of a dataset on the Hub.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an option is wrong or the type of file is unknown. RowError, a ValueError, for bad rows.

    Example:
        >>> rows = [{"image": "a.png", "prefix": "Read.", "suffix": "STOP"}, {"image": "b.png", "prefix": "Read."}]
        >>> reader = read_rows(rows, format="prefix_suffix", on_error="collect")
        >>> [example.messages[1]["content"] for example in reader]
        ['STOP']
        >>> print(reader.problems[0])
        <memory>:2: format 'prefix_suffix' needs suffix; the row has image, prefix
    """
    return RowReader(rows, format, root, on_error, split, streaming)
