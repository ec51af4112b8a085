"""One optimiser step of preference training: this package beside TRL's trainers.

    python -m benchmarks.preference_step            # all cases
    python -m benchmarks.preference_step --quick    # the small vocabulary alone, one round each

The same random model (benchmarks/small_models.py), the same pairs, the same loss, AdamW in float32. The trainers take
turns, so that a busy machine slows both; the losses must agree, or the comparison is refused. Peak memory is a process
of its own: the most that the second step holds over what the process held before it (weights, the reference's weights
and AdamW's states are there by then; gradients and activations are not). Operations are those that torch's
FlopCounterMode counts in one step. The floor computes each picture once per version of the tower that sees it, each
token of the prompt once per model, each completion behind it, and output rows only where a token is scored.
"""

import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
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
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from benchmarks.peak_memory import in_a_process, peak_mib
from benchmarks.small_models import IMAGE_ID, VOCABULARY, FamilyName, small_model
from benchmarks.synthetic_rows import picture_row
from trainers.completion_batch import CompletionGroup, collate_groups
from trainers.completion_logps import add_completion_head
from trainers.dpo import QwenVLDPOTrainer
from trainers.dpo_arguments import DPOArguments
from trainers.families import find_parts
from trainers.freezing import PARTS, TrainedParts
from trainers.picture_memory import PictureMemory

SMALL_VOCABULARY = 1024
STEPS = 3  # of a run; the first one, which allocates, is not timed
GROUP = 8  # completions of a prompt in GRPO
PROMPT_TEXT, COMPLETION = 40, 60  # tokens; with its picture the prompt has 298
OURS, TRL = "ours", "TRL"


@dataclass(frozen=True)
class Case:
    """What both trainers have in common."""

    family: FamilyName
    vocabulary: int
    tower_trains: bool

    @property
    def name(self) -> str:
        tower = "trained" if self.tower_trains else "frozen"
        return f"{self.family}, vocabulary {self.vocabulary:,}, tower {tower}"

    @property
    def trained(self) -> TrainedParts:
        return TrainedParts(PARTS if self.tower_trains else PARTS[1:])


class StepClock(TrainerCallback):
    """Seconds, loss and peak memory (MiB over what there was before) of each optimiser step."""

    def __init__(self, watches_memory: bool = False) -> None:
        self.watches_memory = watches_memory
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peaks: list[float] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.watches_memory:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from what is held now
            self.before = peak_mib()
        self.start = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds.append(time.perf_counter() - self.start)
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


def groups_of(completions: int, case: Case, count: int) -> list[CompletionGroup]:
    """A picture and 40 tokens, and so many completions of 60."""
    groups = []
    for seed in range(count):
        row = picture_row(case.family, PROMPT_TEXT, completions * COMPLETION, seed, vocabulary=case.vocabulary)
        prompt, *rest = row.input_ids.split([row.length - completions * COMPLETION, *[COMPLETION] * completions])
        groups.append(CompletionGroup(prompt, tuple(rest), tuple(rest), row.vision, num_pictures=1))
    return groups


def _repeated(groups: Sequence[CompletionGroup], case: Case) -> Callable[[list[dict[str, int]]], dict[str, Tensor]]:
    """TRL's batches: a picture for each completion."""

    def collate(rows: list[dict[str, int]]) -> dict[str, Tensor]:
        batch = collate_groups([groups[row["images"]] for row in rows], pad_token_id=0, order="completion")
        del batch["group_of_row"], batch["num_pictures"]
        for key in {"pixel_values", "image_grid_thw"} & set(batch):
            batch[key] = torch.cat([batch[key]] * (len(batch["input_ids"]) // len(rows)))
        if case.family != "qwen_vl":
            batch["mm_token_type_ids"] = (batch["input_ids"] == case.vocabulary + IMAGE_ID).int()
        return batch

    return collate


def _settings(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
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


def _processor() -> Qwen2_5_VLProcessor:
    """The rows are encoded already; the trainers only ask it for the padding token."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<|image_pad|>": 1, "<|video_pad|>": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    return Qwen2_5_VLProcessor(Qwen2VLImageProcessorPil(), tokenizer, Qwen2VLVideoProcessor())


def our_dpo(case: Case, folder: str) -> Trainer:
    return QwenVLDPOTrainer(
        small_model(case.family, case.vocabulary),
        DPOArguments(**_settings(folder)),
        groups_of(2, case, STEPS),
        processing_class=_processor(),
        trained=case.trained,
    )


def trl_dpo(case: Case, folder: str) -> Trainer:
    model, reference = small_model(case.family, case.vocabulary), small_model(case.family, case.vocabulary)
    _freeze(model, case)
    groups = groups_of(2, case, STEPS)
    return DPOTrainer(
        model,
        reference,
        DPOConfig(**_settings(folder)),
        _repeated(groups, case),
        Dataset.from_dict({"images": list(range(len(groups)))}),
        processing_class=_processor(),
    )


def _freeze(model: PreTrainedModel, case: Case) -> None:
    """As users do without this package: the tower's weights, and what is saved with them but never trains."""
    parts = find_parts(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in parts.constants and parts.part_of[name] in case.trained.parts)


class ScoreAndUpdate(Trainer):
    """What GRPO does with a group of sampled completions: the old policy scores them, the current one learns. The
    heads and the batches decide how; the gradient is that of GRPO's first update (arXiv 2402.03300, equation 3)."""

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        mask = inputs.pop("completion_mask")
        inputs["labels"] = inputs["input_ids"].masked_fill(mask == 0, -100)
        with torch.no_grad():
            old = model(**inputs, fused_lm_head=True).log_probs
        new = model(**inputs, fused_lm_head=True).log_probs
        advantages = torch.linspace(-1, 1, len(new))[:, None]
        return -(advantages * (new - old).exp().detach() * new * mask[:, 1:]).sum() / mask.sum()


def _score_and_update(case: Case, folder: str, ours: bool) -> Trainer:
    model, groups = small_model(case.family, case.vocabulary), groups_of(GROUP, case, STEPS)
    _freeze(model, case)
    if ours:
        add_completion_head(model, outputs=("log_probs", "entropy"), memory=PictureMemory(model))
    else:
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    rows = Dataset.from_dict({"images": list(range(len(groups)))})
    collate = partial(_unique, groups=groups) if ours else _repeated(groups, case)
    return ScoreAndUpdate(model, TrainingArguments(**_settings(folder)), collate, rows)


def _unique(rows: list[dict[str, int]], groups: Sequence[CompletionGroup]) -> dict[str, Tensor]:
    return collate_groups([groups[row["images"]] for row in rows], pad_token_id=0)


@dataclass(frozen=True)
class Algorithm:
    """What is compared. `trainers`: ours and TRL's. `groups`: their rows. `num_scoring`: how many models, besides the
    policy that learns, score the completions in one step."""

    name: str
    trainers: dict[str, Callable[[Case, str], Trainer]]
    groups: Callable[[Case, int], list[CompletionGroup]]
    num_scoring: int


ALGORITHMS = {
    "dpo": Algorithm("DPO", {OURS: our_dpo, TRL: trl_dpo}, partial(groups_of, 2), num_scoring=1),
    # The heads and batches of both trainers, without sampling, rewards and logs.
    "grpo": Algorithm(
        f"GRPO, scoring and update of {GROUP} completions",
        {OURS: partial(_score_and_update, ours=True), TRL: partial(_score_and_update, ours=False)},
        partial(groups_of, GROUP),
        num_scoring=1,
    ),
}


def run(build: Callable[[Case, str], Trainer], case: Case, count: bool = False) -> tuple[float, list[float], float]:
    """Median seconds of a step, the losses, and the operations of one step (0.0 unless counted)."""
    # The trainers' own tables and logs are not of interest here.
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        trainer = build(case, folder)
        clock = StepClock()
        trainer.add_callback(clock)
        counter = FlopCounterMode(display=False) if count else None
        if count:
            trainer.args.max_steps = 1
        with counter or nullcontext():
            trainer.train()
    operations = float(counter.get_total_flops()) if counter else 0.0
    return statistics.median(clock.seconds[1:] or clock.seconds), clock.losses, operations


def floor(algorithm: Algorithm, case: Case) -> float:
    """Operations of one step with nothing that could be left out."""
    model = small_model(case.family, case.vocabulary)
    _freeze(model, case)
    (group,) = algorithm.groups(case, 1)
    with FlopCounterMode(display=False) as counter:
        features = _encode(model, group)
        _score(model, group, features).backward()
        for _ in range(algorithm.num_scoring):
            with torch.no_grad():
                # A frozen tower gives the others the same; their adapters are left out of the floor.
                _score(model, group, _encode(model, group) if case.tower_trains else features)
    return float(counter.get_total_flops())


def _encode(model: PreTrainedModel, group: CompletionGroup) -> Any:
    return model.base_model.get_image_features(**group.vision, return_dict=True)


def _score(model: PreTrainedModel, group: CompletionGroup, features: Any) -> Tensor:
    """The prompt through the language model once, each completion behind it, the head where tokens are scored."""
    inner = model.base_model
    P = len(group.prompt_P)
    prompt = inner(
        input_ids=group.prompt_P[None],
        position_ids=torch.arange(P)[None],
        mm_encoder_outputs={"image": features},
        use_cache=True,
    )
    hidden = [prompt.last_hidden_state[:, -1:]]
    for completion in group.completions:
        cache = DynamicCache(config=model.config.get_text_config())
        for index, layer in enumerate(prompt.past_key_values.layers):
            cache.update(layer.keys, layer.values, index)
        positions = torch.arange(P, P + len(completion) - 1)[None]
        behind = inner(input_ids=completion[None, :-1], position_ids=positions, past_key_values=cache, use_cache=True)
        hidden.append(behind.last_hidden_state)
    return model.get_output_embeddings()(torch.cat(hidden, dim=1)).logsumexp(-1).sum()


def memory(algorithm: str, name: str, case: Case) -> float:
    """MiB at the peak of the second step over what the process held before it. For a process of its own."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        trainer = ALGORITHMS[algorithm].trainers[name](case, folder)
        trainer.args.max_steps = 2
        clock = StepClock(watches_memory=True)
        trainer.add_callback(clock)
        trainer.train()
    return clock.peaks[1]


def compare(key: str, case: Case, rounds: int) -> Table:
    algorithm = ALGORITHMS[key]
    title = f"{algorithm.name}: {case.name}"
    seconds: dict[str, list[float]] = {name: [] for name in algorithm.trainers}
    losses: dict[str, list[float]] = {}
    for _ in track(range(rounds), description=f"{title}: time"):
        for name, build in algorithm.trainers.items():
            median, losses[name], _ = run(build, case)
            seconds[name].append(median)
    apart = max(abs(a - b) for a, b in zip(losses[OURS], losses[TRL], strict=True))
    if apart > 1e-4:
        raise ValueError(f"The losses differ by {apart}, so the trainers do not do the same: {losses}")
    peaks = {name: in_a_process(memory, key, name, case) for name in algorithm.trainers}
    operations = {name: run(build, case, count=True)[2] for name, build in algorithm.trainers.items()}
    least = floor(algorithm, case)
    table = Table(title=title)
    for heading in ("trainer", "s/step", "range", "ours is faster", "peak, MiB", "operations", "over the floor"):
        table.add_column(heading, justify="left" if heading == "trainer" else "right")
    for name in algorithm.trainers:
        median = statistics.median(seconds[name])
        table.add_row(
            name,
            f"{median:.2f}",
            f"{min(seconds[name]):.2f} to {max(seconds[name]):.2f}",
            "" if name == OURS else f"{median / statistics.median(seconds[OURS]):.2f} x",
            f"{peaks[name]:.0f}" + ("" if name == OURS else f" (ours: {peaks[OURS] / peaks[name]:.2f} of it)"),
            f"{operations[name] / 1e12:.3f} T",
            f"{operations[name] / least:.2f}",
        )
    return table


def main(
    quick: Annotated[bool, typer.Option(help="The small vocabulary alone, one round each.")] = False,
    rounds: Annotated[int, typer.Option(help="How often each trainer has its turn.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
) -> None:
    """Compare steps of preference training and print tables."""
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    console = Console()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}"
    console.print(
        f"{versions}; {platform.processor() or platform.machine()}, {os.cpu_count()} cores, {threads} threads"
    )
    vocabularies = (SMALL_VOCABULARY,) if quick else (VOCABULARY, SMALL_VOCABULARY)
    towers = (False,) if quick else (True, False)
    families: tuple[FamilyName, ...] = ("qwen2_5_vl", "qwen_vl")
    for key in ALGORITHMS:
        for family in families:
            for vocabulary in vocabularies:
                for tower_trains in towers:
                    console.print(compare(key, Case(family, vocabulary, tower_trains), 1 if quick else rounds))


if __name__ == "__main__":
    typer.run(main)
