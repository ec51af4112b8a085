"""What a run measured: plain values, as the report shows them and as results.json keeps them."""

from dataclasses import asdict, dataclass, field
from typing import Any

from examples.handwriting.scoring import Score


@dataclass(frozen=True)
class StageRun:
    """One part of the training as it happened.

    planned: steps of the recipe; `steps` are fewer on a slow machine. unchanged: parts of the model that are equal,
    bit for bit, before and after. A step takes `batch_size` trees of `branches` conversations, from `trees` different
    ones. `seen`: conversations, with repetitions. asked: (step, what the evaluation inside training logged).
    """

    name: str
    trained: str
    unchanged: tuple[str, ...]
    learned_from: str
    planned: int
    steps: int
    batch_size: int
    branches: int
    trees: int
    tokens: int
    seconds: float
    losses: list[tuple[int, float]] = field(repr=False)
    asked: list[tuple[int, dict[str, float]]] = field(default_factory=list, repr=False)

    @property
    def seen(self) -> int:
        return self.steps * self.batch_size * self.branches

    @property
    def different(self) -> int:
        return self.trees * self.branches


@dataclass(frozen=True)
class Run:
    """One seed. `scores`: moment (such as "stage 1") -> task -> score; "blind" is the last, on blank paper."""

    seed: int
    parameters: dict[str, int]
    stages: list[StageRun]
    scores: dict[str, dict[str, Score]]
    commonest: dict[str, Score]
    seconds: dict[str, float]

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def as_json(self) -> dict[str, Any]:
        """With mean and interval beside the counts."""
        plain = asdict(self)
        for moment, tasks in self.scores.items():
            for task, score in tasks.items():
                plain["scores"][moment][task] |= {"mean": score.mean, "interval_95": score.interval}
        return plain


MOMENTS = {"stage 0": "before", "stage 1": "after stage 1", "stage 2": "after stage 2", "stage 3": "after stage 3"}
BLIND = "blind"
