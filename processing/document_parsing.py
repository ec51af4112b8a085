"""QwenVL HTML -> Document, with every problem by its line; and the check of a page against its picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .coordinates import Box
from .document_boxes import read_bbox
from .documents import KINDS, Document, Element
from .html_reader import HtmlReader
from .reading_order import reading_order

_FENCE = re.compile(r"^\s*```(?:html)?[ \t]*\n|\n?[ \t]*```\s*$")
_CONTAINERS = ("html", "body")
_VOID = ("img", "br", "hr", "col", "wbr", "meta", "link")  # tags that have no end
_SKIPPED = ("style", "head")  # the report puts a <style> before a table

_TAG_IN_TEXT = re.compile(r"</?[a-zA-Z]")

Aspect = Literal["markup", "box", "content", "order"]


@dataclass(frozen=True)
class DocumentProblem:
    """What is wrong, and in which line of the HTML (from 1).

    aspect: "markup" (tags that do not fit together), "box" (unreadable, or in the wrong place), "content" (an element
    without a box, of no known kind, or text outside elements) or "order".
    """

    line: int
    reason: str
    aspect: Aspect

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


@dataclass(frozen=True)
class ParsedDocument:
    """The elements that could be read, and what is wrong with the rest."""

    document: Document
    problems: tuple[DocumentProblem, ...]


def parse_document(html: str, on_error: Literal["raise", "collect"] = "raise") -> ParsedDocument:
    """Reads QwenVL HTML, with or without a Markdown fence and `<html><body>` around it.

    Every element on the top level becomes an Element, or a problem: a tag that is not closed or not opened, a missing
    or unreadable data-bbox, an unknown kind, text outside elements. `<style>` and `<head>` are left out.

    Raises:
        ValueError: with on_error "raise", the problems, if there are any.

    Example:
        >>> parsed = parse_document('<p data-bbox="1 2 3 5">a</p><p>b</p>', on_error="collect")
        >>> [element.text for element in parsed.document.elements], [str(problem) for problem in parsed.problems]
        (['a'], ['line 1: <p> has no data-bbox'])
    """
    if on_error not in ("raise", "collect"):
        raise ValueError(f"on_error is {on_error!r}, it must be 'raise' or 'collect'")
    reader = _Reader(_FENCE.sub("", html))
    problems = tuple(sorted(reader.problems, key=lambda problem: problem.line))
    if problems and on_error == "raise":
        raise ValueError(_message(problems))
    return ParsedDocument(Document(tuple(reader.elements)), problems)


def check_document(html: str, width: int, height: int, *, check_order: bool = False) -> list[DocumentProblem]:
    """All that is wrong with the HTML of a page whose picture has `width` x `height` pixels; empty if nothing is.

    Besides what `parse_document` finds: boxes without area, boxes outside the page, boxes outside the element that
    holds them, and with `check_order`, the first element that `reading_order` would not have put there.
    """
    reader = _Reader(_FENCE.sub("", html))
    problems = list(reader.problems)
    for line, tag, box, outer in reader.boxes:
        numbers = f"({box.x1:g}, {box.y1:g}, {box.x2:g}, {box.y2:g})"
        if box.area == 0:
            problems.append(DocumentProblem(line, f"<{tag}> has the box {numbers}, which has no area", "box"))
        if box.x1 < 0 or box.y1 < 0 or box.x2 > width or box.y2 > height:
            problems.append(
                DocumentProblem(line, f"<{tag}> has the box {numbers}, the page has {width} x {height}", "box")
            )
        if outer and not (outer.x1 <= box.x1 and outer.y1 <= box.y1 and box.x2 <= outer.x2 and box.y2 <= outer.y2):
            around = f"({outer.x1:g}, {outer.y1:g}, {outer.x2:g}, {outer.y2:g})"
            problems.append(
                DocumentProblem(line, f"<{tag}> has the box {numbers}, outside its element's {around}", "box")
            )
    if check_order:
        order = reading_order([element.box for element in reader.elements if element.box])
        wrong = [place for place, index in enumerate(order) if place != index]
        if wrong:
            found = reader.elements[order[wrong[0]]].text[:40]
            reason = f"element {order[wrong[0]]} ({found!r}) would be read as number {wrong[0]}"
            problems.append(DocumentProblem(reader.lines[order[wrong[0]]], reason, "order"))
    return sorted(problems, key=lambda problem: problem.line)


def check_markup(html: str, where: str) -> None:
    """Refuses (ValueError) HTML whose tags do not fit together or whose boxes cannot be read; any tags are welcome."""
    wrong = [problem for problem in _Reader(html).problems if problem.aspect in ("markup", "box")]
    if wrong:
        raise ValueError(f"{where}: {_message(wrong)}")


def _message(problems: Sequence[DocumentProblem]) -> str:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"the document has {len(problems)} problem(s): {problems[0]}{more}"


@dataclass
class _Open:
    """A tag that waits for its end."""

    tag: str
    attributes: dict[str, str | None]
    line: int
    inner_start: int
    box: Box | None
    picture: Box | None = None  # box of the first <img> directly inside
    contents: list[tuple[str, int, int]] | None = None  # (tag, start, end of the inside) of the tags directly inside


class _Reader(HtmlReader):
    """Elements, boxes and problems of one page."""

    def __init__(self, html: str):
        super().__init__(html, convert_charrefs=False)
        self.elements: list[Element] = []
        self.lines: list[int] = []
        self.problems: list[DocumentProblem] = []
        self.boxes: list[tuple[int, str, Box, Box | None]] = []  # (line, tag, box, box of the tag around it)
        self.stack: list[_Open] = []
        self.read()
        if self.has_marked_section:
            line = html.count("\n", 0, html.index("<![")) + 1
            self.report("markup", "<![ is no HTML; in a text it is written &lt;![", line)
        for opened in self.stack:
            self.report("markup", f"<{opened.tag}> is not closed", opened.line)

    def report(self, aspect: Aspect, reason: str, line: int | None = None) -> None:
        self.problems.append(DocumentProblem(self.getpos()[0] if line is None else line, reason, aspect))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _CONTAINERS and not self.stack:
            return
        attributes = dict(attrs)
        box = self._box(tag, attributes)
        outer = next((opened.box for opened in reversed(self.stack) if opened.box), None)
        if box:
            self.boxes.append((self.getpos()[0], tag, box, outer))
        opened = _Open(tag, attributes, self.getpos()[0], self.position + len(self.start_tag), box, contents=[])
        if tag not in _VOID:
            self.stack.append(opened)
        elif not self.stack:
            self._add_void(opened)
        elif tag == "img" and self.stack[-1].picture is None:
            self.stack[-1].picture = box

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in (*_VOID, *_CONTAINERS):
            self.report("markup", f"<{tag} /> closes itself: only {', '.join(_VOID)} do")
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in _CONTAINERS or tag in _VOID:  # the report itself closes html before body
            return
        if not any(opened.tag == tag for opened in self.stack):
            self.report("markup", f"</{tag}> closes nothing")
            return
        while (opened := self.stack.pop()).tag != tag:
            self.report("markup", f"<{opened.tag}> is not closed before </{tag}>", opened.line)
        inside = (tag, opened.inner_start, self.position)
        if self.stack:
            assert self.stack[-1].contents is not None
            self.stack[-1].contents.append(inside)
        elif tag not in _SKIPPED:
            self._add(opened, self.html[inside[1] : inside[2]])

    def handle_data(self, data: str) -> None:
        if _TAG_IN_TEXT.search(data) and not (self.stack and self.stack[-1].tag in _SKIPPED):
            self.report("markup", f"a tag that does not end, or < that is not written &lt;: {data.strip()[:40]!r}")
        elif data.strip() and not self.stack:
            self.report("content", f"text outside elements: {data.strip()[:40]!r}")

    def handle_entityref(self, name: str) -> None:
        self.handle_data(f"&{name};")

    def handle_charref(self, name: str) -> None:
        self.handle_data(f"&#{name};")

    def _box(self, tag: str, attributes: dict[str, str | None]) -> Box | None:
        if "data-bbox" not in attributes:
            return None
        try:
            return read_bbox(attributes["data-bbox"] or "")
        except ValueError as error:
            self.report("box", f"<{tag}>: {error}")
            return None

    def _add_void(self, opened: _Open) -> None:
        if opened.tag == "img" and opened.box:  # models write pictures without words so
            self._append(Element("image", opened.box), opened.line)
        elif opened.tag == "img" and "data-bbox" not in opened.attributes:
            self.report("content", "<img> has no data-bbox")

    def _add(self, opened: _Open, content: str) -> None:
        if opened.box is None:
            if "data-bbox" not in opened.attributes:
                self.report("content", f"<{opened.tag}> has no data-bbox", opened.line)
            return
        css_class = opened.attributes.get("class")
        name = _kind_of(opened.tag, css_class)
        if name is None:
            what = f"<{opened.tag}>" if css_class is None else f'<{opened.tag} class="{css_class}">'
            self.report("content", f"{what} is no known kind of element", opened.line)
            return
        kind = KINDS[name]
        if not kind.has_picture:
            self._append(Element(name, opened.box, content.strip()), opened.line)
            return
        inner = ""
        if kind.content:
            found = [(start, end) for tag, start, end in opened.contents or [] if tag == kind.content]
            if len(found) != 1:
                self.report(
                    "content", f'<div class="{css_class}"> holds {len(found)} <{kind.content}>, not 1', opened.line
                )
                return
            inner = self.html[found[0][0] : found[0][1]].strip()
        picture = None if opened.picture == opened.box else opened.picture
        self._append(Element(name, opened.box, inner, picture), opened.line)

    def _append(self, element: Element, line: int) -> None:
        self.elements.append(element)
        self.lines.append(line)


def _kind_of(tag: str, css_class: str | None) -> str | None:
    """The kind with this tag and class; outside div, a class that is no kind's own (`class="table3"`) is ignored."""
    for name, kind in KINDS.items():
        if (kind.tag, kind.css_class) == (tag, css_class):
            return name
    if tag == "div":
        return None
    return next((name for name, kind in KINDS.items() if (kind.tag, kind.css_class) == (tag, None)), None)
