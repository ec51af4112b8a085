"""Rewards for pages written as QwenVL HTML: text, boxes, reading order, and whether the HTML holds.

The answer's elements are matched with the true page's by the overlap of their boxes (Hungarian matching); what is
missing or too much counts against all of them. None for rows whose solution has no `html`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from scipy.optimize import linear_sum_assignment

from processing.coordinates import Box
from processing.document_parsing import ParsedDocument, parse_document
from processing.documents import Document
from processing.metrics import edit_similarity, iou_matrix
from trainers.reward_solution import AnswerReader, Completion, answer_of, read_solution, text_of

MATCHED = 0.5  # IoU from which on two elements are the same one


def document_text(completions: Sequence[Completion], solution: Sequence[Any], **_: Any) -> list[float | None]:
    """1 - normalised edit distance of the page's text, elements one a line, boxes left out; in [0, 1].

    Example:
        >>> document_text([[{"content": '<p data-bbox="1 2 3 5">kitten</p>'}]],
        ...               [{"html": '<p data-bbox="1 2 3 5">sitting</p>'}])
        [0.5714285714285714]
    """

    def score(answer: str, truth: Document) -> float:
        return edit_similarity(_text(parse_document(answer, on_error="collect").document), _text(truth))

    return _scored(completions, solution, score)


def document_boxes(
    completions: Sequence[Completion], solution: Sequence[Any], reader: Sequence[AnswerReader], **_: Any
) -> list[float | None]:
    """Summed IoU of the matched elements over the larger number of elements; 0 where a box cannot be read."""

    def score(answer: ParsedDocument, truth: Document) -> float:
        ious_NM, pairs = _match(answer.document, truth)
        number = max(len(answer.document.elements) + len(answer.problems), len(truth.elements))
        return sum(float(ious_NM[pair]) for pair in pairs) / max(1, number)

    return _scored_in_pixels(completions, solution, reader, score)


def document_order(
    completions: Sequence[Completion], solution: Sequence[Any], reader: Sequence[AnswerReader], **_: Any
) -> list[float | None]:
    """Share of the true pairs of elements that the answer has in their order; of a single element: is it there?

    An element is there if one of the answer's overlaps it by an IoU of 0.5. Elements too many cost as pairs do.
    """

    def score(answer: ParsedDocument, truth: Document) -> float:
        ious_NM, pairs = _match(answer.document, truth)
        place = {column: row for row, column in pairs if ious_NM[row, column] >= MATCHED}
        number = max(len(answer.document.elements) + len(answer.problems), len(truth.elements))
        if number < 2:
            return float(len(place))
        ordered = sum(place[i] < place[j] for i, j in combinations(sorted(place), 2))
        return ordered / (number * (number - 1) / 2)

    return _scored_in_pixels(completions, solution, reader, score)


def document_html(completions: Sequence[Completion], solution: Sequence[Any], **_: Any) -> list[float | None]:
    """Share of the page's pieces that are sound elements, times how near their number is to the true one; in [0, 1].

    Example, one element as it should be and one tag that is never closed, where two elements are true:
        >>> document_html([[{"content": '<p data-bbox="1 2 3 5">a</p><p data-bbox="1 6 3 9">b'}]],
        ...               [{"html": '<p data-bbox="1 2 3 5">a</p><p data-bbox="1 6 3 9">b</p>'}])
        [0.25]
    """

    def score(answer: str, truth: Document) -> float:
        parsed = parse_document(answer, on_error="collect")
        sound, true = len(parsed.document.elements), len(truth.elements)
        if not sound:
            return 0.0
        return sound / (sound + len(parsed.problems)) * min(sound, true) / max(sound, true)

    return _scored(completions, solution, score)


def _scored(
    completions: Sequence[Completion], solution: Sequence[Any], score: Callable[[str, Document], float]
) -> list[float | None]:
    scores: list[float | None] = []
    for completion, value in zip(completions, solution, strict=True):
        html = read_solution(value).html
        scores.append(None if html is None else score(answer_of(text_of(completion)), parse_document(html).document))
    return scores


def _scored_in_pixels(
    completions: Sequence[Completion],
    solution: Sequence[Any],
    reader: Sequence[AnswerReader],
    score: Callable[[ParsedDocument, Document], float],
) -> list[float | None]:
    scores: list[float | None] = []
    for completion, value, read in zip(completions, solution, reader, strict=True):
        truth = read_solution(value)
        if truth.html is None:
            scores.append(None)
            continue
        try:
            html = read.page(answer_of(text_of(completion)), truth.image_index)
        except ValueError:  # a box that cannot be read, or outside the picture
            scores.append(0.0)
            continue
        scores.append(score(parse_document(html, on_error="collect"), parse_document(truth.html).document))
    return scores


def _match(answer: Document, truth: Document) -> tuple[Any, list[tuple[int, int]]]:
    """IoUs (N, M) and the matching of largest sum, as (element of the answer, element of the truth)."""
    ious_NM = iou_matrix(_boxes(answer), _boxes(truth)).numpy()
    rows, columns = linear_sum_assignment(ious_NM, maximize=True)
    return ious_NM, list(zip(rows.tolist(), columns.tolist(), strict=True))


def _boxes(document: Document) -> list[Box]:
    return [replace(element.box, image_index=0) for element in document.elements if element.box is not None]


def _text(document: Document) -> str:
    return "\n".join(element.text for element in document.elements)
