"""`qwenvl inspect`: what a model will see of the rows of a file, in the terminal and as a page for the browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from processing.example import RowError


def inspect(
    file: Annotated[
        str, typer.Argument(help="A .jsonl, .json, .csv or .parquet file, a saved dataset, or a name on the Hub.")
    ],
    model: Annotated[Path, typer.Option(help="Folder with the processor of the model to be trained.")],
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show, from the start.")] = 8,
    html: Annotated[Path | None, typer.Option(help="Write a page for the browser, with the pictures.")] = None,
    format: Annotated[str | None, typer.Option(help="Shape of the rows; recognised if not given.")] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder that relative picture paths start from; by default that of the file.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest row in tokens; shows what would be cut.")] = None,
    steps: Annotated[
        str, typer.Option(help="What is done with longer rows, in this order: shrink, trim, then drop or raise.")
    ] = "shrink,trim,drop",
    train_on: Annotated[str, typer.Option(help="answers, or last_answer.")] = "answers",
    split: Annotated[str, typer.Option(help="Split of a dataset.")] = "train",
    network: Annotated[bool, typer.Option(help="Allow pictures that must be fetched from the network.")] = False,
) -> None:
    """Show the tokens of rows, coloured by what is supervised; exit with 1 if one is refused, 2 if the file is."""
    from itertools import islice

    from rich.console import Console
    from rich.progress import track

    from processing.inspection import inspect_example
    from processing.inspection_page import inspection_page
    from processing.inspection_terminal import legend, row_panel, rows_table
    from processing.length import LengthPolicy
    from processing.pictures import PictureLimits
    from processing.processing_families import load_processor
    from processing.rows import read_rows
    from processing.supervision import Supervision

    console = Console()
    try:
        policy = None if max_length is None else LengthPolicy(max_length, tuple(steps.split(",")))  # type: ignore[arg-type]
        limits = PictureLimits(allow_network=network)
        supervise = Supervision(load_processor(model), policy, train_on, limits=limits)  # type: ignore[arg-type]
        reader = read_rows(file, format=format, root=root, on_error="collect", split=split)
        examples = list(islice((e for e in reader if e.kind == "sft"), rows))
    except (ValueError, OSError) as error:
        console.print(f"[red]{type(error).__name__}[/red]", end=": ")
        console.print(str(error), markup=False, highlight=False)
        raise typer.Exit(2) from error
    if not examples:
        console.print(f"{file} has no row with an answer to train on among the rows read.", markup=False)
        _print_problems(console, reader.problems)
        raise typer.Exit(2)
    seen = [inspect_example(e, supervise) for e in track(examples, "rows", console=console, transient=True)]
    for inspection in seen:
        console.print(row_panel(inspection))
    console.print(rows_table(seen, max_length))
    console.print(legend())
    _print_problems(console, reader.problems)
    if html is not None:
        limit = "" if max_length is None else f" · max_length {max_length:,} ({steps})"
        subtitle = f"{len(seen)} rows as {type(supervise.processor).__name__} writes them{limit}"
        html.write_text(inspection_page(seen, Path(file).name, subtitle, max_length), encoding="utf-8")
        console.print(f"Page: {html}", markup=False)
    if reader.problems or any(inspection.outcome == "refused" for inspection in seen):
        raise typer.Exit(1)


def _print_problems(console: Console, problems: list[RowError]) -> None:
    for problem in problems:
        console.print(f"refused: {problem}", style="red", markup=False, highlight=False)
