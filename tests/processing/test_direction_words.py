"""Words that a flip makes untrue."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from processing.direction_words import CannotAugment, refuse_written_coordinates, swap_directions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The left cup, the RIGHT one and the Leftmost.", "The right cup, the LEFT one and the Rightmost."),
        ("upper-left corner, top_right, left-hand side", "upper-right corner, top_left, right-hand side"),
        ("Is it on the left or the right?", "Is it on the right or the left?"),
        ("Is the dog left or right?", "Is the dog right or left?"),
        ("It is left of the bright, upright copyright sign.", "It is right of the bright, upright copyright sign."),
        ("左边的猫在右上角", "右边的猫在左上角"),
        ("nothing to see above", "nothing to see above"),
    ],
)
def test_left_and_right_change_places(text, expected):
    assert swap_directions(text, "horizontal") == expected
    assert swap_directions(expected, "horizontal") == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Above the cup", "Below the cup"),
        ("top left, BOTTOM right", "bottom left, TOP right"),
        ("the upper and the lowermost shelf", "the lower and the uppermost shelf"),
        ("All right, left.", "All right, left."),
    ],
)
def test_above_and_below_change_places(text, expected):
    assert swap_directions(text, "vertical") == expected


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("Do it right now.", "right now"),
        ("That's right.", "That's right"),
        ("Is this the cup, right?", r"right\?"),
        ("How many are left?", "are left"),
        ("Two cups have left the table.", "have left"),
        ("left over food", "left over"),
        ("the clockwise arrow", "clockwise"),
        ("at 3 o'clock", "o'clock"),
        ("the western part", "western"),
        ("the topLeft corner", "topLeft"),
        ("human rights", "rights"),
        ("三十左右", "左右"),
        ("顺时针", "顺时针"),
    ],
)
def test_words_whose_opposite_is_not_certain_are_refused(text, word):
    with pytest.raises(
        CannotAugment, match=rf"cannot tell what '?\"?{word}'?\"? becomes in a picture flipped horizontally"
    ):
        swap_directions(text, "horizontal")


@pytest.mark.parametrize(
    "text", ["a cup on top of it", "under it", "look up", "north", "higher", "桌子上", "向下", "upside"]
)
def test_vertical_words_without_a_plain_opposite_are_refused(text):
    with pytest.raises(CannotAugment, match="flipped vertically"):
        swap_directions(text, "vertical")


@given(st.lists(st.sampled_from(["left", "Right", "cup", "左", "右边", "RIGHTMOST", ",", "on the"])).map(" ".join))
def test_swapping_twice_gives_the_text_back(text):
    try:
        swapped = swap_directions(text, "horizontal")
    except CannotAugment:
        return
    assert swap_directions(swapped, "horizontal") == text


@pytest.mark.parametrize(
    "text",
    [
        "<box>(1,2),(3,4)</box>",
        "at (12, 40)",
        "[1, 2, 3, 4]",
        '{"bbox_2d": 1}',
        "<|box_start|>",
        '<p data-bbox="1 2 3 4">',
    ],
)
def test_coordinates_in_a_text_are_refused(text):
    with pytest.raises(CannotAugment, match="the text holds coordinates"):
        refuse_written_coordinates(text)


@pytest.mark.parametrize("text", ["(1) a cup, 2 dogs", "1,000 cups", "[a, b]", "in 2023 (May)"])
def test_other_numbers_are_not_coordinates(text):
    refuse_written_coordinates(text)
