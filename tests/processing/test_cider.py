"""CIDEr-D against the published evaluation code."""

import pytest

from processing.cider import cider_d

CAPTIONS = [
    "a red dog runs over the green grass",
    "two cats sleep on a red sofa",
    "a man rides a horse",
    "the the the dog dog",
]
REFERENCES = [
    ["a brown dog runs across the grass", "a dog is running over green grass in a park"],
    ["two cats are asleep on a sofa", "cats sleep on the red couch"],
    ["a man riding a brown horse"],
    ["the dog sits", "a dog"],
]


def test_scores_equal_those_of_the_published_code():
    # pycocoevalcap 1.2, CiderScorer(n=4, sigma=6.0) on the same captions.
    assert cider_d(CAPTIONS, REFERENCES) == pytest.approx([1.6320673, 2.87222088, 2.17717115, 1.06828576], abs=1e-7)


def test_a_perfect_caption_of_four_rare_words_scores_ten_and_an_unrelated_one_zero():
    scores = cider_d(["one two three four", "x"], [["one two three four"], ["y"]])
    assert scores == pytest.approx([10.0, 0.0])


def test_repeating_a_right_word_is_clipped():
    once, thrice = (cider_d([text, "x"], [["dog one"], ["cat two"]])[0] for text in ("dog", "dog dog dog"))
    assert thrice < once


def test_case_and_punctuation_do_not_count():
    references = [["a big dog"], ["two cats"]]
    assert cider_d(["A big, dog!", "x"], references) == cider_d(["a big dog", "x"], references)


def test_one_picture_alone_scores_zero_because_nothing_is_rare():
    assert cider_d(["a dog"], [["a dog"]]) == [0.0]


def test_a_picture_without_references_and_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="Picture 1 has no reference"):
        cider_d(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="2 captions, but references for 1 pictures"):
        cider_d(["a", "b"], [["a"]])
