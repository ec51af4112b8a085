"""How well a model answers the held-out questions of examples/handwriting/preference.py, and the table of all methods.

Answers are taken twice: greedily, as a user gets them, and sampled, which is what GRPO, RLOO and PPO are paid for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from processing.example import Example
from processing.metrics import exact_match, iou
from trainers.evaluation import Answer, GenerationEvaluation

LONGEST = 32  # tokens of an answer
BATCH = 100
NUM_SAMPLED = 2  # answers per question, at the temperature
SAMPLING_SEED = 7
NUM_RESAMPLES = 2000
TITLES = {
    "sampled_reward": "reward, sampled",
    "sampled_iou": "mean IoU, sampled",
    "reward": "reward, greedy",
    "box_iou": "mean IoU, greedy",
    "box_right": "IoU >= 0.5, greedy",
    "reading": "reading, greedy",
}


@dataclass(frozen=True)
class Scores:
    """One value per held-out question, for intervals over questions and over runs. Rewards: IoU, or a right word."""

    box_iou: list[float]
    box_right: list[float]
    reading: list[float]
    sampled_iou: list[float]
    sampled_reading: list[float]

    @property
    def reward(self) -> list[float]:
        return self.box_iou + self.reading

    @property
    def sampled_reward(self) -> list[float]:
        return self.sampled_iou + self.sampled_reading


def measure(model: PreTrainedModel, processor: Any, questions: Sequence[Example], temperature: float = 1.0) -> Scores:
    """Answers to questions of the tasks grounding and reading, scored. An answer with other than one box has IoU 0.

    Sampling has a seed of its own: the random numbers of what follows are as they would have been.
    """
    greedy = GenerationEvaluation(questions, batch_size=BATCH, max_new_tokens=LONGEST).answers(model, processor)
    ious, words = _rewards(greedy)
    sampling = GenerationEvaluation(questions, batch_size=BATCH, max_new_tokens=LONGEST, temperature=temperature)
    with torch.random.fork_rng():
        torch.manual_seed(SAMPLING_SEED)
        sampled = [_rewards(sampling.answers(model, processor)) for _ in range(NUM_SAMPLED)]
    return Scores(
        box_iou=ious,
        box_right=[float(value >= 0.5) for value in ious],
        reading=words,
        sampled_iou=np.mean([of_boxes for of_boxes, _ in sampled], axis=0).tolist(),
        sampled_reading=np.mean([of_words for _, of_words in sampled], axis=0).tolist(),
    )


def _rewards(answers: Sequence[Answer]) -> tuple[list[float], list[float]]:
    boxes = [_iou(answer) for answer in answers if answer.example.task == "grounding"]
    words = [float(exact_match(a.text, a.truths) and not a.boxes) for a in answers if a.example.task == "reading"]
    return boxes, words


def _iou(answer: Answer) -> float:
    return iou(answer.boxes[0], answer.true_boxes[0]) if len(answer.boxes) == 1 else 0.0


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean, by resampling (percentiles of 2000 bootstrap means, seed 0).

    Example:
        >>> interval([0.5] * 10)
        (0.5, 0.5)
    """
    rng = np.random.default_rng(0)
    data = np.asarray(values)
    means = data[rng.integers(len(data), size=(NUM_RESAMPLES, len(data)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Mean gain on the same questions, and its 95 % interval.

    Example:
        >>> difference([0.0, 0.5], [0.5, 1.0])
        (0.5, 0.5, 0.5)
    """
    gains = np.asarray(after) - np.asarray(before)
    return float(gains.mean()), *interval(gains.tolist())


def as_scores(record: dict[str, Any]) -> Scores:
    """Of a record's "before" or "after"."""
    return Scores(**{field.name: record[field.name] for field in fields(Scores)})


def averages(records: Sequence[dict[str, Any]], moment: str, key: str) -> list[float]:
    """What each question got, "before" or "after", as a mean over the runs. `key`: of `TITLES`."""
    return np.mean([getattr(as_scores(record[moment]), key) for record in records], axis=0).tolist()


@dataclass(frozen=True)
class Gains:
    """Of one method. `of`: key of `TITLES` -> mean afterwards, gain over the start, and the gain's 95 % interval.

    Intervals resample the questions of all runs, each run's gain being on the same questions.
    """

    method: str
    runs: int
    steps: float
    of: dict[str, tuple[float, float, float, float]]


def gains(records: Sequence[dict[str, Any]]) -> list[Gains]:
    """By method, in the order of the records."""
    made = []
    for method in dict.fromkeys(record["method"] for record in records):
        runs = [record for record in records if record["method"] == method]
        of = {}
        for key in TITLES:
            after = averages(runs, "after", key)
            of[key] = (float(np.mean(after)), *difference(averages(runs, "before", key), after))
        made.append(Gains(method, len(runs), float(np.mean([record["steps"] for record in runs])), of))
    return made


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: per method the means over its runs, the gain over the start and its 95 % interval."""
    lines = [
        "| method | runs | steps | " + " | ".join(TITLES.values()) + " |",
        "|---|---:|---:|" + "---|" * len(TITLES),
    ]
    starts = [averages(records, "before", key) for key in TITLES]
    lines.append("| start | | | " + " | ".join(f"{np.mean(values):.3f}" for values in starts) + " |")
    for one in gains(records):
        cells = [one.method, str(one.runs), f"{one.steps:.0f}"]
        cells += [
            f"{after:.3f} ({gain:+.3f}; {low:+.3f} to {high:+.3f})" for after, gain, low, high in one.of.values()
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
