"""The table of reward functions by name, and reward terms: a function with its settings, weight and schedule.

A reward of your own is a function with TRL's signature and a line in REWARDS, or an argument of `RewardTerm`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from trainers.reward_accuracy import exact, maths, multiple_choice, relaxed, spelling
from trainers.reward_documents import document_boxes, document_html, document_order, document_text
from trainers.reward_format import think_answer_format
from trainers.reward_grounding import box_count, box_f1_at_half, box_iou
from trainers.reward_length import overlong, prompt_copy, repetition, too_short
from trainers.reward_solution import RewardFunction

REWARDS: dict[str, RewardFunction] = {
    "format": think_answer_format,
    "exact": exact,
    "relaxed": relaxed,
    "multiple_choice": multiple_choice,
    "maths": maths,
    "spelling": spelling,
    "box_iou": box_iou,
    "box_f1": box_f1_at_half,
    "box_count": box_count,
    "document_text": document_text,
    "document_boxes": document_boxes,
    "document_order": document_order,
    "document_html": document_html,
    "repetition": repetition,
    "overlong": overlong,
    "too_short": too_short,
    "prompt_copy": prompt_copy,
}
# What every reward function is given; the rest of a signature is its own settings and columns of the rows.
GIVEN = ("prompts", "completions", "completion_ids", "solution", "reader", "pictures")


@dataclass(frozen=True)
class RewardTerm:
    """One summand of the reward.

    name: in REWARDS, or any name with `function`. settings: keyword arguments of the function that have defaults.
    weight: at the start. final_weight: at the end of training, approached in a line; None: as at the start.

    Raises ValueError for an unknown name or setting, with the nearest known one.

    Example:
        >>> RewardTerm("format", weight=1.0, final_weight=0.0).weight_at(0.25)
        0.75
    """

    name: str
    weight: float = 1.0
    final_weight: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    function: RewardFunction | None = None

    def __post_init__(self) -> None:
        if self.function is None and self.name not in REWARDS:
            raise ValueError(f"unknown reward {self.name!r}{_nearest(self.name, REWARDS)}")
        parameters = inspect.signature(self.function or REWARDS[self.name]).parameters
        known = [name for name, p in parameters.items() if p.default is not p.empty and name not in GIVEN]
        for setting in self.settings:
            if setting not in known:
                raise ValueError(f"the reward {self.name!r} has no setting {setting!r}{_nearest(setting, known)}")

    def weight_at(self, progress: float) -> float:
        """The weight when this share of training is done, 0 to 1."""
        end = self.weight if self.final_weight is None else self.final_weight
        return self.weight + (end - self.weight) * min(1.0, max(0.0, progress))

    def reward_function(self) -> RewardFunction:
        """The function with its settings filled in, under the term's name."""
        function, settings = self.function or REWARDS[self.name], dict(self.settings)

        def reward(**columns: Any) -> list[float | None]:
            return function(**{**columns, **settings})

        reward.__name__ = self.name
        return reward


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    if not known:
        return ": it has none"
    nearest = get_close_matches(name, list(known), n=1)
    return f": did you mean {nearest[0]!r}?" if nearest else f": known are {', '.join(known)}"


def reads_solutions(terms: Sequence[RewardTerm]) -> bool:
    """Whether a reward of the table compares with `solution`, so that rows must have one of the known kinds."""
    known = [REWARDS[term.name] for term in terms if term.function is None]
    return any("solution" in inspect.signature(function).parameters for function in known)
