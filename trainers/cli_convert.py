"""`qwenvl convert`: Qwen-VL between the layout of 2023 and this package's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[Path, typer.Argument(help="Folder with a Qwen-VL; its config.json says in which layout.")],
    output: Annotated[Path, typer.Argument(help="Folder for the other layout; must not exist or be empty.")],
) -> None:
    """Convert a Qwen-VL between the original layout and ours, shard by shard, every tensor checked by its hash."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    from trainers.convert import REPORT
    from trainers.convert import convert as convert_folder

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            bars = {step: progress.add_task(step, total=None) for step in ("convert", "check")}
            found = convert_folder(
                source,
                output,
                lambda step, done, total: progress.update(bars[step], completed=done, total=total),
            )
    except (ValueError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    console.print(
        f"{output}: {len(found.hashes)} tensors, {found.num_bytes:,} bytes, {found.direction} layout; each comes back "
        f"bit for bit (hashes in {REPORT}).",
        highlight=False,
        soft_wrap=True,
    )
    for note in found.notes:
        console.print(f"Note: {note}", highlight=False, soft_wrap=True)
