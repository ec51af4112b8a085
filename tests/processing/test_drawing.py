"""Shapes drawn on a copy of their picture."""

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageColor

from processing.coordinates import Box, Point, Quad
from processing.drawing import COLOURS, _font, _has_glyphs, colours_of, draw_shapes

WHITE = Image.new("RGB", (110, 70), "white")
FIRST, SECOND = (ImageColor.getrgb(colour) for colour in COLOURS[:2])


def test_a_box_is_framed_just_inside_its_edges():
    drawn = draw_shapes(WHITE, [Box(20, 30, 50, 60)])
    frame = [(20, 30), (49, 30), (20, 59), (49, 59), (35, 30), (20, 45)]
    assert [drawn.getpixel(corner) for corner in frame] == [FIRST] * 6
    assert [drawn.getpixel(xy) for xy in [(35, 45), (19, 45), (50, 45), (35, 29), (35, 60)]] == [(255, 255, 255)] * 5


def test_a_quad_is_an_outline_and_a_point_a_dot():
    drawn = draw_shapes(WHITE, [Quad(60, 10, 100, 20, 95, 50, 58, 40), Point(20, 20)])
    assert drawn.getpixel((80, 15)) == FIRST
    assert drawn.getpixel((77, 30)) == (255, 255, 255)
    assert drawn.getpixel((20, 20)) == FIRST


def test_the_picture_itself_is_not_drawn_on_and_drawing_repeats_exactly():
    picture = WHITE.copy()
    shapes = [Box(20, 30, 50, 60, "cup"), Point(5, 5, "tip")]
    first, second = draw_shapes(picture, shapes), draw_shapes(picture, shapes)
    assert ImageChops.difference(first, second).getbbox() is None
    assert ImageChops.difference(picture, WHITE).getbbox() is None


def test_equal_labels_share_a_colour_and_different_ones_do_not():
    shapes = [Box(2, 20, 20, 60, "cup"), Box(30, 20, 50, 60, "dog"), Box(60, 20, 80, 60, "cup")]
    drawn = draw_shapes(WHITE, shapes)
    assert [drawn.getpixel((x, 40)) for x in (2, 30, 60)] == [FIRST, SECOND, FIRST]
    red = draw_shapes(WHITE, shapes, colours={"dog": "#ff0000"})
    assert [red.getpixel((x, 40)) for x in (2, 30)] == [FIRST, (255, 0, 0)]


def test_colours_repeat_only_when_all_are_used():
    labels = [str(number) for number in range(len(COLOURS) + 1)]
    colours = colours_of(labels)
    assert len(set(colours.values())) == len(COLOURS)
    assert colours[labels[-1]] == colours[labels[0]]
    assert colours_of(["a", "b"], {"a": COLOURS[0]})["b"] == COLOURS[1]


def test_a_tiny_picture_is_enlarged_by_a_whole_number_and_boxes_with_it():
    drawn = draw_shapes(Image.new("RGB", (11, 7), "white"), [Box(2, 3, 5, 6)], min_side=64)
    assert drawn.size == (110, 70)
    assert drawn.getpixel((20, 45)) == drawn.getpixel((49, 59)) == FIRST
    assert drawn.getpixel((19, 45)) == (255, 255, 255)


@pytest.mark.parametrize("box", [Box(0, 0, 9, 9, "a long label"), Box(100, 60, 110, 70, "a long label")])
def test_a_label_stays_inside_the_picture(box):
    drawn = np.asarray(draw_shapes(WHITE, [box]))
    alone = np.asarray(draw_shapes(WHITE, [Box(box.x1, box.y1, box.x2, box.y2)]))
    ys, xs = np.nonzero((drawn != alone).any(-1))
    assert np.ptp(xs) > 50, "the whole label is visible, not what a corner leaves of it"
    assert np.ptp(ys) >= 9


def test_no_label_draws_no_words():
    outline = draw_shapes(WHITE, [Box(20, 30, 50, 60)])
    assert ImageChops.difference(outline, draw_shapes(WHITE, [Box(20, 30, 50, 60, "")])).getbbox() is None


def test_a_character_that_no_font_has_is_noticed():
    assert _has_glyphs(_font("cup", 12), "cup Ω→")
    assert not _has_glyphs(_font("cup", 12), "\U000f0000")


def test_chinese_is_drawn_with_a_font_that_has_it_or_in_escapes():
    font = _font("杯子", 12)
    readable = _has_glyphs(font, "杯子")
    label = "杯子" if readable else r"\u676f\u5b50"
    drawn = draw_shapes(WHITE, [Box(5, 40, 100, 60, "杯子")])
    assert ImageChops.difference(drawn, draw_shapes(WHITE, [Box(5, 40, 100, 60, label)])).getbbox() is None
    assert ImageChops.difference(drawn, draw_shapes(WHITE, [Box(5, 40, 100, 60, "椅子")])).getbbox() is not None
