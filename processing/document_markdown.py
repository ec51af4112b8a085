"""Document -> Markdown and back.

With boxes, each element follows a comment with its kind and box, `<!-- Table (115, 270, 475, 495) -->`. Qwen3-VL's
"qwenvl markdown" writes such comments for images and tables; ours extend them to every kind, so that nothing is lost.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable

from .coordinates import Box
from .documents import HEADINGS, KINDS, Document, Element, format_numbers
from .markdown_tables import list_items, one_line, pipe_table, table_rows

_COMMENT = re.compile(r"<!--\s*([A-Za-z][\w ]*?)\s*\(([^()]*)\)\s*-->")
_HEADING = re.compile(r"(#{1,6}) (.*)", re.DOTALL)
_ITEM = re.compile(r"(?:[-*+]|(\d+)[.)]) (.*)")
_IMAGE = re.compile(r"!\[(.*)\]\(\)", re.DOTALL)
_FENCE = re.compile(r"`{3,}|\$\$(?!.*\$\$)")
# A line of text that begins so would be read as something else; a backslash in front keeps it text.
_MEANS_SOMETHING = re.compile(r"(#{1,6} |[-*+] |\d+[.)] |\||\$\$|```|<!--|<table|!\[|\\)")


def to_markdown(document: Document, *, boxes: bool = False) -> str:
    """Markdown of a page, its elements apart by an empty line.

    Tables become pipe tables, or stay HTML where cells span several rows or columns; formulas stand between `$$`; an
    image is `![its words]()`. Markup inside a text (bold, subscript) is dropped, only its words stay. Without `boxes`
    the kinds that Markdown does not have (header, caption, chart, ...) become what looks like them.

    Example:
        >>> page = Document((Element("h1", None, "Cats"), Element("formula", None, "a &lt; b")))
        >>> print(to_markdown(page))
        # Cats
        <BLANKLINE>
        $$
        a < b
        $$
    """
    blocks = []
    for number, element in enumerate(document.elements):
        comment = ""
        if boxes:
            if element.box is None:
                raise ValueError(f"element {number} ({element.kind}) has no box to write")
            box = element.box
            numbers = format_numbers([box.x1, box.y1, box.x2, box.y2]).replace(" ", ", ")
            comment = f"<!-- {element.kind.replace('_', ' ').capitalize()} ({numbers}) -->\n"
        blocks.append(comment + _write(element))
    return "\n\n".join(blocks)


def _write(element: Element) -> str:
    kind, text = element.kind, element.text
    if kind in ("table", "chart"):
        return pipe_table(element.content) or f"<table>{one_line(element.content)}</table>"
    if kind == "unordered_list":
        return "\n".join(f"- {item}" for item in list_items(element.content))
    if kind == "ordered_list":
        return "\n".join(f"{number}. {item}" for number, item in enumerate(list_items(element.content), start=1))
    if kind == "formula":
        return f"$$\n{text.strip()}\n$$"
    if kind in ("code", "music_sheet", "chemical_formula"):
        fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
        return f"{fence}\n{text.strip(chr(10))}\n{fence}"
    if kind in ("image", "image_caption", "image_ocr"):
        return f"![{one_line(text)}]()"
    if kind in HEADINGS and text.strip():
        return f"{'#' * int(kind[1])} {one_line(text)}"
    lines = [line.strip() for line in text.strip().split("\n")]
    return "\n".join(("\\" if _MEANS_SOMETHING.match(line) else "") + line for line in lines if line)


def from_markdown(markdown: str) -> Document:
    """A page from Markdown, as `to_markdown` writes it; the elements have boxes where comments say so.

    Raises:
        ValueError: a comment with a box names no kind or has not four numbers; a fence or a formula does not end.

    Example:
        >>> from_markdown("<!-- Caption (1, 2, 30, 5) -->\\nFig. 1").elements
        (Element(kind='caption', box=Box(x1=1.0, y1=2.0, x2=30.0, y2=5.0, label=None, image_index=0), content='Fig. 1',
        picture=None),)
    """
    elements = []
    named: tuple[str, Box] | None = None  # what the comment before the next block says
    for block in _blocks(markdown):
        match = _COMMENT.fullmatch(block)
        if not match:
            elements.append(_read(block, *(named or (None, None))))
            named = None
            continue
        if named:  # an element without words
            elements.append(Element(*named))
        named = _read_comment(match)
    if named:
        elements.append(Element(*named))
    return Document(tuple(elements))


def _blocks(markdown: str) -> list[str]:
    """Comments, fenced blocks and paragraphs (lines up to an empty one)."""
    blocks: list[str] = []
    current: list[str] = []
    fence: str | None = None
    for line in [*markdown.split("\n"), ""]:
        stripped = line.strip()
        if fence:
            current.append(line)
            if stripped == fence:
                fence = None
                blocks.append("\n".join(current))
                current = []
            continue
        opens = _FENCE.match(stripped)
        if opens and not current:
            fence, current = opens.group(), [line]
        elif not stripped or _COMMENT.fullmatch(stripped):
            if current:
                blocks.append("\n".join(current))
                current = []
            if stripped:
                blocks.append(stripped)
        else:
            current.append(stripped)
    if fence:
        raise ValueError(f"{fence} is not closed: {current[0][:40]!r}")
    return blocks


def _read_comment(match: re.Match[str]) -> tuple[str, Box]:
    kind = match.group(1).lower().replace(" ", "_")
    if kind not in KINDS:
        raise ValueError(f"{match.group()} names no kind of element; known are {', '.join(KINDS)}")
    numbers = [number.strip() for number in match.group(2).split(",")]
    if len(numbers) != 4 or not all(re.fullmatch(r"-?\d+(\.\d+)?", number) for number in numbers):
        raise ValueError(f"{match.group()} needs four numbers (x1, y1, x2, y2)")
    x1, y1, x2, y2 = map(float, numbers)
    return kind, Box(x1, y1, x2, y2)


def _read(block: str, named: str | None, box: Box | None) -> Element:
    """One block as an element; the kind that a comment names wins over the one it looks like."""
    for looks_like, read in _READERS:
        content = read(block)
        if content is not None:
            return Element(named or looks_like, box, content)
    lines = [line.removeprefix("\\") for line in block.split("\n")]
    return Element(named or "paragraph", box, "<br>".join(html.escape(line, quote=False) for line in lines))


def _read_heading(level: int) -> Callable[[str], str | None]:
    def read(block: str) -> str | None:
        match = _HEADING.fullmatch(block)
        return html.escape(match.group(2), quote=False) if match and len(match.group(1)) == level else None

    return read


def _read_list(ordered: bool) -> Callable[[str], str | None]:
    def read(block: str) -> str | None:
        matches = [_ITEM.fullmatch(line) for line in block.split("\n")]
        items = [match.group(2) for match in matches if match and (match.group(1) is not None) == ordered]
        if len(items) != len(matches):
            return None
        return "".join(f"<li>{html.escape(item, quote=False)}</li>" for item in items)

    return read


def _read_table(block: str) -> str | None:
    if block.startswith("<table>") and block.endswith("</table>"):
        return block.removeprefix("<table>").removesuffix("</table>")
    return table_rows(block.split("\n"))


def _read_formula(block: str) -> str | None:
    if not block.startswith("$$"):
        return None
    return html.escape(block.removeprefix("$$").removesuffix("$$").strip("\n"), quote=False)


def _read_code(block: str) -> str | None:
    if not block.startswith("```"):
        return None
    lines = block.split("\n")  # the first may name the language, the last is the fence
    return html.escape("\n".join(lines[1:-1]), quote=False)


def _read_image(block: str) -> str | None:
    match = _IMAGE.fullmatch(block)
    return html.escape(match.group(1), quote=False) if match and match.group(1) else None


def _read_bare_image(block: str) -> str | None:
    return "" if block == "![]()" else None


_READERS: list[tuple[str, Callable[[str], str | None]]] = [
    *((heading, _read_heading(level)) for level, heading in enumerate(HEADINGS, start=1)),
    ("table", _read_table),
    ("unordered_list", _read_list(ordered=False)),
    ("ordered_list", _read_list(ordered=True)),
    ("formula", _read_formula),
    ("code", _read_code),
    ("image_caption", _read_image),
    ("image", _read_bare_image),
]
