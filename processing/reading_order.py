"""The order in which a person reads the blocks of a page: columns left to right, each from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence

from .coordinates import Box

# Annotated boxes overlap a little where the page has a gap: to find it, each side gives up this part of its length.
_OVERLAP = 0.05


def reading_order(boxes: Sequence[Box]) -> list[int]:
    """Indices of `boxes` in reading order, by recursive XY-cut (Nagy and Seth, 1984).

    A page is cut at the vertical gaps that run through all of it, into columns. A page without such a gap is cut at
    its horizontal gaps, into bands; neighbouring bands through which one vertical gap runs stay together, because they
    are one set of columns. Blocks that no gap separates are ordered by their top, then left side.

    It is a rule, not an understanding: a form whose labels stand left of their fields is read label by label.

    Example, a title over two columns:
        >>> reading_order([Box(55, 20, 100, 90), Box(0, 0, 100, 10), Box(0, 60, 45, 90), Box(0, 20, 45, 50)])
        [1, 3, 2, 0]
    """
    return _order(list(range(len(boxes))), boxes)


def _order(indices: list[int], boxes: Sequence[Box]) -> list[int]:
    columns = _cut(indices, boxes, "x")
    if len(columns) > 1:
        return [index for column in columns for index in _order(column, boxes)]
    bands = _cut(indices, boxes, "y")
    if len(bands) > 1:
        groups: list[list[int]] = []
        for band in bands:
            if groups and len(_cut(groups[-1] + band, boxes, "x")) > 1:
                groups[-1] = groups[-1] + band
            else:
                groups.append(band)
        return [index for group in groups for index in _order(group, boxes)]
    return sorted(indices, key=lambda index: (boxes[index].y1, boxes[index].x1))


def _cut(indices: list[int], boxes: Sequence[Box], axis: str) -> list[list[int]]:
    """`indices` in groups between which a gap runs along the other axis; one group where there is none."""
    intervals = []
    for index in indices:
        box = boxes[index]
        start, end = (box.x1, box.x2) if axis == "x" else (box.y1, box.y2)
        give = _OVERLAP * (end - start)
        intervals.append((start + give, end - give, index))
    groups: list[list[int]] = []
    covered = float("-inf")
    for start, end, index in sorted(intervals):
        if groups and start < covered:
            groups[-1].append(index)
        else:
            groups.append([index])
        covered = max(covered, end)
    return groups
