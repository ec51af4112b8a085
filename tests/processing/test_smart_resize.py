"""The predicted size: what transformers does, within its limits, and early refusals."""

import math

import pytest
import qwen_vl_utils
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl, image_processing_qwen2_vl

from processing.smart_resize import smart_resize

sides = st.integers(1, 4000)
factors = st.sampled_from([4, 28, 32])


@st.composite
def cases(draw):
    height, width, factor = draw(sides), draw(sides), draw(factors)
    assume(max(height, width) <= 200 * min(height, width))
    low = draw(st.integers(1, 10**6))
    return height, width, factor, low, draw(st.integers(max(low, factor**2), 10**7))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_it_is_the_size_of_both_image_processors_of_transformers(case):
    height, width, factor, low, high = case
    ours = smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high)
    for module in (image_processing_pil_qwen2_vl, image_processing_qwen2_vl):
        assert ours == module.smart_resize(height, width, factor, low, high)


@settings(max_examples=300, deadline=None)
@given(cases())
def test_sides_are_multiples_and_within_one_factor_of_the_limits(case):
    height, width, factor, low, high = case
    resized = smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high)
    assert all(side >= factor and side % factor == 0 for side in resized)
    if math.prod(resized) > high:  # then it would be within, were each side one factor shorter
        assert (resized[0] - factor) * (resized[1] - factor) < high
    if math.prod(resized) < low:
        assert (resized[0] + factor) * (resized[1] + factor) > low


@settings(max_examples=300, deadline=None)
@given(cases())
def test_it_agrees_with_qwen_vl_utils_where_no_side_is_below_half_a_factor(case):
    height, width, factor, low, high = case
    assume(min(height, width) > factor / 2)
    theirs = qwen_vl_utils.smart_resize(height, width, factor, low, high)
    assume(min(theirs) > 0)
    assert smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high) == theirs


@pytest.mark.parametrize(
    ("height", "width", "low", "high", "expected", "peer"),
    [
        (600, 800, 3136, 1_003_520, (588, 812), (588, 812)),
        (3000, 4000, 3136, 1_003_520, (840, 1148), (840, 1148)),
        (5, 7, 3136, 1_003_520, (56, 84), (56, 84)),
        (42, 42, 1, 1_003_520, (56, 56), (56, 56)),  # halves go to the even multiple
        (70, 70, 1, 1_003_520, (56, 56), (56, 56)),
        (10, 2000, 3136, 1_003_520, (28, 812), (28, 1988)),
        (100, 5000, 784, 3136, (28, 392), (0, 392)),
        (60, 80, 3136, 3136, (28, 56), (28, 56)),
    ],
)
def test_the_edges_are_as_documented(height, width, low, high, expected, peer):
    assert smart_resize(height, width, factor=28, min_pixels=low, max_pixels=high) == expected
    assert qwen_vl_utils.smart_resize(height, width, 28, low, high) == peer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 28, 784, 3136), "0x5 pixels .* is empty"),
        ((1, 201, 28, 784, 3136), r"1x201 pixels .* 201\.0 times as long as the other, the limit is 200"),
        ((401, 2, 28, 784, 3136), r"401x2 pixels .* 200\.5 times"),
        ((50, 50, 28, 4000, 3136), "min_pixels 4000 > max_pixels 3136"),
        ((50, 50, 28, 1, 783), "max_pixels 783 is less than one tile of 28x28 = 784"),
        ((50, 50, 28, 0, 784), "min_pixels is 0"),
        ((50, 50, 28, 1, 784.5), "max_pixels is 784.5, it must be a whole number"),
        ((50, 50, True, 1, 784), "factor is True"),
    ],
)
def test_what_cannot_be_resized_is_refused_with_the_numbers(arguments, message):
    height, width, factor, low, high = arguments
    with pytest.raises(ValueError, match=message):
        smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high)


def test_a_ratio_of_exactly_200_is_accepted():
    assert smart_resize(2, 400, factor=4, min_pixels=16, max_pixels=10_000) == (4, 60)
