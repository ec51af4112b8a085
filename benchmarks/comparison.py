"""What comparisons of trainers share: their settings, what is frozen, and the table of results."""

import statistics
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from benchmarks.step_clock import StepClock
from trainers.families import find_parts

OURS = "ours"
STEPS = 3  # of a run; the first one, which allocates, is not timed


@dataclass
class Measured:
    """Of one trainer: the clocks of its runs, the peak of a step in MiB, and the operations of a step."""

    clocks: list[StepClock] = field(default_factory=list)
    peak: float = 0.0
    operations: float = 0.0

    @property
    def seconds(self) -> list[float]:
        """Of a step: the median of each run."""
        return [statistics.median(clock.seconds[1:]) for clock in self.clocks]

    @property
    def cpu_seconds(self) -> float:
        return statistics.median([seconds for clock in self.clocks for seconds in clock.cpu_seconds[1:]])


def common_settings(folder: str, batch: int) -> dict[str, Any]:
    """For TrainingArguments and what TRL makes of them, whose defaults are bfloat16, recomputation and a shuffle."""
    return {
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": batch,
        "learning_rate": 1e-5,
        "train_sampling_strategy": "sequential",
        "activation_checkpointing": False,
        "bf16": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }


def train_only(model: PreTrainedModel, trained: Collection[str]) -> None:
    """As users do without this package: `requires_grad`, by part; what is saved with the weights but never trains, and
    all else, is frozen."""
    parts = find_parts(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in parts.constants and parts.part_of[name] in trained)


def comparison_table(title: str, measured: dict[str, Measured], floor: float) -> Table:
    """One line per trainer; refuses trainers whose losses differ, since they do not do the same.

    `floor`: the operations that the step needs.
    """
    losses = {name: of_name.clocks[0].losses for name, of_name in measured.items()}
    for name, values in losses.items():
        apart = max(abs(a - b) for a, b in zip(values, losses[OURS], strict=True))
        if apart > 1e-4:
            raise ValueError(f"The losses of {name} and {OURS} differ by {apart}: {losses}")
    table = Table("trainer", title=title)
    for heading in ("s/step (range)", "ours faster", "CPU-s/step", "peak, MiB (ours)", "10^12 operations (floor 1)"):
        table.add_column(heading, justify="right")
    ours = measured[OURS]
    for name, of_name in measured.items():
        median = statistics.median(of_name.seconds)
        table.add_row(
            name,
            f"{median:.2f} ({min(of_name.seconds):.2f} to {max(of_name.seconds):.2f})",
            f"{median / statistics.median(ours.seconds):.2f} x",
            f"{of_name.cpu_seconds:.2f}",
            f"{of_name.peak:.0f} ({ours.peak / of_name.peak:.2f})",
            f"{of_name.operations / 1e12:.3f} ({of_name.operations / floor:.2f})",
        )
    return table
