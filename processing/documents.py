"""A page as a list of elements with boxes, and the QwenVL HTML that says the same.

QwenVL HTML (Qwen2.5-VL technical report, section 2.2.1) is HTML in which every element of the page carries
`data-bbox="x1 y1 x2 y2"`. In our hands boxes are pixels of the original picture; `document_boxes.py` turns them into
what a model reads and writes, `document_parsing.py` reads and checks, `document_markdown.py` is Markdown and back.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from .coordinates import Box


@dataclass(frozen=True)
class Kind:
    """How an element of one kind is written.

    tag, css_class: of the element. has_picture, content: it shows a picture first and then its content in a tag, as in
    `<div class="chart" data-bbox=".."><img data-bbox=".." /><table>..</table></div>`. notation: its "format".
    """

    tag: str
    css_class: str | None = None
    has_picture: bool = False
    content: str | None = None
    notation: str | None = None


HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")

# From the report: headings, p, table, chart, formula, image caption, image ocr, music sheet, chemical formula.
# Ours, for what pages also have: lists, code, header, footer, caption, and an image without words.
KINDS: dict[str, Kind] = {
    **{heading: Kind(heading) for heading in HEADINGS},
    "paragraph": Kind("p"),
    "table": Kind("table"),
    "chart": Kind("div", "chart", True, "table"),
    "formula": Kind("div", "formula", True, "div"),
    "image_caption": Kind("div", "image caption", True, "p"),
    "image_ocr": Kind("div", "image ocr", True, "p"),
    "music_sheet": Kind("div", "music sheet", True, "div", "abc notation"),
    "chemical_formula": Kind("div", "chemical formula", True, "div", "smile"),  # the report spells SMILES so
    "image": Kind("div", "image", True),
    "unordered_list": Kind("ul"),
    "ordered_list": Kind("ol"),
    "code": Kind("pre"),
    "header": Kind("header"),
    "footer": Kind("footer"),
    "caption": Kind("p", "caption"),
}
MARKUP_KINDS = ("table", "chart", "unordered_list", "ordered_list")  # whose content is tags, not text
_TAG = re.compile(r"<[^<>]*>")
_LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)


@dataclass(frozen=True)
class Element:
    """One element of a page.

    kind: a key of KINDS. box: pixels of the original picture; None in a document that came from plain Markdown.
    content: HTML inside the element; rows of a table, items of a list, LaTeX of a formula. "" for an image.
    picture: box of the `<img>` inside; None: the box of the element.

    Example:
        >>> element("h1", [10, 20, 300, 50], "Cats & dogs")
        Element(kind='h1', box=Box(x1=10, y1=20, x2=300, y2=50, label=None, image_index=0),
        content='Cats &amp; dogs', picture=None)
    """

    kind: str
    box: Box | None
    content: str = ""
    picture: Box | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            nearest = get_close_matches(self.kind, KINDS, n=1)
            hint = f", did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(KINDS)}"
            raise ValueError(f"unknown kind of element {self.kind!r}{hint}")
        if self.picture is not None and not KINDS[self.kind].has_picture:
            raise ValueError(f"an element of kind {self.kind!r} has no picture")
        if self.content and self.kind == "image":
            raise ValueError("an image has no content: kind 'image_caption' or 'image_ocr' says words")

    @property
    def text(self) -> str:
        """The content without tags and entities; `<br>` is a line break.

        Example:
            >>> Element("paragraph", None, "H<sub>2</sub>O &lt; 5<br>ml").text
            'H2O < 5\\nml'
        """
        return html.unescape(_TAG.sub("", _LINE_BREAK.sub("\n", self.content)))


@dataclass(frozen=True)
class Document:
    """Elements of one page in reading order."""

    elements: tuple[Element, ...]

    def to_html(self) -> str:
        """The page as QwenVL HTML, one element a line. Raises ValueError for an element without a box."""
        lines = [_element_html(number, element) for number, element in enumerate(self.elements)]
        return "\n".join(["<html><body>", *lines, "</body></html>"])


def element(kind: str, bbox: Sequence[float], text: str = "", *, content: str | None = None) -> Element:
    """An element from an annotation: `text` is escaped; `content` is HTML already (rows of a table, items of a list).

    Raises:
        ValueError: both given, text where tags are needed, a box that is not [x1, y1, x2, y2].
    """
    if text and content is not None:
        raise ValueError("an element has either text or content, both are given")
    if text and kind in MARKUP_KINDS:
        raise ValueError(f"a {kind} needs content, HTML such as <tr><td>..</td></tr> or <li>..</li>, not text")
    if len(bbox) != 4:
        raise ValueError(f"bbox must be [x1, y1, x2, y2], it is {list(bbox)}")
    x1, y1, x2, y2 = bbox
    return Element(kind, Box(x1, y1, x2, y2), html.escape(text, quote=False) if content is None else content)


def document_from_annotations(annotations: Sequence[Mapping[str, Any]]) -> Document:
    """A page from annotations `{"kind", "bbox", "text" or "content"}`, in reading order.

    Example:
        >>> page = document_from_annotations([{"kind": "paragraph", "bbox": [1, 2, 30, 5], "text": "1 < 2"}])
        >>> print(page.to_html())
        <html><body>
        <p data-bbox="1 2 30 5">1 &lt; 2</p>
        </body></html>
    """
    elements = []
    for number, annotation in enumerate(annotations):
        if unknown := set(annotation) - {"kind", "bbox", "text", "content"}:
            raise ValueError(f"annotation {number} has the unknown key {sorted(unknown)[0]!r}")
        if missing := {"kind", "bbox"} - set(annotation):
            raise ValueError(f"annotation {number} needs {' and '.join(sorted(missing))}")
        try:
            elements.append(element(**annotation))
        except ValueError as error:
            raise ValueError(f"annotation {number}: {error}") from error
    return Document(tuple(elements))


def _element_html(number: int, element: Element) -> str:
    kind = KINDS[element.kind]
    if element.box is None:
        raise ValueError(f"element {number} ({element.kind}: {element.text[:40]!r}) has no box, QwenVL HTML needs one")
    css_class = f' class="{kind.css_class}"' if kind.css_class else ""
    notation = f' format="{kind.notation}"' if kind.notation else ""
    content = element.content
    if kind.has_picture:
        picture = f"<img {bbox_attribute(element.picture or element.box)} />"
        content = picture + (f"<{kind.content}>{content}</{kind.content}>" if kind.content else "")
    return f"<{kind.tag}{css_class}{notation} {bbox_attribute(element.box)}>{content}</{kind.tag}>"


def bbox_attribute(box: Box) -> str:
    """`data-bbox="x1 y1 x2 y2"`."""
    return f'data-bbox="{format_numbers([box.x1, box.y1, box.x2, box.y2])}"'


def format_numbers(numbers: Sequence[float]) -> str:
    """Numbers with a blank between them and at most two decimals.

    Example:
        >>> format_numbers([1, 2.0, 3.14159, 5.1])
        '1 2 3.14 5.1'
    """
    return " ".join(f"{number:.2f}".rstrip("0").rstrip(".") for number in numbers)
