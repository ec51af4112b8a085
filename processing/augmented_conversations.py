"""Augmentation of whole conversations: the picture changes, its shapes and its texts follow, or nothing happens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from PIL import Image

from .augmentation import Sample, crop, flip, resize
from .coordinates import Frame, Shape, bounding_box
from .direction_words import CannotAugment, refuse_written_coordinates
from .document_boxes import map_boxes
from .grounding_mixin import shapes_in_pixels
from .parts import IMAGE_KEYS, SHAPES, Part, picture_of
from .pictures import ANYTHING, PictureLimits, load_picture

Message = dict[str, Any]
Operation = Callable[[Sample], Sample]


def augment(messages: Sequence[Message], operation: Operation, limits: PictureLimits = ANYTHING) -> list[Message]:
    """A copy of a conversation about one picture, with the picture, its shapes and its texts changed by `operation`.

    Shapes are given in pixels of the new picture. Boxes inside document parts move as well.

    Raises:
        CannotAugment: no picture or several (which one would "left" speak of?); a text that holds coordinates, which
            would not move; a shape that was dropped, since a text may speak of it; whatever the operation refuses.
        ValueError: a picture that cannot be loaded, a malformed part.

    Example:
        >>> box = {"type": "box", "bbox": [10, 0, 30, 20], "label": "left cup"}
        >>> messages = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (100, 50))}, box]}]
        >>> augment(messages, lambda sample: flip(sample, "horizontal"))[0]["content"][1]
        {'type': 'box', 'bbox': [[70, 0, 90, 20]], 'label': 'right cup'}
    """
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    pictures = [picture_of(part) for part in parts if part["type"] == "image"]
    if len(pictures) != 1:
        raise CannotAugment(f"the conversation has {len(pictures)} pictures, augmentation takes one")
    picture = load_picture(pictures[0], limits)
    frame = Frame(picture.height, picture.width, picture.height, picture.width)
    shapes: list[Shape] = []
    texts: list[str] = []

    def collect_shape(shape: Shape) -> Shape:
        shapes.append(shape)
        return shape

    def collect_text(text: str) -> str:
        refuse_written_coordinates(text)
        texts.append(text)
        return text

    _rewrite(messages, picture, frame, collect_shape, collect_text)
    shows_writing = any(part["type"] == "document" for part in parts)
    changed = operation(Sample(picture, tuple(shapes), tuple(texts), shows_writing))
    if len(changed.shapes) != len(shapes):
        raise CannotAugment(f"{len(shapes) - len(changed.shapes)} of {len(shapes)} shapes were cut away")
    new_shapes, new_texts = iter(changed.shapes), iter(changed.texts)
    return _rewrite(messages, changed.picture, frame, lambda _: next(new_shapes), lambda _: next(new_texts))


def _rewrite(
    messages: Sequence[Message],
    picture: Image.Image,
    frame: Frame,
    take_shape: Callable[[Shape], Shape],
    take_text: Callable[[str], str],
) -> list[Message]:
    """A copy of the conversation with every shape and text replaced by what is made of it, in order of appearance."""

    def rewrite(part: Part) -> Part:
        part = {key: value for key, value in part.items() if value is not None}
        kind = part["type"]
        if kind == "image":
            return {**{key: value for key, value in part.items() if key not in IMAGE_KEYS}, "image": picture}
        if kind in ("text", "ref"):
            return {**part, "text": take_text(part["text"])}
        if kind == "document":
            return {**part, "html": map_boxes(part["html"], lambda box: _numbers(take_shape(box)))}
        if kind in SHAPES:
            moved = [take_shape(shape) for shape in shapes_in_pixels(part, [frame], 1, "refuse", None)]
            kept = {key: value for key, value in part.items() if key not in ("normalized", "label")}
            label = {} if moved[0].label is None else {"label": moved[0].label}
            return {**kept, SHAPES[kind][0]: [_numbers(shape) for shape in moved], **label}
        raise CannotAugment(f"a part of type {kind!r} cannot be augmented")

    rewritten = []
    for message in messages:
        content = message["content"]
        content = take_text(content) if isinstance(content, str) else [rewrite(part) for part in content]
        rewritten.append({**message, "content": content})
    return rewritten


def _numbers(shape: Shape) -> list[float]:
    return [value for corner in shape.corners for value in corner]


@dataclass
class RandomAugmentation:
    """Chooses operations for conversations: the same for the same seed and number of the example, in any order.

    flip: probability of a horizontal flip; where words or writing forbid it, the picture is not flipped.
    crop: smallest part of each side that a crop keeps, in (0, 1]; 1 never crops. Crops keep every shape whole. Without
        shapes nothing is cropped: what the texts speak of is unknown then.
    scale: smallest and largest factor of a resize that keeps the aspect ratio.
    counts: how many conversations were "flipped", "cropped" and "resized", for how many a flip was refused ("flip
        refused"), and how many were left as they are ("refused": no picture or several, coordinates in a text).

    Example:
        >>> augmentation = RandomAugmentation(seed=3, flip=1, scale=(1, 1))
        >>> messages = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (100, 50))}]},
        ...             {"role": "assistant", "content": "It is on the left."}]
        >>> augmentation(messages, number=0)[1]["content"], augmentation.counts
        ('It is on the right.', Counter({'flipped': 1}))
    """

    seed: int
    flip: float = 0.5
    crop: float = 0.8
    scale: tuple[float, float] = (0.8, 1.25)
    limits: PictureLimits = ANYTHING
    counts: Counter[str] = field(default_factory=Counter, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is {self.flip}, a probability in [0, 1] is wanted")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop is {self.crop}, it must be in (0, 1]")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale is {self.scale}, it must be two factors > 0, the smaller first")

    def __call__(self, messages: Sequence[Message], number: int) -> list[Message]:
        """The conversation, augmented as its number says; unchanged where augmentation is refused.

        Raises:
            ValueError: a picture that cannot be loaded, a malformed part.
        """
        random = Random(f"{self.seed} {number}")
        done: Counter[str] = Counter()
        try:
            augmented = augment(messages, lambda sample: self._change(sample, random, done), self.limits)
        except CannotAugment:
            done = Counter({"refused": 1})
            augmented = list(messages)
        self.counts.update(done)
        return augmented

    def _change(self, sample: Sample, random: Random, done: Counter[str]) -> Sample:
        if random.random() < self.flip:
            try:
                sample = flip(sample, "horizontal")
                done["flipped"] += 1
            except CannotAugment:
                done["flip refused"] += 1
        if self.crop < 1 and sample.shapes:
            sample = crop(sample, *self._window(sample, random))
            done["cropped"] += 1
        factor = random.uniform(*self.scale)
        if factor != 1:
            width, height = sample.picture.size
            sample = resize(sample, max(1, round(height * factor)), max(1, round(width * factor)))
            done["resized"] += 1
        return sample

    def _window(self, sample: Sample, random: Random) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of a window that keeps all shapes whole and at least `crop` of each side."""
        hulls = [bounding_box(shape) for shape in sample.shapes]
        edges = []
        for side, first, last in (
            (sample.picture.width, min(hull.x1 for hull in hulls), max(hull.x2 for hull in hulls)),
            (sample.picture.height, min(hull.y1 for hull in hulls), max(hull.y2 for hull in hulls)),
        ):
            smallest = math.ceil(self.crop * side)
            start = random.randint(0, min(math.floor(first), side - smallest))
            edges.append((start, random.randint(max(math.ceil(last), start + smallest), side)))
        (left, right), (top, bottom) = edges
        return left, top, right, bottom
