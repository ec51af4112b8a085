"""Rewards for boxes: how well they fit, how many are right, and whether there are as many as there should be.

Answers are read in the model's own convention by the processor's `parse_answer` and compared with the truth in pixels
of the original picture. A malformed shape counts as one that fits nothing, so no reward gains from printing more boxes
or broken ones. None for rows whose solution has no boxes. Labels are not compared.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from scipy.optimize import linear_sum_assignment

from processing.coordinates import Box, bounding_box
from processing.metrics import box_f1, iou_matrix
from trainers.reward_solution import AnswerReader, Completion, answer_of, read_solution, text_of

Found = tuple[list[Box], int, list[Box]]  # boxes of the answer, number of malformed ones, true boxes


def box_iou(
    completions: Sequence[Completion], solution: Sequence[Any], reader: Sequence[AnswerReader], **_: Any
) -> list[float | None]:
    """Intersection over union, summed over the best matching and divided by the boxes that there are or should be.

    For one box and one true box it is their IoU. In [0, 1]; no boxes where there are none is 1.

    Example, with the reader of a picture of 100 x 100 pixels:
        >>> box_iou([[{"content": "<box>(0,0),(500,1000)</box>"}]], [[0, 0, 100, 100]], [reader])
        [0.5]
    """
    return [None if found is None else _mean_iou(*found) for found in _found(completions, solution, reader)]


def box_f1_at_half(
    completions: Sequence[Completion], solution: Sequence[Any], reader: Sequence[AnswerReader], **_: Any
) -> list[float | None]:
    """F1 of the boxes that reach an IoU of 0.5 with a true box of their own (Hungarian matching, metrics.box_f1).

    Example, two boxes of which one is right:
        >>> two = [{"content": "<box>(0,0),(900,999)</box><box>(0,0),(9,9)</box>"}]
        >>> box_f1_at_half([two], [[0, 0, 99, 99]], [reader])
        [0.6666666666666666]
    """
    return [None if found is None else _f1(*found) for found in _found(completions, solution, reader)]


def box_count(
    completions: Sequence[Completion], solution: Sequence[Any], reader: Sequence[AnswerReader], **_: Any
) -> list[float | None]:
    """A penalty in [-1, 0]: boxes missing or too many, over the number that there should be.

    Example:
        >>> box_count([[{"content": "I see none."}]], [[0, 0, 99, 99]], [reader])
        [-1.0]
    """
    return [None if found is None else _count(*found) for found in _found(completions, solution, reader)]


def _found(
    completions: Sequence[Completion], solution: Sequence[Any], reader: Sequence[AnswerReader]
) -> list[Found | None]:
    found: list[Found | None] = []
    for completion, value, read in zip(completions, solution, reader, strict=True):
        truth = read_solution(value)
        if truth.boxes is None:
            found.append(None)
            continue
        parsed = read.shapes(answer_of(text_of(completion)), truth.image_index)
        # A problem without a box is one box that hits nothing. All boxes are about the same picture, the solution's.
        boxes = [replace(bounding_box(shape), image_index=truth.image_index or 0) for shape in parsed.shapes]
        found.append((boxes, len(parsed.problems), list(truth.boxes)))
    return found


def _mean_iou(boxes: list[Box], num_malformed: int, true_boxes: list[Box]) -> float:
    number = max(len(boxes) + num_malformed, len(true_boxes))
    if number == 0:
        return 1.0
    ious_NM = iou_matrix(boxes, true_boxes).numpy()
    rows, columns = linear_sum_assignment(ious_NM, maximize=True)
    return float(ious_NM[rows, columns].sum()) / number


def _f1(boxes: list[Box], num_malformed: int, true_boxes: list[Box]) -> float:
    total = len(boxes) + len(true_boxes)
    if total + num_malformed == 0:
        return 1.0
    # Malformed boxes enlarge the denominator alone. Without any box and truth, box_f1 is 1, and nothing was right.
    return box_f1(boxes, true_boxes) * total / (total + num_malformed)


def _count(boxes: list[Box], num_malformed: int, true_boxes: list[Box]) -> float:
    wrong = abs(len(boxes) + num_malformed - len(true_boxes))
    return -min(1.0, wrong / max(1, len(true_boxes)))
