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
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
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
    TrainingArguments,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from benchmarks.comparison import OURS, STEPS, Measured, common_settings, comparison_table, train_only
from benchmarks.peak_memory import in_a_process
from benchmarks.small_models import IMAGE_ID, SMALL_VOCABULARY, VOCABULARY, FamilyName, small_model
from benchmarks.step_clock import StepClock, quietly_train
from benchmarks.synthetic_rows import picture_row
from trainers.completion_batch import CompletionGroup, collate_groups
from trainers.completion_logps import add_completion_head
from trainers.dpo import QwenVLDPOTrainer
from trainers.dpo_arguments import DPOArguments
from trainers.freezing import PARTS, TrainedParts
from trainers.picture_memory import PictureMemory

GROUP = 8  # completions of a prompt in GRPO
PROMPT_TEXT, COMPLETION = 40, 60  # tokens; with its picture the prompt has 298
TRL = "TRL"


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


def _processor() -> Qwen2_5_VLProcessor:
    """The rows are encoded already; the trainers only ask it for the padding token."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<|image_pad|>": 1, "<|video_pad|>": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    return Qwen2_5_VLProcessor(Qwen2VLImageProcessorPil(), tokenizer, Qwen2VLVideoProcessor())


def our_dpo(case: Case, folder: str) -> Trainer:
    return QwenVLDPOTrainer(
        small_model(case.family, case.vocabulary),
        DPOArguments(**common_settings(folder, batch=1)),
        groups_of(2, case, STEPS),
        processing_class=_processor(),
        trained=case.trained,
    )


def trl_dpo(case: Case, folder: str) -> Trainer:
    model, reference = small_model(case.family, case.vocabulary), small_model(case.family, case.vocabulary)
    train_only(model, case.trained.parts)
    groups = groups_of(2, case, STEPS)
    return DPOTrainer(
        model,
        reference,
        DPOConfig(**common_settings(folder, batch=1)),
        _repeated(groups, case),
        Dataset.from_dict({"images": list(range(len(groups)))}),
        processing_class=_processor(),
    )


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
    train_only(model, case.trained.parts)
    if ours:
        add_completion_head(model, outputs=("log_probs", "entropy"), memory=PictureMemory(model))
    else:
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    rows = Dataset.from_dict({"images": list(range(len(groups)))})
    collate = partial(_unique, groups=groups) if ours else _repeated(groups, case)
    return ScoreAndUpdate(model, TrainingArguments(**common_settings(folder, batch=1)), collate, rows)


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


def run(build: Callable[[Case, str], Trainer], case: Case) -> StepClock:
    """A few steps, timed."""
    # The trainers' own tables and logs are not of interest here.
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        return quietly_train(build(case, folder))


def operations(build: Callable[[Case, str], Trainer], case: Case) -> float:
    """Of one step."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        trainer = build(case, folder)
        trainer.args.max_steps = 1
        with FlopCounterMode(display=False) as counter:
            quietly_train(trainer)
    return float(counter.get_total_flops())


def floor(algorithm: Algorithm, case: Case) -> float:
    """Operations of one step with nothing that could be left out."""
    model = small_model(case.family, case.vocabulary)
    train_only(model, case.trained.parts)
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
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        trainer = ALGORITHMS[algorithm].trainers[name](case, folder)
        trainer.args.max_steps = 2
        return quietly_train(trainer, watches_memory=True).peaks[1]


def compare(key: str, case: Case, rounds: int) -> Table:
    algorithm = ALGORITHMS[key]
    title = f"{algorithm.name}: {case.name}"
    measured = {name: Measured() for name in algorithm.trainers}
    for _ in track(range(rounds), description=f"{title}: time"):
        for name, build in algorithm.trainers.items():
            measured[name].clocks.append(run(build, case))
    for name, build in track(algorithm.trainers.items(), description=f"{title}: memory and operations"):
        measured[name].peak = in_a_process(memory, key, name, case)
        measured[name].operations = operations(build, case)
    return comparison_table(title, measured, floor(algorithm, case))


def main(
    quick: Annotated[bool, typer.Option(help="The small vocabulary alone, one round each.")] = False,
    rounds: Annotated[int, typer.Option(help="How often each trainer has its turn.")] = 5,
) -> None:
    """Compare steps of preference training and print tables."""
    transformers.utils.logging.set_verbosity_error()
    rounds = 1 if quick else rounds
    console = Console(width=119)
    console.print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}; "
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; median of {rounds}"
    )
    vocabularies = (SMALL_VOCABULARY,) if quick else (VOCABULARY, SMALL_VOCABULARY)
    towers = (False,) if quick else (True, False)
    families: tuple[FamilyName, ...] = ("qwen2_5_vl", "qwen_vl")
    for key in ALGORITHMS:
        for family in families:
            for vocabulary in vocabularies:
                for tower_trains in towers:
                    console.print(compare(key, Case(family, vocabulary, tower_trains), rounds))


if __name__ == "__main__":
    typer.run(main)
