"""`qwenvl data check`: what a file of rows holds, and every row that training would refuse."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from processing.checking import DataReport


def check(
    file: Annotated[
        str, typer.Argument(help="A .jsonl, .json, .csv or .parquet file, a saved dataset, or a name on the Hub.")
    ],
    format: Annotated[
        str | None, typer.Option(help="Shape of the rows; recognised from their columns if not given.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder, or name on the Hub, with a processor: lengths are counted in its tokens."),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder that relative picture paths start from; by default that of the file.")
    ] = None,
    write_clean: Annotated[
        Path | None, typer.Option(help="Folder for NAME.good and NAME.bad: the rows, separated.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a dataset.")] = "train",
    pictures: Annotated[bool, typer.Option(help="Open the pictures, for their sizes and to place the boxes.")] = True,
    network: Annotated[bool, typer.Option(help="Allow pictures that must be fetched from the network.")] = False,
) -> None:
    """Read a whole file as training would; exit with 1 if any row is bad, with 2 if the file cannot be checked."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from processing.checking import check_rows
    from processing.clean_rows import CleanWriter
    from processing.pictures import PictureLimits
    from processing.processing_families import load_processor
    from processing.raw_rows import count_rows
    from processing.rows import read_rows

    console = Console()
    try:
        reader = read_rows(file, format=format, root=root, split=split)
        processor = None if model is None else load_processor(model)
        writer = None if write_clean is None else CleanWriter(file, write_clean)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with writer or nullcontext(), Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("rows", total=count_rows(file))

            def on_row(raw, problem):
                progress.advance(bar)
                if writer is not None:
                    writer.add(raw, problem)

            limits = PictureLimits(allow_network=network)
            report = check_rows(reader, processor=processor, open_pictures=pictures, limits=limits, on_row=on_row)
    except (ValueError, OSError) as error:
        typer.echo(f"{file} cannot be checked: {error}", err=True)
        raise typer.Exit(2) from error
    show(report, console)
    if writer is not None:
        console.print(f"good rows: {writer.good_path}\nbad rows: {writer.bad_path}", highlight=False, soft_wrap=True)
        if write_clean != Path(file).parent and report.widths:
            folder = root or Path(file).parent
            console.print(
                f"relative picture paths in them start at {folder}: read them with that root", soft_wrap=True
            )
    raise typer.Exit(1 if report.problems else 0)


def show(report: DataReport, console: Console) -> None:
    """Prints a report."""
    from statistics import median

    from rich.table import Table

    formats = ", ".join(f"{count} {name}" for name, count in report.formats.most_common())
    console.print(
        f"{report.num_rows} rows: {report.num_rows - len(report.problems)} good ({formats or 'none'}), "
        f"{len(report.problems)} bad",
        highlight=False,
        soft_wrap=True,
    )
    has_lengths = any(counts.lengths for counts in report.tasks.values())
    table = Table("task", "examples", "pictures", *(["tokens: min", "median", "max"] if has_lengths else []))
    for column in table.columns[1:]:
        column.justify = "right"
    for task, counts in sorted(report.tasks.items()):
        lengths = counts.lengths
        cells = [f"{min(lengths)}", f"{median(lengths):.0f}", f"{max(lengths)}"] if lengths else []
        table.add_row(task, f"{counts.num_examples}", f"{counts.num_pictures}", *cells)
    if report.tasks:
        console.print(table)
    for name, sides in (("width", report.widths), ("height", report.heights)):
        if sides:
            console.print(
                f"picture {name} in pixels: min {min(sides)}, median {median(sides):.0f}, max {max(sides)}",
                highlight=False,
            )
    for note, count in report.notes.most_common():
        console.print(f"{count} {note}", highlight=False, soft_wrap=True)
    for problem in report.problems:
        console.print(str(problem), markup=False, highlight=False, soft_wrap=True, style="red")
