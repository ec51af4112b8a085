"""The 1797 handwritten digits that scikit-learn ships, kept apart by the form, and so by the hand, that wrote them.

scikit-learn does not say who wrote which digit, but its order does: everybody copied the same preprinted form
("0123456789" three times, then 0 9 5 5 6 5 0 9 8 ...), about 130 digits long, and the forms follow each other.
Their beginnings can be read off the labels (`FORM_STARTS`; a test checks them). There are 14 forms and, says the
data's description, 13 people, so one person may have filled two forms; apart from that, forms are people.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (the test part).
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from sklearn.datasets import load_digits

FORM_STARTS = (0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667)

# Recipes were chosen on `DEV_FORMS` with `TRAIN_FORMS` for training; the report's model learns from both and is asked
# about `TEST_FORMS`. docs/demo.md says which choice looked at those.
TRAIN_FORMS = tuple(range(9))
DEV_FORMS = (9, 10)
TEST_FORMS = (11, 12, 13)


@dataclass(frozen=True)
class Digits:
    """Some of the digits: `indices` (N,) into scikit-learn's order, `images` (N, 8, 8) in [0, 1], `values` (N,)."""

    indices: np.ndarray
    images: np.ndarray
    values: np.ndarray


@cache
def digits_of(forms: tuple[int, ...]) -> Digits:
    """The digits of these forms (0 to 13), in scikit-learn's order.

    Example:
        >>> [len(digits_of(forms).values) for forms in (TRAIN_FORMS, DEV_FORMS, TEST_FORMS)]
        [1157, 258, 382]
    """
    if wrong := [form for form in forms if not 0 <= form < len(FORM_STARTS)]:
        raise ValueError(f"There are {len(FORM_STARTS)} forms, numbered from 0; {wrong} are not among them.")
    data = load_digits()
    stops = (*FORM_STARTS[1:], len(data.target))
    indices = np.concatenate([np.arange(FORM_STARTS[form], stops[form]) for form in forms])
    return Digits(indices, (data.images[indices] / 16.0).astype(np.float32), data.target[indices])
