"""The standard library's HTML parser with positions in the text, and without its crash on `<![`."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class HtmlReader(HTMLParser):
    """Reads `html` when made; a subclass sets its fields, then calls `read`.

    has_marked_section: whether there was a `<![`, which HTML does not have; it is read as text. (Python 3.11's
    HTMLParser raises AssertionError at most of them.)
    """

    def __init__(self, html: str, *, convert_charrefs: bool):
        super().__init__(convert_charrefs=convert_charrefs)
        self.html = html
        self.has_marked_section = "<![" in html
        self.line_starts = [0, *(match.end() for match in re.finditer("\n", html))]

    def read(self) -> None:
        self.feed(self.html.replace("<![", " !["))  # of the same length, so that positions hold
        self.close()

    @property
    def position(self) -> int:
        """Where in `html` the tag begins that is being handled."""
        line, column = self.getpos()
        return self.line_starts[line - 1] + column

    @property
    def start_tag(self) -> str:
        """The text of the start tag that is being handled."""
        text = self.get_starttag_text()
        assert text is not None, "the parser has just read it"
        return text
