"""Progress in the terminal: a bar per part of the run with its loss, tokens per second and the time that is left."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def make_progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]:<30}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


class Watch:
    """One bar; keeps what the report needs: `losses`, (step, loss); `asked`, (step, score by name); and `seconds`."""

    def __init__(self, progress: Progress, name: str, total: int):
        self.losses: list[tuple[int, float]] = []
        self.asked: list[tuple[int, dict[str, float]]] = []
        self.num_tokens = 0
        self.seconds = 0.0
        self._progress = progress
        self._task = progress.add_task(name, total=total, figures="")
        self._start = perf_counter()

    def on_step(self, step: int, loss: float | None) -> None:
        if loss is not None:
            self.losses.append((step, loss))
        self.seconds = perf_counter() - self._start
        figures = [f"loss {self.losses[-1][1]:.3f}"] if self.losses else []
        figures += [f"{self.num_tokens / self.seconds:,.0f} tokens/s"] if self.num_tokens else []
        self._progress.update(self._task, completed=step, figures=", ".join(figures))


class StageProgress(TrainerCallback):
    """Passes the Trainer's steps, losses and scores on to a watch. `num_tokens`: of each step, padding left out."""

    def __init__(self, watch: Watch, num_tokens: Sequence[int]):
        self.watch, self.num_tokens = watch, num_tokens

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.watch.on_step(state.global_step, float(logs["loss"]))
        if logs and "eval_loss" in logs:
            self.watch.asked.append((state.global_step, {name: float(value) for name, value in logs.items()}))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.watch.num_tokens += self.num_tokens[state.global_step - 1]
        self.watch.on_step(state.global_step, None)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the time that the block takes to `seconds[name]`."""
    start = perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + perf_counter() - start
