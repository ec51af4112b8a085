"""The boxes inside QwenVL HTML, moved without touching another character of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from .coordinates import Box, Convention, Frame, Outside, fit, from_model, to_model
from .documents import format_numbers
from .html_reader import HtmlReader

_BBOX = re.compile(r"""(\bdata-bbox\s*=\s*)("[^"]*"|'[^']*'|[^\s"'>/]+)""", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def map_boxes(html: str, move: Callable[[Box], Sequence[float]]) -> str:
    """`html` with the numbers of every `data-bbox` of a tag replaced by what `move` makes of the box.

    The same words in the text of a page, which may well be about HTML, are left alone.

    Raises:
        ValueError: a data-bbox that is not four numbers or has its corners swapped; a data-polygon, which is not read.

    Example:
        >>> map_boxes('<p data-bbox="1 2 3 5">a</p>', lambda box: [2 * box.x1, box.y1, 2 * box.x2, box.y2])
        '<p data-bbox="2 2 6 5">a</p>'
    """

    def replace(match: re.Match[str]) -> str:
        return f'{match.group(1)}"{format_numbers(move(read_bbox(match.group(2).strip(chr(34) + chr(39)))))}"'

    pieces = []
    position = 0
    for start, tag in _StartTags(html).found:
        moved, count = _BBOX.subn(replace, tag)
        if count != 1:
            raise ValueError(f"cannot read the data-bbox of {tag[:80]!r}")
        pieces += [html[position:start], moved]
        position = start + len(tag)
    return "".join([*pieces, html[position:]])


class _StartTags(HtmlReader):
    """The start tags that have a data-bbox, as (position, text)."""

    def __init__(self, html: str):
        super().__init__(html, convert_charrefs=False)
        self.found: list[tuple[int, str]] = []
        self.read()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        if "data-polygon" in names:
            raise ValueError(f"<{tag}> has a data-polygon, which is not read: give a data-bbox instead")
        if "data-bbox" in names:
            self.found.append((self.position, self.start_tag))


def read_bbox(value: str) -> Box:
    """The box in the value of a data-bbox.

    Example:
        >>> read_bbox("1 2 3 5")
        Box(x1=1.0, y1=2.0, x2=3.0, y2=5.0, label=None, image_index=0)
    """
    numbers = value.replace(",", " ").split()
    if len(numbers) != 4 or not all(_NUMBER.fullmatch(number) for number in numbers):
        raise ValueError(f"data-bbox {value!r} is not four numbers x1 y1 x2 y2")
    x1, y1, x2, y2 = (float(number) for number in numbers)
    return Box(x1, y1, x2, y2)


def rescale_document(html: str, scale_x: float, scale_y: float) -> str:
    """`html` for a picture that is `scale_x` times as wide and `scale_y` times as high; numbers are rounded to whole.

    Example:
        >>> rescale_document('<p data-bbox="10 20 30 50">a</p>', 0.5, 2)
        '<p data-bbox="5 40 15 100">a</p>'
    """

    def move(box: Box) -> list[float]:
        return [round(box.x1 * scale_x), round(box.y1 * scale_y), round(box.x2 * scale_x), round(box.y2 * scale_y)]

    return map_boxes(html, move)


def document_for_model(
    html: str,
    frame: Frame,
    convention: Convention,
    outside: Outside = "refuse",
    counts: Counter[str] | None = None,
) -> str:
    """`html` with boxes in original pixels -> as a model of `convention` writes it.

    Args:
        outside: "refuse" or "clip" boxes that leave the picture, see `coordinates.fit`.
        counts: told how many "shapes" there were, and how many were "clipped".

    Raises:
        ValueError: a box outside the picture, or one that cannot be read.

    Example:
        >>> from processing.coordinates import CONVENTIONS
        >>> frame = Frame(height=600, width=800, model_height=588, model_width=812)
        >>> document_for_model('<p data-bbox="80 60 800 600">a</p>', frame, CONVENTIONS["qwen2_5_vl"])
        '<p data-bbox="81 59 812 588">a</p>'
    """

    def move(box: Box) -> list[float]:
        shape, is_clipped = fit(box, frame, outside)
        if counts is not None:
            counts.update({"shapes": 1, "clipped": int(is_clipped)})
        return [number for pair in to_model(shape, frame, convention) for number in pair]

    return map_boxes(html, move)


def document_from_model(html: str, frame: Frame, convention: Convention) -> str:
    """`html` as a model of `convention` wrote it -> with boxes in original pixels (two decimals).

    Raises:
        ValueError: a number outside the range of the convention, or a box that cannot be read.
    """

    def move(box: Box) -> list[float]:
        return [number for pair in from_model(box.corners, frame, convention) for number in pair]

    return map_boxes(html, move)
