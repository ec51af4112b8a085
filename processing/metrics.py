"""Scores of answers: pure functions from predicted and true text or boxes to numbers, for evaluation and rewards.

Every score of one answer lies in [0, 1]; `cider_d` alone scores a whole corpus and lies in [0, 10].
"""

import re
import string
from collections.abc import Sequence

import torch
from rapidfuzz.distance import Levenshtein
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_iou

from .coordinates import Box

# VQA v2 evaluation: articles are dropped and number words are written as digits.
ARTICLES = {"a", "an", "the"}
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBER_WORDS = {word: str(number) for number, word in enumerate(DIGITS)} | {"none": "0"}
# A comma or point between digits is part of the number and stays.
PUNCTUATION = re.compile(rf"(?<!\d)[{re.escape(string.punctuation)}]|[{re.escape(string.punctuation)}](?!\d)")


def iou(first: Box, second: Box) -> float:
    """Area of the intersection over that of the union; 0 for boxes in different pictures or without area.

    Example:
        >>> iou(Box(0, 0, 10, 10), Box(5, 0, 15, 10))  # 50 of 150
        0.3333333333333333
    """
    return float(iou_matrix([first], [second]))


def iou_matrix(first: Sequence[Box], second: Sequence[Box]) -> torch.Tensor:
    """(len(first), len(second)) float64 of intersections over unions; boxes of different pictures and those without
    area give 0."""
    corners_N4, corners_M4 = (
        torch.tensor([(box.x1, box.y1, box.x2, box.y2) for box in boxes], dtype=torch.float64).reshape(-1, 4)
        for boxes in (first, second)
    )
    pictures_N, pictures_M = (torch.tensor([box.image_index for box in boxes]) for boxes in (first, second))
    same_NM = pictures_N[:, None] == pictures_M[None, :]
    return box_iou(corners_N4, corners_M4).nan_to_num(0.0) * same_NM


def box_f1(predicted: Sequence[Box], true: Sequence[Box], threshold: float = 0.5) -> float:
    """F1 of the boxes found: a predicted and a true box match, one to one, if their IoU reaches `threshold`.

    The matching is the one with the largest summed IoU among pairs that reach the threshold (Hungarian algorithm).
    Of one true and one predicted box it is accuracy at IoU `threshold` as in RefCOCO. Labels are not compared. No box
    where there is none scores 1.

    Example:
        >>> box_f1([Box(0, 0, 10, 10), Box(50, 50, 60, 60)], [Box(0, 0, 10, 9)])  # one of two right, one of one found
        0.6666666666666666
    """
    if not predicted and not true:
        return 1.0
    ious_NM = iou_matrix(predicted, true)
    ious_NM = ious_NM.where(ious_NM >= threshold, 0.0)
    rows, columns = linear_sum_assignment(ious_NM.numpy(), maximize=True)
    num_matched = int((ious_NM[rows, columns] > 0).sum())
    return 2 * num_matched / (len(predicted) + len(true))


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """1 if the answer, stripped and with case folded, is one of `truths`.

    Example:
        >>> exact_match(" Paris ", ["paris", "Paris, France"])
        1.0
    """
    return float(answer.strip().casefold() in {truth.strip().casefold() for truth in truths})


def relaxed_accuracy(answer: str, truths: Sequence[str], tolerance: float = 0.05) -> float:
    """As `exact_match`, but numbers may be off by `tolerance` of the truth (ChartQA, arXiv 2203.10244, section 5.1).

    Example:
        >>> relaxed_accuracy("95.5%", ["100%"]), relaxed_accuracy("94%", ["100%"])
        (1.0, 0.0)
    """
    number = _number(answer)
    for truth in truths:
        true_number = _number(truth)
        if number is not None and true_number is not None:
            if abs(number - true_number) <= tolerance * abs(true_number):
                return 1.0
        elif exact_match(answer, [truth]):
            return 1.0
    return 0.0


def _number(text: str) -> float | None:
    match = re.fullmatch(r"\s*[$€£¥]?\s*([-+]?\d+(?:\.\d+)?)\s*%?\s*", text.replace(",", ""))
    return float(match[1]) if match else None


def normalise_vqa(answer: str) -> str:
    """The answer as the VQA v2 evaluation compares it: small letters, no punctuation, no articles, digits for words.

    The official script also puts apostrophes into some 120 contractions ("dont" -> "don't"); here they are taken out
    of both sides, which makes the same answers equal.

    Example:
        >>> normalise_vqa("The two dogs, don't!")
        '2 dogs dont'
    """
    words = PUNCTUATION.sub(" ", answer.casefold().replace("'", "").replace("’", "")).split()
    return " ".join(NUMBER_WORDS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, human_answers: Sequence[str]) -> float:
    """min(1, humans who said the same / 3), averaged over leaving out each human in turn (VQA v2, arXiv 1612.00837).

    With fewer than three humans, whose agreement could never reach 3, a single match counts as right.

    Example:
        >>> round(vqa_accuracy("dog", ["dog"] * 3 + ["cat"] * 7), 3)  # 3 times min(1, 2/3), 7 times 1
        0.9
    """
    answer = normalise_vqa(answer)
    same = [answer == normalise_vqa(human) for human in human_answers]
    if len(same) < 3:
        return float(any(same))
    return sum(min(1.0, (sum(same) - left_out) / 3) for left_out in same) / len(same)


def edit_similarity(answer: str, truth: str) -> float:
    """1 - Levenshtein distance / length of the longer text, in characters; 1 for two empty texts.

    Example:
        >>> edit_similarity("kitten", "sitting")  # 3 edits, 7 characters
        0.5714285714285714
    """
    return Levenshtein.normalized_similarity(answer, truth)


def anls(answer: str, truths: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one answer: its best similarity, 0 if below `threshold`.

    Case and surrounding blanks do not count (ST-VQA, arXiv 1905.13648, equation 1).

    Example:
        >>> anls("Sitting", ["kitten"]), anls("sat", ["kitten"])
        (0.5714285714285714, 0.0)
    """
    best = max((edit_similarity(answer.strip().lower(), truth.strip().lower()) for truth in truths), default=0.0)
    return best if best >= threshold else 0.0
