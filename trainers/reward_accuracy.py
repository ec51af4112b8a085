"""Rewards for answers in words and numbers: exact, relaxed, multiple choice, mathematics, and closeness of spelling.

None for rows whose solution has no text.
"""

import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from processing.metrics import anls, exact_match, relaxed_accuracy
from trainers.reward_solution import Completion, answer_of, read_solution, text_of

_OPTION = re.compile(r"(?<![A-Za-z])([A-H])(?![A-Za-z])")
_CHOICE = re.compile(
    r"(?:the\s+)?(?:(?:correct\s+|right\s+)?(?:answer|option|choice)\s*(?:is|:)?\s*)?"
    r"(?:option\s*)?[(\[]?(?P<letter>[A-Ha-h])[)\]]?(?:[.:)]\s*.*|\s*)",
    re.IGNORECASE | re.DOTALL,
)


def exact(completions: Sequence[Completion], solution: Sequence[Any], **_: Any) -> list[float | None]:
    """1 if the answer is one of the accepted ones, but for case and blanks around it.

    Example:
        >>> exact([[{"content": "<answer>Cat</answer>"}]], ["cat"])
        [1.0]
    """
    return _scored(completions, solution, exact_match)


def relaxed(completions: Sequence[Completion], solution: Sequence[Any], **_: Any) -> list[float | None]:
    """As `exact`, but a number may be off by 5 % of the truth (ChartQA, arXiv 2203.10244, section 5.1).

    Example:
        >>> relaxed([[{"content": "96"}], [{"content": "90"}]], [100, 100])
        [1.0, 0.0]
    """
    return _scored(completions, solution, relaxed_accuracy)


def multiple_choice(completions: Sequence[Completion], solution: Sequence[Any], **_: Any) -> list[float | None]:
    """1 if the answer chooses the right letter from A to H, and only that one.

    Read are "B", "(b)", "B. a dog", "The answer is B"; an answer that names two letters chooses none.

    Example:
        >>> multiple_choice([[{"content": "(b)"}], [{"content": "A or B"}], [{"content": "C. a dog"}]], ["B"] * 3)
        [1.0, 0.0, 0.0]
    """
    return _scored(completions, solution, _same_choice)


def maths(completions: Sequence[Completion], solution: Sequence[Any], **_: Any) -> list[float | None]:
    """1 if the answer, as a whole, is the same mathematical expression as an accepted one.

    Compared by the package math-verify where it is installed (`pip install math-verify`); exactly, as text, otherwise.

    Example, with math-verify:
        >>> maths([[{"content": "<answer>0.5</answer>"}]], ["\\\\frac{1}{2}"])
        [1.0]
    """
    return _scored(completions, solution, _same_expression if find_spec("math_verify") else exact_match)


def spelling(completions: Sequence[Completion], solution: Sequence[Any], **_: Any) -> list[float | None]:
    """Similarity of spelling to the nearest accepted answer, 0 below a half (ANLS, arXiv 1905.13648, equation 1).

    Example:
        >>> spelling([[{"content": "Sitting"}], [{"content": "sat"}]], ["kitten", "kitten"])
        [0.5714285714285714, 0.0]
    """
    return _scored(completions, solution, anls)


def _scored(
    completions: Sequence[Completion], solution: Sequence[Any], score: Callable[[str, Sequence[str]], float]
) -> list[float | None]:
    truths = [read_solution(value).texts for value in solution]
    return [
        None if texts is None else score(answer_of(text_of(completion)), texts)
        for completion, texts in zip(completions, truths, strict=True)
    ]


def _same_choice(answer: str, truths: Sequence[str]) -> float:
    match = _CHOICE.fullmatch(answer)
    if match is None or len(set(_OPTION.findall(answer)) | {match["letter"].upper()}) > 1:
        return 0.0
    return exact_match(match["letter"], [truth.strip().strip("().") for truth in truths])


def _same_expression(answer: str, truths: Sequence[str]) -> float:
    from math_verify import parse, verify  # type: ignore[import-not-found]  # optional

    if exact_match(answer, truths):
        return 1.0
    # As one formula: an answer that lists numbers is no longer any of them.
    given = parse(f"${answer.strip('$ ')}$")
    return float(bool(given) and any(verify(parse(f"${truth.strip('$ ')}$"), given) for truth in truths))
