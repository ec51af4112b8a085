"""Scenes: one to three handwritten digits in colour on paper, with a box drawn tightly around the ink of each.

Legend: N glyphs, S = `GLYPH` side of a glyph's square, all lengths in pixels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import affine_grid, grid_sample

from examples.handwriting.digits import Digits

SIZE = 40
GLYPH = 15
GRID = 5
NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {"red": (205, 30, 35), "green": (20, 140, 60), "blue": (35, 70, 205), "black": (25, 25, 30)}
PLACES = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)
_INK = 0.25  # a pixel this dark belongs to the digit


@dataclass(frozen=True)
class Mark:
    """One digit in a scene: its value, colour, source (index in scikit-learn's data) and box xyxy in pixels."""

    value: int
    colour: str
    source: int
    box: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        return NUMERALS[self.value]

    @property
    def place(self) -> str:
        """Which third of the scene, across and down, the middle of the box lies in: "top left" ... "bottom right"."""
        x1, y1, x2, y2 = self.box
        return PLACES[int((y1 + y2) / 2 * 3 / SIZE)][int((x1 + x2) / 2 * 3 / SIZE)]


@dataclass(frozen=True)
class Scene:
    """A picture (SIZE, SIZE, 3) uint8 and its marks in reading order (by row of places, then from the left)."""

    pixels: np.ndarray
    marks: tuple[Mark, ...]

    @property
    def picture(self) -> Image.Image:
        return Image.fromarray(self.pixels)

    def blanked(self) -> "Scene":
        """The same marks on empty paper: what a model that cannot see gets."""
        return Scene(np.full_like(self.pixels, 255), self.marks)


def glyphs(digits: Digits, sources: np.ndarray, rng: np.random.Generator, jitter: float = 1.0) -> np.ndarray:
    """Ink in [0, 1] of the digits at positions `sources` (N,) of `digits`: (N, S, S) float32.

    Each is enlarged from 8x8 by bilinear interpolation, turned by up to 12 degrees, slanted by up to 0.15 and
    shrunk to between 0.8 and 1 of the square, times `jitter`.
    """
    ink_N88 = torch.from_numpy(digits.images[sources])[:, None]
    angle, slant, shrink = rng.uniform(-1, 1, size=(3, len(sources))) * np.array([[0.21], [0.15], [0.1]]) * jitter
    grow = 1 / (0.9 + shrink)  # the grid says where each output pixel looks: looking further shrinks
    theta = np.zeros((len(sources), 2, 3), dtype=np.float32)
    theta[:, 0, 0], theta[:, 0, 1] = grow * np.cos(angle), grow * (slant - np.sin(angle))
    theta[:, 1, 0], theta[:, 1, 1] = grow * np.sin(angle), grow * np.cos(angle)
    grid = affine_grid(torch.from_numpy(theta), [len(sources), 1, GLYPH, GLYPH], align_corners=False)
    return grid_sample(ink_N88, grid, align_corners=False)[:, 0].numpy()


def tight_box(ink_SS: np.ndarray, left: int, top: int) -> tuple[int, int, int, int]:
    """xyxy around the ink of one glyph whose square begins at (left, top); x2 and y2 lie just outside the ink."""
    columns, rows = np.flatnonzero((ink_SS > _INK).any(0)), np.flatnonzero((ink_SS > _INK).any(1))
    return (left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1)


def _corners(count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """`count` corners (left, top) of glyph squares that do not overlap."""
    while True:
        corners = GRID * rng.integers(0, (SIZE - GLYPH) // GRID + 1, size=(count, 2))
        gaps = np.abs(corners[:, None] - corners[None]).max(-1) + np.eye(count, dtype=int) * GLYPH
        if gaps.min() >= GLYPH:
            return [(int(left), int(top)) for left, top in corners]


def make_scenes(digits: Digits, count: int, seed: int, most: int = 3, least: int = 1) -> list[Scene]:
    """`count` scenes of `least` to `most` different digits in different colours, the same for the same seed."""
    rng = np.random.default_rng(seed)
    by_value = [np.flatnonzero(digits.values == value) for value in range(10)]
    numbers = rng.integers(least, most + 1, size=count)
    chosen = np.array([rng.choice(by_value[v]) for n in numbers for v in rng.permutation(10)[:n]])
    ink_NSS = glyphs(digits, chosen, rng)
    scenes, first = [], 0
    for n in numbers:
        pixels = np.full((SIZE, SIZE, 3), 255, dtype=np.float32)
        marks = []
        colours = rng.permutation(list(COLOURS))[:n]
        for glyph, colour, (left, top) in zip(range(first, first + n), colours, _corners(n, rng), strict=True):
            window = pixels[top : top + GLYPH, left : left + GLYPH]
            window += ink_NSS[glyph][..., None] * (np.array(COLOURS[colour], dtype=np.float32) - window)
            box = tight_box(ink_NSS[glyph], left, top)
            source = int(digits.indices[chosen[glyph]])
            marks.append(Mark(int(digits.values[chosen[glyph]]), str(colour), source, box))
        first += n
        rows = [[place for places in PLACES for place in places].index(mark.place) for mark in marks]
        ordered = tuple(mark for _, mark in sorted(zip(rows, marks, strict=True), key=lambda p: (p[0], p[1].box)))
        scenes.append(Scene(pixels.round().clip(0, 255).astype(np.uint8), ordered))
    return scenes


def pixels_of(scenes: list[Scene]) -> np.ndarray:
    """All pictures in one array (N, SIZE, SIZE, 3) uint8."""
    return np.stack([scene.pixels for scene in scenes])


def as_row(scene: Scene) -> dict[str, Any]:
    """What is saved beside a sample picture: the marks as plain values."""
    return {"digits": [{"digit": m.name, "colour": m.colour, "place": m.place, "box": m.box} for m in scene.marks]}
