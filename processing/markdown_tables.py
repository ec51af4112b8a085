"""Rows of an HTML table, or items of a list -> lines of Markdown, and pipe tables back to rows."""

from __future__ import annotations

import html
import re

from .html_reader import HtmlReader

_RULE = re.compile(r"\|(?:\s*:?-+:?\s*\|)+")


class _Cells(HtmlReader):
    """Texts inside <td>, <th> and <li>, by row; whether a cell spans several."""

    def __init__(self, content: str):
        super().__init__(content, convert_charrefs=True)
        self.rows: list[list[str]] = []
        self.has_spans = False
        self.is_inside = False
        self.read()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr" or tag == "li":
            self.rows.append([])
        if tag in ("td", "th", "li"):
            if not self.rows:  # a cell without its row
                self.rows.append([])
            self.rows[-1].append("")
            self.is_inside = True
            self.has_spans |= any(name in ("colspan", "rowspan") and value != "1" for name, value in attrs)
        elif tag == "br":
            self.handle_data(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "li"):
            self.is_inside = False

    def handle_data(self, data: str) -> None:
        if self.is_inside:
            self.rows[-1][-1] += data


def one_line(text: str) -> str:
    """`text` with every run of white space as one blank."""
    return " ".join(text.split())


def list_items(content: str) -> list[str]:
    """The texts of the `<li>` in `content`; lists inside lists are not told apart."""
    return [one_line(row[0]) for row in _Cells(content).rows if row]


def pipe_table(content: str) -> str | None:
    """Rows as a pipe table, the first as its head; None where Markdown cannot say it: spans, rows of unequal length.

    Example:
        >>> print(pipe_table("<tr><th>a</th><th>b</th></tr><tr><td>2</td><td>3|5</td></tr>"))
        | a | b |
        | --- | --- |
        | 2 | 3\\|5 |
    """
    cells = _Cells(content)
    rows = [[one_line(cell).replace("|", "\\|") for cell in row] for row in cells.rows if row]
    if not rows or cells.has_spans or len({len(row) for row in rows}) > 1:
        return None
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def table_rows(lines: list[str]) -> str | None:
    """The lines of a pipe table as HTML rows, the first of `<th>`; None if they are not one."""
    if len(lines) < 2 or not lines[0].startswith("|") or not _RULE.fullmatch(lines[1]):
        return None
    rows = []
    for tag, line in (("th", lines[0]), *(("td", line) for line in lines[2:])):
        cells = re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))
        texts = [html.escape(cell.strip().replace("\\|", "|"), quote=False) for cell in cells]
        rows.append("<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>")
    return "".join(rows)
