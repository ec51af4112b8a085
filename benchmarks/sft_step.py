"""One optimiser step of supervised fine-tuning: this package beside TRL's SFTTrainer and transformers' Trainer.

    python -m benchmarks.sft_step            # all cases, about two hours of one thread
    python -m benchmarks.sft_step --quick    # one round each, about 40 minutes

The same random model (benchmarks/small_models.py), the same collated batches, the same labels, AdamW in float32. The
trainers take turns, so that a busy machine slows all; the first losses must agree, or the comparison is refused. Peak
memory is a process of its own: the most that the second step holds over what was there before it (weights and AdamW's
states). Operations are those that torch's FlopCounterMode counts in one step; the floor runs each row by itself,
without padding, with output rows only where a token is supervised and no graph for what is frozen.
"""

import logging
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import trl
import typer
from datasets import Dataset
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, models
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from benchmarks.comparison import OURS, STEPS, Measured, common_settings, comparison_table, train_only
from benchmarks.peak_memory import in_a_process
from benchmarks.small_models import SMALL_VOCABULARY, VOCABULARY, FamilyName, small_model
from benchmarks.step_clock import StepClock, quietly_train
from benchmarks.synthetic_rows import mixed_rows, picture_rows
from processing.collators import PackedCollator, PaddedCollator
from processing.encoded_example import EncodedExample
from processing.packing import pack
from trainers.arguments import StageArguments
from trainers.families import PARTS
from trainers.freezing import TrainedParts
from trainers.multitask import QwenVLMultiTaskTrainer
from trainers.sft import QwenVLSFTTrainer

Collate = Callable[[Sequence[EncodedExample]], dict[str, Any]]

BATCH = 4


@dataclass(frozen=True)
class Case:
    """What all trainers have in common."""

    family: FamilyName
    tower_trains: bool
    checkpointing: bool = False
    vocabulary: int = VOCABULARY

    @property
    def trained(self) -> tuple[str, ...]:
        return PARTS if self.tower_trains else PARTS[1:]

    @property
    def name(self) -> str:
        tower = "trained" if self.tower_trains else "frozen"
        return f"{self.family}, tower {tower}" + (", checkpointing" if self.checkpointing else "")


def _settings(folder: str, case: Case, batch: int = BATCH) -> dict[str, Any]:
    return common_settings(folder, batch) | {"activation_checkpointing": case.checkpointing}


def ours(
    case: Case,
    model: PreTrainedModel,
    rows: Dataset,
    collate: Collate,
    folder: str,
    batch: int = BATCH,
    adapter_alone: bool = False,
    **settings: Any,
) -> Trainer:
    trainer = QwenVLMultiTaskTrainer if case.tower_trains else QwenVLSFTTrainer
    arguments = StageArguments(**_settings(folder, case, batch) | settings, tower_layer_decay=1.0)
    trained = TrainedParts(("adapter",)) if adapter_alone else None
    return trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, trained=trained)


def plain(case: Case, model: PreTrainedModel, rows: Dataset, collate: Collate, folder: str) -> Trainer:
    train_only(model, case.trained)
    arguments = TrainingArguments(**_settings(folder, case))
    return Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)


def stock_trl(case: Case, model: PreTrainedModel, rows: Dataset, collate: Collate, folder: str) -> Trainer:
    train_only(model, case.trained)
    arguments = SFTConfig(**_settings(folder, case), dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
    words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    return SFTTrainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collate, processing_class=tokenizer
    )


TRAINERS: dict[str, Callable[..., Trainer]] = {OURS: ours, "TRL SFTTrainer": stock_trl, "Trainer": plain}


def _by_number(numbered: Sequence[dict[str, int]], examples: Sequence[EncodedExample], collate: Collate) -> Any:
    return collate([examples[row["row"]] for row in numbered])


def _dataset(examples: Sequence[EncodedExample], collate: Collate) -> tuple[Dataset, Any]:
    """TRL wants a `datasets.Dataset`: one of numbers, and a collator that knows what they stand for."""
    return Dataset.from_dict({"row": list(range(len(examples)))}), partial(
        _by_number, examples=examples, collate=collate
    )


def run(name: str, case: Case) -> StepClock:
    """A few steps, timed."""
    rows, collate = _dataset(picture_rows(case.family, BATCH * STEPS, case.vocabulary), PaddedCollator(pad_token_id=0))
    with tempfile.TemporaryDirectory() as folder:
        trainer = TRAINERS[name](case, small_model(case.family, case.vocabulary), rows, collate, folder)
        return quietly_train(trainer)


def operations(name: str, case: Case) -> float:
    """Of one step."""
    rows, collate = _dataset(picture_rows(case.family, BATCH, case.vocabulary), PaddedCollator(pad_token_id=0))
    with tempfile.TemporaryDirectory() as folder, FlopCounterMode(display=False) as counter:
        trainer = TRAINERS[name](case, small_model(case.family, case.vocabulary), rows, collate, folder)
        trainer.args.max_steps = 1
        quietly_train(trainer)
    return float(counter.get_total_flops())


def floor(case: Case) -> float:
    """Operations of the first step's rows, one by one, with nothing that could be left out."""
    model = small_model(case.family, case.vocabulary)
    train_only(model, case.trained)
    collate = PaddedCollator(pad_token_id=0)
    with FlopCounterMode(display=False) as counter:
        for example in picture_rows(case.family, BATCH, case.vocabulary):
            row = collate([example])
            next_BL = functional.pad(row.pop("labels")[:, 1:], (0, 1), value=-100)
            predicts_BL = next_BL != -100
            logits = model(**row, logits_to_keep=predicts_BL, use_cache=False).logits
            functional.cross_entropy(logits, next_BL[predicts_BL]).backward()
    return float(counter.get_total_flops())


def memory(name: str, case: Case) -> float:
    """MiB at the peak of the second step over what the process held before it. For a process of its own."""
    rows, collate = _dataset(picture_rows(case.family, BATCH * STEPS, case.vocabulary), PaddedCollator(pad_token_id=0))
    with tempfile.TemporaryDirectory() as folder:
        trainer = TRAINERS[name](case, small_model(case.family, case.vocabulary), rows, collate, folder)
        return quietly_train(trainer, watches_memory=True).peaks[1]


def compare(case: Case, rounds: int) -> Table:
    measured = {name: Measured() for name in TRAINERS}
    for _ in track(range(rounds), description=f"{case.name}: time"):
        for name in TRAINERS:
            measured[name].clocks.append(run(name, case))
    for name in track(TRAINERS, description=f"{case.name}: memory and operations"):
        measured[name].peak = in_a_process(memory, name, case)
        measured[name].operations = operations(name, case)
    return comparison_table(case.name, measured, floor(case))


def cached_epochs(family: FamilyName, vocabulary: int, adapter_alone: bool, rounds: int) -> tuple[float, float]:
    """Median CPU-seconds of a step in the first epoch and in the second, whose tower features come from disk."""
    case, steps = Case(family, tower_trains=False, vocabulary=vocabulary), 4
    rows, collate = _dataset(picture_rows(family, BATCH * steps, vocabulary), PaddedCollator(pad_token_id=0))
    first, second = [], []
    for _ in track(range(rounds), description=f"{family}: feature cache"):
        with tempfile.TemporaryDirectory() as folder:
            trainer = ours(
                case,
                small_model(family, vocabulary),
                rows,
                collate,
                folder,
                max_steps=2 * steps,
                adapter_alone=adapter_alone,
                feature_cache_dir=str(Path(folder) / "features"),
            )
            clock = quietly_train(trainer)
        first.append(statistics.median(clock.cpu_seconds[1:steps]))
        second.append(statistics.median(clock.cpu_seconds[steps:]))
    return statistics.median(first), statistics.median(second)


def packed_and_padded(
    family: FamilyName, vocabulary: int, rounds: int, count: int = 48, capacity: int = 1024
) -> dict[str, float]:
    """Useful tokens per CPU-second on rows of very different length: padded batches of eight, and filled rows, as many
    per step as hold about eight examples."""
    examples = mixed_rows(family, count, vocabulary)
    lengths = [example.length for example in examples]
    merge_size = 2 if family == "qwen2_5_vl" else None
    padded = [list(range(start, start + 8)) for start in range(0, count, 8)]
    packed = pack(lengths, capacity)
    plans: dict[str, tuple[list[list[int]], int, Collate]] = {
        "padded": (padded, 1, PaddedCollator(pad_token_id=0)),
        "packed": (packed, len(packed) // len(padded), PackedCollator(merge_size)),
    }
    rates: dict[str, list[float]] = {name: [] for name in plans}
    for _ in track(range(rounds), description=f"{family}: packing"):
        for name, (batches, per_step, collate) in plans.items():
            steps = len(batches) // per_step
            rows = Dataset.from_dict({"row": list(range(steps * per_step))})
            with tempfile.TemporaryDirectory() as folder:
                trainer = ours(
                    Case(family, tower_trains=False, vocabulary=vocabulary),
                    small_model(family, vocabulary),
                    rows,
                    partial(_batch_of_numbers, batches=batches, examples=examples, collate=collate),
                    folder,
                    max_steps=steps,
                    batch=1,
                    gradient_accumulation_steps=per_step,
                )
                clock = quietly_train(trainer)
            timed = batches[per_step : steps * per_step]
            useful = sum(lengths[index] for batch in timed for index in batch)
            rates[name].append(useful / sum(clock.cpu_seconds[1:]))
    return {name: statistics.median(values) for name, values in rates.items()}


def _batch_of_numbers(
    numbered: Sequence[dict[str, int]],
    batches: Sequence[Sequence[int]],
    examples: Sequence[EncodedExample],
    collate: Collate,
) -> dict[str, Any]:
    (row,) = numbered
    return collate([examples[index] for index in batches[row["row"]]])


def main(
    rounds: Annotated[int, typer.Option(help="Runs of each trainer, in turn; medians are reported.")] = 5,
    quick: Annotated[bool, typer.Option(help="One round: for a first look.")] = False,
    checkpointing: Annotated[
        bool, typer.Option(help="Also with activations recomputed in the backward pass.")
    ] = False,
) -> None:
    logging.disable(logging.WARNING)
    rounds = 1 if quick else rounds
    console = Console(width=119)
    started = (
        f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads, load "
        f"{os.getloadavg()[0]:.1f}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"trl {trl.__version__}; batches of {BATCH} rows with one picture of 448 x 448; median of {rounds}"
    )
    families: tuple[FamilyName, ...] = ("qwen2_5_vl", "qwen_vl")
    vocabularies = (VOCABULARY, SMALL_VOCABULARY)
    for family in families:
        for tower_trains in (False, True):
            console.print(compare(Case(family, tower_trains), rounds))
        if checkpointing:
            console.print(compare(Case(family, tower_trains=False, checkpointing=True), rounds))
    table = Table("feature cache", "first epoch, CPU-s/step", "second", "faster")
    for family, vocabulary, adapter_alone in product(families, vocabularies, (False, True)):
        first, second = cached_epochs(family, vocabulary, adapter_alone, rounds)
        what = "adapter trains" if adapter_alone else "adapter and language model train"
        name = f"{family}, vocabulary {vocabulary:,}, {what}"
        table.add_row(name, f"{first:.2f}", f"{second:.2f}", f"{first / second:.2f} x")
    console.print(table)
    table = Table("rows of 40 to 800 tokens", "padded, useful tokens/CPU-s", "packed", "faster")
    for family, vocabulary in product(families, vocabularies):
        rates = packed_and_padded(family, vocabulary, rounds)
        ratio = rates["packed"] / rates["padded"]
        name = f"{family}, vocabulary {vocabulary:,}"
        table.add_row(name, f"{rates['padded']:.0f}", f"{rates['packed']:.0f}", f"{ratio:.2f} x")
    console.print(table)
    console.print(started)


if __name__ == "__main__":
    typer.run(main)
