"""Inspections -> what rich prints: a table of all rows, and each row with its tokens coloured as on the page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .inspection import Inspection

STYLES = {
    "supervised": "bold bright_blue",
    "read": "default",
    "special": "dim",
    "picture": "magenta",
    "left_out": "red strike",
}
_OUTCOME_STYLES = {"kept": "green", "drop": "red", "refused": "red"}


def rows_table(inspections: Sequence[Inspection], max_length: int | None = None) -> Table:
    """One line per row: lengths, supervised tokens, pictures, and what the length policy does."""
    table = Table(title=None if max_length is None else f"max_length {max_length:,}", header_style="bold")
    table.add_column("row", overflow="fold")
    table.add_column("task")
    for name in ("tokens", "whole", "supervised", "pictures"):
        table.add_column(name, justify="right")
    table.add_column("outcome")
    for seen in inspections:
        table.add_row(
            Text(seen.source.where),
            Text(seen.task or "-"),
            f"{seen.length:,}",
            f"{seen.whole_length:,}",
            f"{seen.num_supervised:,}",
            f"{len(seen.pictures)} ({seen.num_picture_tokens:,} tokens)",
            Text(seen.outcome, style=_OUTCOME_STYLES.get(seen.outcome, "yellow")),
        )
    return table


def row_panel(inspection: Inspection) -> RenderableType:
    """One row: its pictures in words, then every token in its colour."""
    pieces: list[RenderableType] = []
    if inspection.problem:
        pieces.append(Text(inspection.problem, style="red"))
    for number, seen in enumerate(inspection.pictures, start=1):
        height, width = seen.original_size
        shapes = "".join(f"\n  {s.kind} {s.label or '-'}: {_corners(s.corners)}" for s in seen.shapes)
        size = f"{seen.picture.width} x {seen.picture.height} (original {width} x {height})"
        pieces.append(Text(f"Picture {number}: {size}, {seen.num_tokens} tokens{shapes}", style="magenta"))
    text = Text()
    for token in inspection.tokens:
        shown = token.text if token.number == 1 or not token.is_special else f"<{token.number} x {token.text}>"
        text.append(shown, style=STYLES[token.kind])
    pieces.append(text)
    title = Text(f"{inspection.source.where}  {inspection.task or ''}".rstrip())
    return Panel(Group(*pieces), title=title, title_align="left", subtitle=_numbers(inspection), subtitle_align="left")


def legend() -> Text:
    """What the colours mean."""
    text = Text()
    for kind, meaning in (
        ("supervised", "supervised"),
        ("read", "read"),
        ("special", "special token, read"),
        ("picture", "picture"),
        ("left_out", "left out by the length policy"),
    ):
        text.append(meaning, style=STYLES[kind])
        text.append("   ")
    return text


def _numbers(seen: Inspection) -> str:
    return f"{seen.outcome}: {seen.length:,} of {seen.whole_length:,} tokens, {seen.num_supervised:,} supervised"


def _corners(corners: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"({x:.1f}, {y:.1f})" for x, y in corners)
