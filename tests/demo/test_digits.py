"""The digits and the forms they were written on."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from examples.handwriting.digits import DEV_FORMS, FORM_STARTS, TEST_FORMS, TRAIN_FORMS, digits_of


def test_every_form_begins_with_the_printed_row_and_goes_on_as_the_others_do():
    labels = load_digits().target
    for start in FORM_STARTS:
        # "0 to 9" three times, then 0 9 5 5 6 5. On three forms digits are missing, which the counts below allow for.
        beginning = labels[start : start + 38].tolist()
        assert sum(a == b for a, b in zip(beginning[:10], range(10), strict=True)) >= 6 or beginning[0] == 1
        assert "095565" in "".join(map(str, beginning))


def test_no_form_is_cut_in_two_the_key_of_the_form_stands_in_each_exactly_once():
    text = "".join(map(str, load_digits().target))
    stops = (*FORM_STARTS[1:], len(text))
    assert [text[a:b].count("095565") for a, b in zip(FORM_STARTS, stops, strict=True)] == [1] * 14


def test_training_development_and_test_share_no_form_and_no_digit_and_leave_none_out():
    parts = [set(digits_of(forms).indices.tolist()) for forms in (TRAIN_FORMS, DEV_FORMS, TEST_FORMS)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1797


def test_digits_come_with_their_own_label_and_in_the_range_of_ink():
    digits = digits_of((1,))
    data = load_digits()
    np.testing.assert_array_equal(digits.values, data.target[130:256])
    np.testing.assert_array_equal(digits.images[3] * 16, data.images[133])
    assert (digits.images.min(), digits.images.max()) == (0, 1)


def test_a_form_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"There are 14 forms, numbered from 0; \[14\]"):
        digits_of((3, 14))
