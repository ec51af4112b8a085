"""Shapes with their labels, drawn on a copy of their picture: the same colour for the same label, always."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageColor, ImageDraw, ImageFont

from .coordinates import Box, Pair, Point, Shape, bounding_box

# Told apart also by most colour-blind people: Okabe and Ito's palette without its black, and three more.
COLOURS = (
    "#d55e00",
    "#0072b2",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#f0e442",
    "#8b0000",
    "#4b0082",
    "#006400",
)
# Fonts with Chinese characters on common systems; never downloaded.
_CHINESE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "PingFang.ttc",
    "STHeiti Light.ttc",
    "msyh.ttc",
    "simsun.ttc",
)


def draw_shapes(
    picture: Image.Image,
    shapes: Sequence[Shape],
    *,
    min_side: int = 0,
    font_size: int | None = None,
    colours: Mapping[str | None, str] | None = None,
) -> Image.Image:
    """A copy of `picture` with boxes, quads and points and their labels.

    Args:
        shapes: in pixels of `picture`; those of other pictures of the conversation must be left out by the caller.
        min_side: pictures whose shorter side has fewer pixels are enlarged first, by a whole number, so that lines and
            labels do not cover them.
        font_size: in pixels; by default a 28th of the shorter side, at least 10.
        colours: colour of a label, such as "#ff0000"; others take `COLOURS` in order of appearance.

    A label whose characters no installed font has is written in escapes (`\\u5de6`).

    Example:
        >>> draw_shapes(Image.new("RGB", (30, 20)), [Box(2, 2, 20, 10, "cup")], min_side=200).size
        (300, 200)
    """
    factor = max(1, -(-min_side // min(picture.size)))
    drawn = picture.convert("RGB").resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    canvas = ImageDraw.Draw(drawn)
    size = font_size or max(10, min(drawn.size) // 28)
    line = max(1, min(drawn.size) // 200)
    chosen = colours_of([shape.label for shape in shapes], colours)
    for shape in shapes:
        _draw_shape(canvas, shape, [(x * factor, y * factor) for x, y in shape.corners], chosen[shape.label], line)
    # Labels last: no line runs through a word.
    for shape in shapes:
        if shape.label:
            hull = bounding_box(shape)
            _draw_label(
                canvas, shape.label, (hull.x1 * factor, hull.y1 * factor), chosen[shape.label], size, drawn.size
            )
    return drawn


def colours_of(labels: Sequence[str | None], given: Mapping[str | None, str] | None = None) -> dict[str | None, str]:
    """A colour for each label: as given, the others in order of appearance, repeating after `COLOURS` is used up.

    Example:
        >>> colours_of(["cup", "dog", "cup"], {"dog": "#ffffff"})
        {'cup': '#d55e00', 'dog': '#ffffff'}
    """
    chosen = dict(given or {})
    free = [colour for colour in COLOURS if colour not in chosen.values()] or list(COLOURS)
    others = [label for label in dict.fromkeys(labels) if label not in chosen]
    chosen |= {label: free[index % len(free)] for index, label in enumerate(others)}
    return {label: chosen[label] for label in dict.fromkeys(labels)}


def _draw_shape(canvas: ImageDraw.ImageDraw, shape: Shape, corners: Sequence[Pair], colour: str, line: int) -> None:
    if isinstance(shape, Point):
        ((x, y),) = corners
        radius = 3 * line
        canvas.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour, outline="white")
    elif isinstance(shape, Box):
        (x1, y1), (x2, y2) = corners
        # A box ends at the right edge of its last pixel, a rectangle of Pillow covers its last pixel.
        canvas.rectangle([x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)], outline=colour, width=line)
    else:
        canvas.line([*corners, corners[0]], fill=colour, width=line, joint="curve")
        # Where the text starts.
        (x, y) = corners[0]
        canvas.ellipse([x - 2 * line, y - 2 * line, x + 2 * line, y + 2 * line], fill=colour)


def _draw_label(
    canvas: ImageDraw.ImageDraw, label: str, corner: Pair, colour: str, size: int, limits: tuple[int, int]
) -> None:
    """Above the shape's top left corner; below it where there is no room above, and never outside the picture."""
    words = " ".join(label.split())
    font = _font(words, size)
    if not _has_glyphs(font, words):
        words = words.encode("ascii", "backslashreplace").decode()
    left, top, right, bottom = canvas.textbbox((0, 0), words, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = max(0, min(corner[0], limits[0] - width))
    y = corner[1] - height if corner[1] >= height else min(corner[1], limits[1] - height)
    canvas.rectangle([x, y, x + width, y + height], fill=colour)
    canvas.text((x + 2 - left, y + 2 - top), words, font=font, fill=_readable_on(colour))


def _readable_on(colour: str) -> str:
    red, green, blue = ImageColor.getrgb(colour)[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _font(words: str, size: int) -> ImageFont.FreeTypeFont:
    """DejaVu, which matplotlib ships, or an installed font with Chinese where DejaVu lacks a character."""
    plain = _named_font(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)
    assert plain is not None, "matplotlib ships this font"
    if not _has_glyphs(plain, words):
        for name in _CHINESE_FONTS:
            font = _named_font(name, size)
            if font is not None and _has_glyphs(font, words):
                return font
    return plain


@lru_cache(maxsize=64)
def _named_font(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


def _has_glyphs(font: ImageFont.FreeTypeFont, words: str) -> bool:
    """Whether `font` can draw every character: a missing one looks like the missing U+10FFFF."""
    missing = bytes(font.getmask("\U0010ffff"))
    return all(bytes(font.getmask(letter)) != missing for letter in set(words) if not letter.isspace())
