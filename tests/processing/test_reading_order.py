"""Columns are read left to right, each from top to bottom, and a line across the page ends the columns above it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from processing.coordinates import Box
from processing.reading_order import reading_order


def test_a_title_over_two_columns_with_paragraphs_that_end_at_the_same_height():
    page = [
        Box(0, 0, 100, 10),
        *(Box(0, 20, 45, 50), Box(0, 60, 45, 90)),
        *(Box(55, 20, 100, 50), Box(55, 60, 100, 90)),
    ]
    assert reading_order(page) == [0, 1, 2, 3, 4]
    assert reading_order(page[::-1]) == [4, 3, 2, 1, 0]


def test_a_figure_across_the_page_separates_what_is_above_from_what_is_below():
    page = [
        *(Box(0, 0, 45, 30), Box(55, 0, 100, 30)),
        Box(0, 40, 100, 60),
        *(Box(0, 70, 45, 90), Box(55, 70, 100, 90)),
    ]
    assert reading_order([page[i] for i in (4, 2, 1, 3, 0)]) == [4, 2, 1, 3, 0]


def test_three_columns_with_a_footer():
    page = [Box(0, 0, 30, 80), Box(35, 0, 65, 40), Box(35, 45, 65, 80), Box(70, 0, 100, 80), Box(0, 90, 100, 95)]
    assert reading_order([page[i] for i in (4, 3, 2, 1, 0)]) == [4, 3, 2, 1, 0]


def test_boxes_that_overlap_a_little_are_still_two_columns():
    assert reading_order([Box(49, 0, 100, 30), Box(0, 40, 50, 70), Box(0, 0, 50, 39), Box(49, 31, 100, 70)]) == [
        2,
        1,
        0,
        3,
    ]


def test_boxes_that_overlap_by_more_than_a_little_are_no_columns():
    # 40 wide, each gives up 2 on either side: an overlap of 6 remains one of 2.
    assert reading_order([Box(0, 20, 40, 40), Box(34, 0, 74, 10)]) == [1, 0]
    assert reading_order([Box(0, 20, 40, 40), Box(36, 0, 76, 10)]) == [0, 1]


def test_blocks_that_nothing_separates_go_by_top_then_left():
    assert reading_order([Box(0, 5, 60, 60), Box(20, 0, 100, 55), Box(40, 5, 100, 60)]) == [1, 0, 2]


def test_no_boxes_have_an_order_too():
    assert reading_order([]) == []


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 40)] * 4)))
def test_every_box_is_read_once(corners):
    page = [Box(x, y, x + width, y + height) for x, y, width, height in corners]
    assert sorted(reading_order(page)) == list(range(len(page)))


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.randoms())
def test_a_grid_of_blocks_is_read_by_column_however_it_is_shuffled(num_columns, num_rows, random):
    grid = [Box(20 * x, 20 * y, 20 * x + 15, 20 * y + 15) for x in range(num_columns) for y in range(num_rows)]
    shuffled = random.sample(grid, len(grid))
    assert [shuffled[index] for index in reading_order(shuffled)] == grid
