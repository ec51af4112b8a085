"""Good rows to one file, bad rows with their reason to another; together they are all rows."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from .example import RowError
from .raw_rows import RawRow


class CleanWriter:
    """Separates the rows of `file` into `folder`/NAME.good.* and `folder`/NAME.bad.*.

    Rows of jsonl are written as they stand, byte for byte. Rows of .json and .csv become jsonl; a COCO file becomes
    one row per picture. Rows of parquet stay parquet, and the bad ones get the columns `bad_line` and `bad_reason`.
    Other bad rows are lines `{"line", "id", "reason", "row"}`, with the row as `"text"` where it cannot be read at
    all. Relative picture paths are kept as they are, so they still start at the folder of the original file.

    Raises:
        ValueError: `file` is no file. FileExistsError: an output is there already.

    Use it as a context manager, and call `add` for each row in order.
    """

    def __init__(self, file: str | Path, folder: str | Path):
        self.file = Path(file)
        if not self.file.is_file():
            raise ValueError(f"rows can be separated in a file, {file} is none")
        self.is_parquet = self.file.suffix == ".parquet"
        ending = ".parquet" if self.is_parquet else ".jsonl"
        self.good_path = Path(folder) / f"{self.file.stem}.good{ending}"
        self.bad_path = Path(folder) / f"{self.file.stem}.bad{ending}"
        for path in (self.good_path, self.bad_path):
            if path.exists():
                raise FileExistsError(f"{path} is there already: remove it, or write to another folder")
        self.problems: list[RowError | None] = []  # of parquet, which is separated at the end
        self.outputs: tuple[TextIO, TextIO] | None = None

    def __enter__(self) -> CleanWriter:
        self.good_path.parent.mkdir(parents=True, exist_ok=True)
        if not self.is_parquet:
            # surrogateescape gives back the bytes of lines that are not UTF-8
            self.outputs = (
                self.good_path.open("w", encoding="utf-8", errors="surrogateescape", newline="\n"),
                self.bad_path.open("w", encoding="utf-8", newline="\n"),
            )
        return self

    def add(self, raw: RawRow, problem: RowError | None) -> None:
        if self.outputs is None:
            self.problems.append(problem)
            return
        good, bad = self.outputs
        if problem is None:
            good.write((raw.text if raw.text is not None else json.dumps(raw.value, ensure_ascii=False)) + "\n")
            return
        entry: dict[str, Any] = {"line": problem.source.line, "id": problem.source.id, "reason": problem.reason}
        # ASCII escapes keep the surrogates that stand for bytes outside UTF-8
        entry |= {"text": raw.text} if raw.value is None and raw.text is not None else {"row": raw.value}
        bad.write(json.dumps(entry) + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for output in self.outputs or ():
            output.close()
        if self.is_parquet and error is None:
            self._separate_parquet()

    def _separate_parquet(self) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        problems = iter(self.problems)
        with parquet.ParquetFile(self.file) as file:
            schema = file.schema_arrow
            bad_schema = schema.append(pa.field("bad_line", pa.int64())).append(pa.field("bad_reason", pa.string()))
            with (
                parquet.ParquetWriter(self.good_path, schema) as good,
                parquet.ParquetWriter(self.bad_path, bad_schema) as bad,
            ):
                for batch in file.iter_batches():
                    table = pa.Table.from_batches([batch], schema)
                    found = list(islice(problems, table.num_rows))
                    good.write_table(table.filter(pa.array([problem is None for problem in found])))
                    wrong = [problem for problem in found if problem is not None]
                    rows = table.filter(pa.array([problem is not None for problem in found]))
                    lines = pa.array([problem.source.line for problem in wrong], pa.int64())
                    reasons = pa.array([problem.reason for problem in wrong], pa.string())
                    bad.write_table(rows.append_column("bad_line", lines).append_column("bad_reason", reasons))
