"""Crop, resize, pad and flip a picture together with its shapes and with the words that speak of left and right.

An operation takes and gives a `Sample`: it moves every shape, or refuses; what a crop cuts away goes by a stated rule
and is counted. `augmented_conversations.py` applies operations to conversations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from PIL import Image, ImageOps

from .coordinates import Box, Pair, Quad, Shape, bounding_box, move
from .direction_words import Axis, CannotAugment, swap_directions


@dataclass(frozen=True)
class Sample:
    """A picture, the shapes on it in its pixels, and the texts about it.

    shows_writing: the task reads what is written in the picture, which a flip would make unreadable.
    num_clipped, num_dropped: shapes that crops have cut, or taken away, so far.
    """

    picture: Image.Image
    shapes: tuple[Shape, ...] = ()
    texts: tuple[str, ...] = ()
    shows_writing: bool = False
    num_clipped: int = 0
    num_dropped: int = 0


Operation = Callable[[Sample], Sample]


def resize(sample: Sample, height: int, width: int) -> Sample:
    """Any size, bicubic; the aspect ratio need not stay.

    Example:
        >>> resize(Sample(Image.new("RGB", (10, 20)), (Box(1, 2, 3, 4),)), height=40, width=30).shapes
        (Box(x1=3.0, y1=4.0, x2=9.0, y2=8.0, label=None, image_index=0),)
    """
    if height < 1 or width < 1:
        raise ValueError(f"cannot resize to {height}x{width} pixels (height x width)")
    old_width, old_height = sample.picture.size
    picture = sample.picture.resize((width, height), Image.Resampling.BICUBIC)
    return _moved(sample, picture, lambda x, y: (x * width / old_width, y * height / old_height))


def pad(sample: Sample, left: int, top: int, right: int, bottom: int, colour: str = "black") -> Sample:
    """Adds a border of so many pixels on each side."""
    if min(left, top, right, bottom) < 0:
        raise ValueError(f"cannot pad by {(left, top, right, bottom)} pixels: crop takes away")
    picture = ImageOps.expand(sample.picture, (left, top, right, bottom), fill=colour)
    return _moved(sample, picture, lambda x, y: (x + left, y + top))


def flip(sample: Sample, axis: Axis) -> Sample:
    """Mirrors the picture, and swaps left and right (above and below) in texts and labels.

    Raises:
        CannotAugment: words whose opposite is not certain (direction_words.py), or a picture whose writing is read:
            `shows_writing`, or quads, which mark lines of text.
    """
    if sample.shows_writing or any(isinstance(shape, Quad) for shape in sample.shapes):
        raise CannotAugment("the picture's writing is read, and a flip would make it unreadable")
    width, height = sample.picture.size
    texts = tuple(swap_directions(text, axis) for text in sample.texts)
    labels = [None if shape.label is None else swap_directions(shape.label, axis) for shape in sample.shapes]
    shapes = tuple(replace(shape, label=label) for shape, label in zip(sample.shapes, labels, strict=True))
    sample = replace(sample, shapes=shapes, texts=texts)
    if axis == "horizontal":
        return _moved(sample, ImageOps.mirror(sample.picture), lambda x, y: (width - x, y))
    return _moved(sample, ImageOps.flip(sample.picture), lambda x, y: (x, height - y))


def crop(sample: Sample, left: int, top: int, right: int, bottom: int, min_visible: float = 0.5) -> Sample:
    """The window from (left, top) to (right, bottom), right and bottom excluded.

    A shape of whose bounding box at least `min_visible` (0 ... 1, by area) lies in the window is kept, clipped to it;
    the others are dropped; a point is in or out. Both are counted in the sample.

    Raises:
        ValueError: a window that is empty or leaves the picture.

    Example:
        >>> shapes = (Box(0, 0, 40, 10, "a"), Box(70, 0, 90, 10, "b"), Point(5, 5))
        >>> sample = crop(Sample(Image.new("RGB", (100, 100)), shapes), 10, 0, 75, 100)
        >>> sample.shapes, sample.num_clipped, sample.num_dropped
        ((Box(x1=0, y1=0, x2=30, y2=10, label='a', image_index=0),), 1, 2)
    """
    width, height = sample.picture.size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(
            f"the window {(left, top)} to {(right, bottom)} is empty or leaves the picture of {width}x{height} (x, y)"
        )
    if not 0 <= min_visible <= 1:
        raise ValueError(f"min_visible is {min_visible}, it must be in [0, 1]")
    window = Box(left, top, right, bottom)
    kept = []
    num_clipped = 0
    for shape in sample.shapes:
        visible = visible_fraction(shape, window)
        if visible < min_visible or visible == 0:
            continue
        corners = [(min(max(x, left), right), min(max(y, top), bottom)) for x, y in shape.corners]
        num_clipped += tuple(corners) != shape.corners
        kept.append(move(shape, corners))
    cut = replace(
        sample,
        shapes=tuple(kept),
        num_clipped=sample.num_clipped + num_clipped,
        num_dropped=sample.num_dropped + len(sample.shapes) - len(kept),
    )
    return _moved(cut, sample.picture.crop((left, top, right, bottom)), lambda x, y: (x - left, y - top))


def visible_fraction(shape: Shape, window: Box) -> float:
    """The part of a shape's bounding box that lies in `window`, 0 ... 1; without area: 1 if it lies in it, else 0.

    Example:
        >>> visible_fraction(Box(0, 0, 10, 10), window=Box(5, 0, 100, 100))
        0.5
    """
    hull = bounding_box(shape)
    width = min(hull.x2, window.x2) - max(hull.x1, window.x1)
    height = min(hull.y2, window.y2) - max(hull.y1, window.y1)
    if hull.area > 0:
        return max(width, 0) * max(height, 0) / hull.area
    return float(width == hull.x2 - hull.x1 and height == hull.y2 - hull.y1)


def _moved(sample: Sample, picture: Image.Image, to: Callable[[float, float], Pair]) -> Sample:
    shapes = tuple(move(shape, [to(x, y) for x, y in shape.corners]) for shape in sample.shapes)
    return replace(sample, picture=picture, shapes=shapes)
