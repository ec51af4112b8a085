"""Scores on answers whose value a person can work out."""

import pytest
import torch

from processing.coordinates import Box
from processing.metrics import (
    anls,
    box_f1,
    edit_similarity,
    exact_match,
    iou,
    iou_matrix,
    normalise_vqa,
    relaxed_accuracy,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (Box(0, 0, 10, 10), 1.0),
        (Box(5, 0, 15, 10), 50 / 150),
        (Box(2, 3, 7, 5), 10 / 100),
        (Box(10, 0, 20, 10), 0.0),
        (Box(11, 11, 12, 12), 0.0),
    ],
)
def test_iou_is_intersection_over_union_in_both_orders(second, expected):
    first = Box(0, 0, 10, 10)
    assert iou(first, second) == iou(second, first) == pytest.approx(expected)


def test_boxes_of_different_pictures_never_overlap():
    assert iou(Box(0, 0, 10, 10, image_index=0), Box(0, 0, 10, 10, image_index=1)) == 0.0


def test_boxes_without_area_score_zero_and_not_nan():
    assert iou(Box(3, 3, 3, 3), Box(3, 3, 3, 3)) == 0.0


def test_the_iou_matrix_has_a_row_per_first_and_a_column_per_second_box():
    matrix = iou_matrix([Box(0, 0, 2, 2), Box(5, 5, 7, 7)], [Box(0, 0, 2, 2), Box(6, 5, 8, 7), Box(0, 0, 1, 2)])
    torch.testing.assert_close(matrix, torch.tensor([[1, 0, 0.5], [0, 1 / 3, 0]], dtype=torch.float64))


A, B, C = Box(0, 0, 10, 10), Box(20, 0, 30, 10), Box(40, 0, 50, 10)


@pytest.mark.parametrize(
    ("predicted", "true", "score"),
    [
        ([A], [A], 1.0),
        ([B], [A], 0.0),
        ([A, B, C], [C, A, B], 1.0),
        ([A, A, A], [A], 2 * 1 / 4),  # printing a box again does not pay
        ([A], [A, B, C], 2 * 1 / 4),
        ([A, B], [B, C], 2 * 1 / 4),
        ([], [A], 0.0),
        ([A], [], 0.0),
        ([], [], 1.0),
        ([Box(0, 0, 10, 5)], [A], 1.0),  # IoU exactly one half counts
        ([Box(0, 0, 10, 4.9)], [A], 0.0),
    ],
)
def test_box_f1_matches_one_to_one(predicted, true, score):
    assert box_f1(predicted, true) == pytest.approx(score)


def test_box_f1_finds_the_assignment_that_a_greedy_choice_misses():
    # P1 fits T1 (0.9) and T2 (0.8), P2 fits T1 (0.7) alone: only P1-T2, P2-T1 matches both.
    t1, t2 = Box(0, 0, 100, 10), Box(10, 0, 110, 10)
    p1, p2 = Box(4, 0, 104, 10), Box(-30, 0, 70, 10)
    assert iou(p1, t1) > iou(p1, t2) >= 0.5
    assert iou(p2, t1) >= 0.5 > iou(p2, t2)
    assert box_f1([p1, p2], [t1, t2]) == 1.0


def test_no_boxes_give_an_empty_matrix():
    assert iou_matrix([], [Box(0, 0, 1, 1)]).shape == (0, 1)


@pytest.mark.parametrize(
    ("answer", "truths", "score"),
    [("Seven ", ["seven"], 1.0), ("eight", ["seven"], 0.0), ("B", ["a", "b"], 1.0), ("", ["a"], 0.0), ("a", [], 0.0)],
)
def test_exact_match_folds_case_and_strips(answer, truths, score):
    assert exact_match(answer, truths) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("100", 1.0),
        ("105", 1.0),
        ("105.1", 0.0),
        ("95", 1.0),
        ("94.9", 0.0),
        ("100%", 1.0),
        ("about 100", 0.0),
        ("-100", 0.0),
    ],
)
def test_relaxed_accuracy_allows_numbers_five_percent_of_the_truth(answer, score):
    assert relaxed_accuracy(answer, ["100"]) == score


def test_relaxed_accuracy_of_words_is_exact_and_zero_must_be_zero():
    assert relaxed_accuracy("Blue", ["blue"]) == 1.0
    assert relaxed_accuracy("0.01", ["0"]) == 0.0
    assert relaxed_accuracy("1,050", ["1000"]) == 1.0


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("A dog.", "dog"),
        ("two cats!", "2 cats"),
        ("1,000", "1,000"),
        ("3.5 m", "3.5 m"),
        ("don't", "dont"),
        ("ice-cream", "ice cream"),
    ],
)
def test_vqa_normalisation(text, normal):
    assert normalise_vqa(text) == normal


@pytest.mark.parametrize(("agreeing", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_humans_is_three_tenths_per_agreeing_one(agreeing, score):
    # One of ten agrees: the other nine see one match (1/3 each), the one who agrees sees none: 9 * (1/3) / 10 = 0.3.
    humans = ["dog"] * agreeing + ["cat"] * (10 - agreeing)
    assert vqa_accuracy("The dog", humans) == pytest.approx(score)


def test_a_single_human_answer_decides_alone():
    assert vqa_accuracy("two", ["2"]) == 1.0
    assert vqa_accuracy("three", ["2"]) == 0.0


def test_edit_similarity_counts_edits_over_the_longer_text():
    assert edit_similarity("kitten", "sitting") == pytest.approx(4 / 7)
    assert edit_similarity("", "") == 1.0
    assert edit_similarity("", "abc") == 0.0


def test_anls_takes_the_best_truth_and_is_zero_below_one_half():
    assert anls("Sitting", ["xyz", "kitten"]) == pytest.approx(4 / 7)
    assert anls("abcd", ["abxy"]) == pytest.approx(0.5)
    assert anls("abcde", ["abxyz"]) == 0.0
    assert anls("a", []) == 0.0
