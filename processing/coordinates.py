"""Boxes, quads and points: original pixels here, the integers that a family of models writes there, and back.

A shape is always in pixels of the original picture: floats, x to the right, y down, origin at the top left corner of
the top left pixel, so that the whole picture of W x H pixels is the box (0, 0, W, H). What a model reads and writes is
integers in the range of its `Convention`. Only `to_model` and `from_model` cross that border.

Largest error of a round trip, per axis, for any picture size and any pixel limits (measured in docs/coordinates.md):

| convention | integers                            | error                                              |
|------------|-------------------------------------|----------------------------------------------------|
| qwenvl     | 0 ... 999, thousandths of the side  | 1/2000 of the side; 1/1000 at its far end          |
| qwen2_vl   | 0 ... 999, thousandths of the side  | 1/2000 of the side; 1/1000 at its far end          |
| qwen2_5_vl | 0 ... side of the resized picture   | half a pixel of the resized picture                |
| qwen3_vl   | 0 ... 1000, thousandths of the side | 1/2000 of the side                                 |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

Pair = tuple[float, float]
Outside = Literal["refuse", "clip"]


@dataclass(frozen=True)
class Box:
    """Upright rectangle in pixels of the original picture, x1 <= x2 and y1 <= y2.

    `image_index` counts the pictures of the conversation from 0.

    Raises:
        ValueError: NaN or infinity, or a second corner left of or above the first (xywh taken for xyxy?).

    Example:
        >>> Box(10, 20, 30, 20.5, label="a nail").corners
        ((10, 20), (30, 20.5))
    """

    kind: ClassVar[str] = "box"
    x1: float
    y1: float
    x2: float
    y2: float
    label: str | None = None
    image_index: int = 0

    def __post_init__(self) -> None:
        _refuse_infinite(self)
        if self.x2 < self.x1 or self.y2 < self.y1:
            axis, first, second = ("x", self.x1, self.x2) if self.x2 < self.x1 else ("y", self.y1, self.y2)
            raise ValueError(
                f"{_name(self)} has {axis}1 {first:g} > {axis}2 {second:g}: give the top left and the bottom right "
                f"corner (xyxy), not a corner and a size (xywh)"
            )

    @property
    def corners(self) -> tuple[Pair, ...]:
        """Top left and bottom right."""
        return (self.x1, self.y1), (self.x2, self.y2)

    @property
    def area(self) -> float:
        """In square pixels of the original picture."""
        return (self.x2 - self.x1) * (self.y2 - self.y1)


@dataclass(frozen=True)
class Quad:
    """Four corners in pixels of the original picture, for text lines that are not upright.

    By convention clockwise from where the text starts: top left, top right, bottom right, bottom left (Qwen-VL paper,
    appendix B.1). The order is kept as given and not checked: a line may be written in any direction.
    """

    kind: ClassVar[str] = "quad"
    x1: float
    y1: float
    x2: float
    y2: float
    x3: float
    y3: float
    x4: float
    y4: float
    label: str | None = None
    image_index: int = 0

    def __post_init__(self) -> None:
        _refuse_infinite(self)

    @property
    def corners(self) -> tuple[Pair, ...]:
        return (self.x1, self.y1), (self.x2, self.y2), (self.x3, self.y3), (self.x4, self.y4)


@dataclass(frozen=True)
class Point:
    """One place in pixels of the original picture."""

    kind: ClassVar[str] = "point"
    x: float
    y: float
    label: str | None = None
    image_index: int = 0

    def __post_init__(self) -> None:
        _refuse_infinite(self)

    @property
    def corners(self) -> tuple[Pair, ...]:
        return ((self.x, self.y),)


Shape = Box | Quad | Point
SHAPE_TYPES: dict[str, Callable[..., Shape]] = {cls.kind: cls for cls in (Box, Quad, Point)}
NUM_CORNERS = {"box": 2, "quad": 4, "point": 1}


def make_shape(kind: str, numbers: Sequence[float], label: str | None = None, image_index: int = 0) -> Shape:
    """A shape from its numbers in a row.

    Example:
        >>> make_shape("point", [3, 4], label="nose")
        Point(x=3, y=4, label='nose', image_index=0)
    """
    if len(numbers) != 2 * NUM_CORNERS[kind]:
        raise ValueError(f"a {kind} has {2 * NUM_CORNERS[kind]} numbers, this one has {len(numbers)}: {list(numbers)}")
    return SHAPE_TYPES[kind](*numbers, label=label, image_index=image_index)


def bounding_box(shape: Shape) -> Box:
    """The smallest upright box around a shape; of a point, a box without area."""
    xs, ys = zip(*shape.corners, strict=True)
    return Box(min(xs), min(ys), max(xs), max(ys), label=shape.label, image_index=shape.image_index)


def move(shape: Shape, corners: Sequence[Pair]) -> Shape:
    """The same shape at other corners; of a box, the two corners may come in any order."""
    if isinstance(shape, Box):
        (xa, ya), (xb, yb) = corners
        return replace(shape, x1=min(xa, xb), y1=min(ya, yb), x2=max(xa, xb), y2=max(ya, yb))
    numbers = [value for corner in corners for value in corner]
    return make_shape(shape.kind, numbers, shape.label, shape.image_index)


@dataclass(frozen=True)
class Convention:
    """How a family of models writes places.

    steps: a side of the picture is this many units long; None: as many as the picture that the model sees has pixels.
    last: the largest number of a normalised convention; smaller than `steps` where the range excludes its end.
    text: how the numbers stand in a text, see grounding_text.py.
    """

    name: str
    steps: int | None
    last: int | None
    text: Literal["tags", "special_tokens", "json"]

    def __post_init__(self) -> None:
        assert (self.steps is None) == (self.last is None)

    @property
    def is_normalized(self) -> bool:
        return self.steps is not None


# Sources: Qwen-VL paper, section 2.2 ("normalized within the range [0, 1000)"); Qwen2-VL paper, section 2 (the same);
# Qwen2.5-VL report, section 2.1 (absolute, at the size of the input); Qwen3-VL README (relative, 0 to 1000).
# Numbers of Qwen-VL are thousandths, as its drawing code and its data say; only the original's RefCOCO evaluation
# divides by 999.
CONVENTIONS = {
    convention.name: convention
    for convention in (
        Convention("qwenvl", steps=1000, last=999, text="tags"),
        Convention("qwen2_vl", steps=1000, last=999, text="special_tokens"),
        Convention("qwen2_5_vl", steps=None, last=None, text="json"),
        Convention("qwen3_vl", steps=1000, last=1000, text="json"),
    )
}


@dataclass(frozen=True)
class Frame:
    """The size of one picture, original and as the model sees it, in pixels."""

    height: int
    width: int
    model_height: int
    model_width: int

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.model_height, self.model_width) < 1:
            raise ValueError(
                f"a picture has at least one pixel, not {self.height}x{self.width} (height x width) seen as "
                f"{self.model_height}x{self.model_width}"
            )


def to_model(shape: Shape, frame: Frame, convention: Convention) -> tuple[tuple[int, int], ...]:
    """The corners of `shape` as the integers (x, y) that a model of this convention writes.

    Rounds to the nearest integer. Rounding down, as some preprocessing code does, would double the error and shift all
    boxes up and left.

    Raises:
        ValueError: a corner outside the picture; `fit` clips.

    Example:
        >>> frame = Frame(height=600, width=800, model_height=588, model_width=812)
        >>> to_model(Box(80, 60, 800, 600), frame, CONVENTIONS["qwen2_5_vl"])
        ((81, 59), (812, 588))
        >>> to_model(Box(80, 60, 800, 600), frame, CONVENTIONS["qwenvl"])
        ((100, 100), (999, 999))
    """
    refuse_outside(shape, frame)
    steps_x, steps_y, last_x, last_y = _units(frame, convention)
    return tuple(
        (min(round(x * steps_x / frame.width), last_x), min(round(y * steps_y / frame.height), last_y))
        for x, y in shape.corners
    )


def from_model(corners: Sequence[Pair], frame: Frame, convention: Convention) -> tuple[Pair, ...]:
    """The corners (x, y) that a model wrote, in pixels of the original picture.

    Raises:
        ValueError: a number outside the range of the convention.

    Example:
        >>> frame = Frame(height=600, width=800, model_height=588, model_width=812)
        >>> from_model([(406, 294)], frame, CONVENTIONS["qwen2_5_vl"])
        ((400.0, 300.0),)
    """
    steps_x, steps_y, last_x, last_y = _units(frame, convention)
    for x, y in corners:
        for axis, value, last in (("x", x, last_x), ("y", y, last_y)):
            if not 0 <= value <= last:
                unit = "" if convention.is_normalized else f" (the picture's {frame.model_height}x{frame.model_width})"
                raise ValueError(f"{axis} {value:g} is outside 0 ... {last}{unit}")
    return tuple((x * frame.width / steps_x, y * frame.height / steps_y) for x, y in corners)


def clip_numbers(corners: Sequence[Pair], frame: Frame, convention: Convention) -> tuple[Pair, ...]:
    """Corners that a model wrote, moved into the range of the convention."""
    _, _, last_x, last_y = _units(frame, convention)
    return tuple((min(max(x, 0), last_x), min(max(y, 0), last_y)) for x, y in corners)


def _units(frame: Frame, convention: Convention) -> tuple[int, int, int, int]:
    """Units per side (x, y) and the largest number (x, y)."""
    if convention.steps is None:
        return frame.model_width, frame.model_height, frame.model_width, frame.model_height
    assert convention.last is not None
    return convention.steps, convention.steps, convention.last, convention.last


def refuse_outside(shape: Shape, frame: Frame) -> None:
    """ValueError with both numbers for a corner outside the original picture."""
    for x, y in shape.corners:
        for axis, value, side in (("x", x, frame.width), ("y", y, frame.height)):
            if not 0 <= value <= side:
                raise ValueError(
                    f"{_name(shape)} has {axis} {value:g}, but the picture is {frame.height}x{frame.width} pixels "
                    f"(height x width): are the boxes of another size of this picture? Clipping can be asked for"
                )


def fit(shape: Shape, frame: Frame, outside: Outside = "refuse") -> tuple[Shape, bool]:
    """The shape within its picture, and whether it had to be changed.

    outside: "refuse" raises for any corner outside the picture; "clip" moves the corners of boxes and quads to its
        edge. A box or quad that does not touch the picture, and a point outside it, are refused either way: what
        clipping would make of them shows nothing.

    Example:
        >>> fit(Box(-2, 5, 50, 60), Frame(40, 100, 40, 100), outside="clip")
        (Box(x1=0, y1=5, x2=50, y2=40, label=None, image_index=0), True)
    """
    if outside not in ("refuse", "clip"):
        raise ValueError(f"outside is {outside!r}, it must be 'refuse' or 'clip'")
    hull = bounding_box(shape)
    touches = hull.x1 < frame.width and hull.x2 > 0 and hull.y1 < frame.height and hull.y2 > 0
    if outside == "refuse" or isinstance(shape, Point) or not touches:
        refuse_outside(shape, frame)
        return shape, False
    corners = [(min(max(x, 0), frame.width), min(max(y, 0), frame.height)) for x, y in shape.corners]
    return move(shape, corners), tuple(corners) != shape.corners


def _refuse_infinite(shape: Shape) -> None:
    for x, y in shape.corners:
        if not (math.isfinite(x) and math.isfinite(y)):
            raise ValueError(f"{_name(shape)} has a corner ({x}, {y}): coordinates must be finite")


def _name(shape: Shape) -> str:
    return shape.kind if shape.label is None else f"{shape.kind} {shape.label!r}"
