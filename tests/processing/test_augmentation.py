"""Shapes stay on what they mark: a coloured rectangle is followed through every operation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from processing.augmentation import Sample, crop, flip, pad, resize, visible_fraction
from processing.coordinates import Box, Point, Quad
from processing.direction_words import CannotAugment

WIDTH, HEIGHT = 31, 23


def marked(box, texts=(), others=()):
    """A black picture of 31 x 23 whose pixels inside `box` (whole numbers) are white."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[int(box.y1) : int(box.y2), int(box.x1) : int(box.x2)] = 255
    return Sample(Image.fromarray(pixels), (box, *others), tuple(texts))


def white(picture):
    """The bounding box of the white pixels."""
    ys, xs = np.nonzero(np.asarray(picture)[..., 0] > 127)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def corners(shape):
    return tuple(value for corner in shape.corners for value in corner)


boxes = st.tuples(st.integers(0, 14), st.integers(0, 10), st.integers(15, WIDTH), st.integers(11, HEIGHT)).map(
    lambda numbers: Box(*numbers)
)


@settings(max_examples=40, deadline=None)
@given(box=boxes, axis=st.sampled_from(["horizontal", "vertical"]))
def test_a_flipped_box_is_where_its_object_is(box, axis):
    flipped = flip(marked(box), axis)
    assert corners(flipped.shapes[0]) == white(flipped.picture)
    assert corners(flip(flipped, axis).shapes[0]) == corners(box)


@settings(max_examples=40, deadline=None)
@given(box=boxes, sides=st.tuples(*[st.integers(0, 9)] * 4))
def test_a_padded_box_is_where_its_object_is(box, sides):
    padded = pad(marked(box), *sides)
    assert padded.picture.size == (WIDTH + sides[0] + sides[2], HEIGHT + sides[1] + sides[3])
    assert corners(padded.shapes[0]) == white(padded.picture)


@settings(max_examples=40, deadline=None)
@given(
    box=boxes, window=st.tuples(st.integers(0, 12), st.integers(0, 8), st.integers(17, WIDTH), st.integers(13, HEIGHT))
)
def test_a_cropped_box_is_where_its_object_is(box, window):
    cropped = crop(marked(box), *window, min_visible=0)
    assert cropped.picture.size == (window[2] - window[0], window[3] - window[1])
    assert corners(cropped.shapes[0]) == white(cropped.picture)
    is_inside = box.x1 >= window[0] and box.y1 >= window[1] and box.x2 <= window[2] and box.y2 <= window[3]
    assert (cropped.num_clipped, cropped.num_dropped) == (not is_inside, 0)


@settings(max_examples=40, deadline=None)
@given(box=boxes, height=st.sampled_from([23, 46, 69]), width=st.sampled_from([31, 62, 93]))
def test_a_resized_box_is_where_its_object_is(box, height, width):
    resized = resize(marked(box), height, width)
    assert resized.picture.size == (width, height)
    np.testing.assert_allclose(corners(resized.shapes[0]), white(resized.picture), atol=1)


def test_points_and_labels_move_along():
    sample = Sample(Image.new("RGB", (100, 50)), (Point(10, 20, "left tip", 3),), ("What is right?  The left tip.",))
    with pytest.raises(CannotAugment, match="right"):
        flip(sample, "horizontal")
    flipped = flip(Sample(sample.picture, sample.shapes, ("The LEFT tip",)), "horizontal")
    assert flipped.shapes == (Point(90, 20, "right tip", 3),)
    assert flipped.texts == ("The RIGHT tip",)
    assert flip(Sample(sample.picture, (Point(10, 20),), ("top",)), "vertical").shapes == (Point(10, 30),)


def test_quads_move_corner_by_corner_but_writing_is_not_flipped():
    sample = Sample(Image.new("RGB", (100, 50)), (Quad(10, 4, 40, 6, 40, 16, 10, 14, "Exit"),))
    padded = pad(sample, 5, 7, 0, 0)
    assert padded.shapes == (Quad(15, 11, 45, 13, 45, 23, 15, 21, "Exit"),)
    assert resize(sample, 100, 50).shapes == (Quad(5, 8, 20, 12, 20, 32, 5, 28, "Exit"),)
    assert crop(sample, 5, 5, 100, 50).shapes == (Quad(5, 0, 35, 1, 35, 11, 5, 9, "Exit"),)
    for unreadable in (sample, Sample(sample.picture, shows_writing=True)):
        with pytest.raises(CannotAugment, match="unreadable"):
            flip(unreadable, "horizontal")


def test_a_crop_drops_what_is_mostly_outside_and_counts_it():
    shapes = (
        Box(0, 0, 20, 10, "half in"),
        Box(0, 20, 21, 30, "less than half in"),
        Box(30, 30, 40, 40, "in"),
        Box(60, 0, 90, 10, "out"),
        Point(9, 5, "out"),
        Point(10, 5, "on the edge"),
        Box(15, 15, 15, 20, "in, without area"),
        Box(5, 15, 5, 20, "out, without area"),
    )
    cropped = crop(Sample(Image.new("RGB", (100, 100)), shapes), 10, 0, 50, 100)
    assert [shape.label for shape in cropped.shapes] == [
        "half in",
        "less than half in",
        "in",
        "on the edge",
        "in, without area",
    ]
    assert (cropped.num_clipped, cropped.num_dropped) == (2, 3)
    again = crop(cropped, 5, 0, 40, 100, min_visible=1)
    assert [shape.label for shape in again.shapes] == ["in", "in, without area"]
    assert (again.num_clipped, again.num_dropped) == (2, 6)


@pytest.mark.parametrize(
    ("window", "expected"),
    [((0, 0, 50, 50), 1), ((5, 0, 50, 50), 0.5), ((5, 5, 50, 50), 0.25), ((10, 0, 50, 50), 0), ((20, 20, 50, 50), 0)],
)
def test_the_visible_fraction_is_a_share_of_the_area(window, expected):
    assert visible_fraction(Box(0, 0, 10, 10), Box(*window)) == expected


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda s: crop(s, 5, 0, 5, 9), "is empty or leaves the picture of 31x23"),
        (lambda s: crop(s, 0, 0, 32, 9), "leaves the picture"),
        (lambda s: crop(s, -1, 0, 12, 9), "leaves the picture"),
        (lambda s: crop(s, 0, 0, 12, 9, min_visible=2), "min_visible is 2"),
        (lambda s: pad(s, -1, 0, 0, 0), "crop takes away"),
        (lambda s: resize(s, 0, 5), "cannot resize to 0x5"),
    ],
)
def test_impossible_operations_are_refused(operation, message):
    with pytest.raises(ValueError, match=message):
        operation(Sample(Image.new("RGB", (WIDTH, HEIGHT))))


def test_the_sample_that_is_given_stays_as_it_is():
    sample = marked(Box(2, 3, 5, 7), texts=["left"])
    flip(crop(resize(pad(sample, 1, 1, 1, 1), 50, 60), 0, 0, 40, 40), "horizontal")
    assert (sample.shapes, sample.texts, white(sample.picture)) == ((Box(2, 3, 5, 7),), ("left",), (2, 3, 5, 7))
