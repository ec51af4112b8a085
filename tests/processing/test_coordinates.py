"""Shapes in original pixels, and the integers of each family."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from processing.coordinates import (
    CONVENTIONS,
    NUM_CORNERS,
    Box,
    Frame,
    Point,
    Quad,
    bounding_box,
    clip_numbers,
    fit,
    from_model,
    make_shape,
    move,
    to_model,
)
from processing.parts import SHAPES
from processing.smart_resize import smart_resize

FRAME = Frame(height=600, width=800, model_height=588, model_width=812)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwenvl", ((100, 250), (999, 999))),
        ("qwen2_vl", ((100, 250), (999, 999))),
        ("qwen2_5_vl", ((81, 147), (812, 588))),
        ("qwen3_vl", ((100, 250), (1000, 1000))),
    ],
)
def test_each_family_counts_in_its_own_units_and_up_to_its_own_end(name, expected):
    assert to_model(Box(80, 150, 800, 600), FRAME, CONVENTIONS[name]) == expected


def test_x_is_measured_on_the_width_and_y_on_the_height():
    assert to_model(Point(400, 150), FRAME, CONVENTIONS["qwen3_vl"]) == ((500, 250),)
    assert from_model([(500, 250)], FRAME, CONVENTIONS["qwen3_vl"]) == ((400.0, 150.0),)
    assert from_model([(406, 147)], FRAME, CONVENTIONS["qwen2_5_vl"]) == ((400.0, 150.0),)


@pytest.mark.parametrize("name", ["qwenvl", "qwen2_vl", "qwen3_vl"])
def test_normalized_numbers_are_thousandths_and_not_parts_of_999(name):
    assert from_model([(999, 500)], FRAME, CONVENTIONS[name]) == ((799.2, 300.0),)
    assert to_model(Point(400, 300), FRAME, CONVENTIONS[name]) == ((500, 500),)


def test_coordinates_are_rounded_to_the_nearest_not_down():
    assert to_model(Point(0.7, 0.4), Frame(1000, 1000, 28, 28), CONVENTIONS["qwenvl"]) == ((1, 0),)


@st.composite
def frames(draw):
    """A picture, of any size and shape, as smart_resize shows it within any limits."""
    height, width = draw(st.integers(1, 20_000)), draw(st.integers(1, 20_000))
    assume(max(height, width) <= 200 * min(height, width))
    factor = draw(st.sampled_from([28, 32]))
    min_pixels = draw(st.integers(1, 10**6))
    max_pixels = draw(st.integers(max(min_pixels, factor**2), 2 * 10**7))
    return Frame(
        height, width, *smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
    )


@pytest.mark.parametrize("name", CONVENTIONS)
@settings(max_examples=150, deadline=None)
@given(frame=frames(), fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_round_trip_errs_by_no_more_than_the_contract_allows(name, frame, fractions):
    convention = CONVENTIONS[name]
    point = Point(fractions[0] * frame.width, fractions[1] * frame.height)
    numbers = to_model(point, frame, convention)
    ((x, y),) = from_model(numbers, frame, convention)
    for before, after, side, seen in (
        (point.x, x, frame.width, frame.model_width),
        (point.y, y, frame.height, frame.model_height),
    ):
        half_a_step = 0.5 * side / (convention.steps or seen)
        far_end = before > side * (1 - 0.5 / 1000) and name in ("qwenvl", "qwen2_vl")
        assert abs(before - after) <= (2 if far_end else 1) * half_a_step * (1 + 1e-9)
        assert 0 <= after <= side


@pytest.mark.parametrize("name", CONVENTIONS)
@settings(max_examples=60, deadline=None)
@given(frame=frames(), fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_what_a_model_wrote_survives_the_way_through_pixels_exactly(name, frame, fractions):
    convention = CONVENTIONS[name]
    last_x, last_y = (convention.last,) * 2 if convention.last else (frame.model_width, frame.model_height)
    numbers = ((round(fractions[0] * last_x), round(fractions[1] * last_y)),)
    ((x, y),) = from_model(numbers, frame, convention)
    assert to_model(Point(x, y), frame, convention) == numbers


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box(5, 0, 3, 9), "box has x1 5 > x2 3.*xyxy"),
        (lambda: Box(0, 7, 3, 2, label="a cup"), "box 'a cup' has y1 7 > y2 2"),
        (lambda: Box(0, math.nan, 1, 1), r"box has a corner \(0, nan\): coordinates must be finite"),
        (lambda: Quad(0, 0, 1, 0, 1, math.inf, 0, 1), r"quad has a corner \(1, inf\)"),
        (lambda: Point(-math.inf, 0), r"point has a corner \(-inf, 0\)"),
        (lambda: make_shape("quad", [1, 2, 3, 4]), "a quad has 8 numbers, this one has 4"),
        (lambda: Frame(0, 5, 28, 28), "at least one pixel, not 0x5"),
        (lambda: fit(Box(0, 0, 1, 1), FRAME, outside="drop"), "outside is 'drop'"),
    ],
)
def test_malformed_shapes_are_refused_with_their_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_box_may_be_thin_but_not_inverted():
    assert Box(3, 4, 3, 4).area == 0
    assert Box(3, 5, 10, 7).area == 14


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Box(0, 0, 801, 10), r"box has x 801, but the picture is 600x800"),
        (Box(-1, 0, 8, 10, label="cup"), "box 'cup' has x -1"),
        (Point(3, 600.5), "point has y 600.5, but"),
        (Quad(0, 0, 1, 0, 1, 700, 0, 1), "quad has y 700, but"),
    ],
)
def test_a_shape_that_leaves_its_picture_is_refused_with_both_numbers(shape, message):
    for refuse in (lambda: to_model(shape, FRAME, CONVENTIONS["qwenvl"]), lambda: fit(shape, FRAME)):
        with pytest.raises(ValueError, match=message):
            refuse()


def test_clipping_moves_corners_to_the_edge_and_says_so():
    assert fit(Box(-5, 10, 900, 20, label="a"), FRAME, "clip") == (Box(0, 10, 800, 20, label="a"), True)
    assert fit(Quad(-5, 1, 9, 1, 9, 700, 0, 5), FRAME, "clip") == (Quad(0, 1, 9, 1, 9, 600, 0, 5), True)
    assert fit(Box(1, 2, 3, 5), FRAME, "clip") == (Box(1, 2, 3, 5), False)


@pytest.mark.parametrize("shape", [Box(900, 0, 950, 9), Box(0, -9, 5, 0), Point(801, 3), Box(-4, 0, 0, 9)])
def test_a_shape_wholly_outside_is_refused_even_when_clipping(shape):
    with pytest.raises(ValueError, match="but the picture is 600x800"):
        fit(shape, FRAME, "clip")


@pytest.mark.parametrize(
    ("name", "corner", "message"),
    [
        ("qwenvl", (1000, 5), r"x 1000 is outside 0 \.\.\. 999"),
        ("qwen3_vl", (5, 1001), r"y 1001 is outside 0 \.\.\. 1000"),
        ("qwen2_5_vl", (813, 5), r"x 813 is outside 0 \.\.\. 812 \(the picture's 588x812\)"),
        ("qwen2_5_vl", (5, -1), r"y -1 is outside 0 \.\.\. 588"),
    ],
)
def test_numbers_out_of_a_models_range_are_refused_or_clipped_into_it(name, corner, message):
    convention = CONVENTIONS[name]
    with pytest.raises(ValueError, match=message):
        from_model([corner], FRAME, convention)
    clipped = clip_numbers([corner], FRAME, convention)
    assert len(from_model(clipped, FRAME, convention)) == 1
    assert sum(a != b for a, b in zip(clipped[0], corner, strict=True)) == 1


def test_moving_a_box_sorts_its_corners_and_moving_a_quad_does_not():
    assert move(Box(1, 2, 3, 5, label="a", image_index=7), [(9, 8), (6, 4)]) == Box(6, 4, 9, 8, "a", 7)
    assert move(Quad(1, 2, 3, 5, 0, 0, 0, 0), [(9, 8), (6, 4), (1, 1), (2, 2)]) == Quad(9, 8, 6, 4, 1, 1, 2, 2)
    assert move(Point(1, 2, "p", 3), [(5, 6)]) == Point(5, 6, "p", 3)


def test_the_bounding_box_spans_all_corners():
    assert bounding_box(Quad(5, 2, 9, 3, 8, 7, 4, 6, label="t", image_index=2)) == Box(4, 2, 9, 7, "t", 2)


def test_shapes_have_as_many_numbers_here_as_in_a_row():
    assert {kind: 2 * corners for kind, corners in NUM_CORNERS.items()} == {k: n for k, (_, n) in SHAPES.items()}
