"""Time, loss and peak memory of each optimiser step of a Trainer."""

import io
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.peak_memory import peak_mib


class StepClock(TrainerCallback):
    """Per step: seconds, CPU-seconds (of all threads), loss, and, if it watches memory, the peak in MiB over what was
    held before the step."""

    def __init__(self, watches_memory: bool = False) -> None:
        self.watches_memory = watches_memory
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.losses: list[float] = []
        self.peaks: list[float] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.watches_memory:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from what is held now
            self.before = peak_mib()
        self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.cpu_seconds.append(time.process_time() - self.cpu_start)
        if self.watches_memory:
            self.peaks.append(peak_mib() - self.before)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def quietly_train(trainer: Trainer, watches_memory: bool = False) -> StepClock:
    """Trains without printing; `trainer` logs every step."""
    clock = StepClock(watches_memory)
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    with redirect_stdout(io.StringIO()):
        trainer.train()
    return clock
