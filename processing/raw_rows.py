"""Rows out of files and datasets, one after the other, each with the place where it starts; nothing is interpreted."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .example import Source
from .row_formats_detection import rows_of_coco

# csv's own limit of 131,072 characters a cell is less than one page of a document.
_CSV_CELL_LIMIT = 1 << 27
# Columns that are lists or numbers in the other types of file. In csv they are written as JSON.
_JSON_IN_CSV = ("conversations", "messages", "images", "sentences", "bbox", "width", "height", "weight")
_HUB_NAME = re.compile(r"^[\w-][\w.-]*(/[\w-][\w.-]*)?$")
_BLANK, _BETWEEN_ROWS = re.compile(r"\s*"), re.compile(r"[\s,]*")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of other bytes
_ARROW_BATCH = 64  # rows at a time: rows may hold their pictures


@dataclass(frozen=True)
class RawRow:
    """A row as it stands in the file: its value, or the error that reading it gave; in jsonl also its own text."""

    source: Source
    value: Any = None
    error: str | None = None
    text: str | None = None


def raw_rows(rows: Any, *, split: str = "train", streaming: bool = True) -> Iterator[RawRow]:
    """The rows of a file, a dataset or an iterable; see `rows.read_rows`."""
    check_place(rows)
    if isinstance(rows, str | Path):
        path = Path(rows)
        if path.is_file():
            return READERS[path.suffix](path)
        if path.is_dir():
            from datasets import load_from_disk

            return _dataset_rows(load_from_disk(str(path)), str(path), split)
        from datasets import load_dataset

        return _dataset_rows(load_dataset(str(rows), split=split, streaming=streaming), str(rows), split)
    if isinstance(rows, list | tuple):
        return _rows_in_memory(rows)
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    if isinstance(rows, Dataset | IterableDataset | DatasetDict | IterableDatasetDict):
        return _dataset_rows(rows, "<dataset>", split)
    if isinstance(rows, Iterable) and not isinstance(rows, Mapping):
        return _rows_in_memory(rows)
    raise ValueError(f"rows must be a file, a dataset or an iterable of dictionaries, this is a {type(rows).__name__}")


def check_place(rows: Any) -> None:
    """Refuses a file that is not there (FileNotFoundError) or of no known type (ValueError), without opening it."""
    if isinstance(rows, str | Path):
        path = Path(rows)
        if path.is_file():
            if path.suffix not in READERS:
                raise ValueError(f"{path} is of no known type: a file must end in {', '.join(READERS)}")
        elif not path.is_dir() and (path.suffix in READERS or not _HUB_NAME.match(str(rows))):
            raise FileNotFoundError(f"there is no file {path}")


def count_rows(rows: Any) -> int | None:
    """How many rows a file has, where that is quick to know; blank lines of jsonl are counted too. None otherwise."""
    path = Path(rows) if isinstance(rows, str | Path) else None
    if path is None or not path.is_file():
        return None
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(path).num_rows
    if path.suffix != ".jsonl":
        return None
    with path.open("rb") as file:
        return sum(1 for _ in file)


def folder_of(rows: Any) -> Path | None:
    """The folder of the file `rows`, None for anything else."""
    return Path(rows).parent if isinstance(rows, str | Path) and Path(rows).is_file() else None


def _rows_in_memory(rows: Iterable[Any]) -> Iterator[RawRow]:
    for number, row in enumerate(rows, start=1):
        yield RawRow(Source(line=number), row)


def _jsonl_rows(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            source = Source(str(path), number)
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                # surrogateescape keeps every byte, so that the line can be written out again as it was
                yield RawRow(
                    source, error=f"not UTF-8: {error}", text=line.decode("utf-8", "surrogateescape").rstrip("\r\n")
                )
                continue
            if not text.strip():
                continue
            try:
                yield RawRow(source, json.loads(text), text=text)
            except json.JSONDecodeError as error:
                yield RawRow(source, error=f"not JSON: {error.msg} at column {error.colno}", text=text)


def _json_rows(path: Path) -> Iterator[RawRow]:
    """A list of rows, a COCO file, or rows one after the other (jsonl that is called json). The file is read whole."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        whole = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
        yield RawRow(Source(str(path)), error=f"the file is not UTF-8: {error}", text=whole)
        return
    decoder = json.JSONDecoder()
    position, line = _skip(text, 0, 1, _BLANK)
    is_list = text[position : position + 1] == "["
    if is_list:
        position, line = _skip(text, position + 1, line, _BLANK)
    while position < len(text) and not (is_list and text[position] == "]"):
        source = Source(str(path), line)
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            reason = f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}; nothing after it was read"
            yield RawRow(source, error=reason, text=text[position:])
            return
        if not is_list and isinstance(value, dict) and "images" in value and "annotations" in value:
            yield from _coco_rows(path, value)
        else:
            yield RawRow(source, value)
        line += text.count("\n", position, end)
        position, line = _skip(text, end, line, _BETWEEN_ROWS)
    if is_list and position >= len(text):
        yield RawRow(Source(str(path), line), error="not JSON: the list has no closing bracket", text="")


def _skip(text: str, position: int, line: int, pattern: re.Pattern[str]) -> tuple[int, int]:
    """The position after `pattern`, and its line."""
    match = pattern.match(text, position)
    assert match is not None, "both patterns match the empty string"
    return match.end(), line + match.group().count("\n")


def _coco_rows(path: Path, document: Mapping[str, Any]) -> Iterator[RawRow]:
    source = Source(str(path))
    try:
        for row in rows_of_coco(document):
            yield RawRow(source, row)
    except ValueError as error:
        yield RawRow(source, error=str(error))


def _csv_rows(path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(max(csv.field_size_limit(), _CSV_CELL_LIMIT))
    with path.open(encoding="utf-8-sig", newline="", errors="surrogateescape") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, None)
        if header is None:
            return
        while True:
            source = Source(str(path), reader.line_num + 1)  # a quoted cell may hold line breaks: count before reading
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield RawRow(source, error=f"not csv: {error}")
                continue
            if not cells:
                continue
            row = dict(zip(header, cells, strict=False))
            if len(cells) != len(header):
                reason = f"the row has {len(cells)} cell(s) but the header has {len(header)}"
                yield RawRow(source, row, error=reason)
                continue
            if any(_NOT_UTF8.search(cell) for cell in cells):
                yield RawRow(source, row, error="not UTF-8")
                continue
            try:
                yield RawRow(source, {key: _csv_value(key, cell) for key, cell in row.items()})
            except json.JSONDecodeError as error:
                yield RawRow(source, row, error=f"a cell that must hold JSON does not: {error}")


def _csv_value(column: str, cell: str) -> Any:
    if cell == "":
        return None
    is_path = column == "images" and not cell.startswith("[")
    return json.loads(cell) if column in _JSON_IN_CSV and not is_path else cell


def _parquet_rows(path: Path) -> Iterator[RawRow]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from _arrow_rows(file.iter_batches(batch_size=_ARROW_BATCH), str(path))


def _dataset_rows(dataset: Any, name: str, split: str) -> Iterator[RawRow]:
    from datasets import Dataset, DatasetDict, IterableDatasetDict

    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        if split not in dataset:
            raise ValueError(f"{name} has no split {split!r}; it has {', '.join(map(str, dataset))}")
        dataset = dataset[split]
    # Pictures stay the bytes or paths that they are: one that is broken cannot stop the reading.
    if isinstance(dataset, Dataset):
        return _arrow_rows(dataset.with_format("arrow").iter(batch_size=_ARROW_BATCH), name)
    stream = dataset if dataset.features is None else dataset.decode(False)
    return (RawRow(Source(name, number), row) for number, row in enumerate(stream, start=1))


def _arrow_rows(tables: Iterable[Any], name: str) -> Iterator[RawRow]:
    number = 0
    for table in tables:
        for row in table.to_pylist():
            number += 1
            yield RawRow(Source(name, number), row)


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
