"""After SFT: what do DPO, GRPO, RLOO and PPO add, against SFT continued for the same compute?

    python -m examples.handwriting.preference run --model runs/demo/model --method grpo --seed 0 --minutes 2
    python -m examples.handwriting.preference table runs/preference

Each run teaches a model of `make demo` for so many minutes of processor time (of one thread, so that a busy machine
changes nothing), asks it the held-out questions before and after, and writes one JSON. Where a digit is (a box) and
which digit it is (a word) are asked about, half and half, of the writers it was taught with; the held-out scenes are
by others.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from trl import GRPOConfig, RLOOConfig

import modeling_qwenvl  # noqa: F401 (registers the model)
from examples.handwriting.conversations import chat
from examples.handwriting.digits import DEV_FORMS, TEST_FORMS, TRAIN_FORMS, digits_of
from examples.handwriting.preference_page import page
from examples.handwriting.preference_scores import LONGEST, TITLES, difference, measure, table
from examples.handwriting.scenes import NUMERALS, Scene, make_scenes
from processing.example import Example, Message
from processing.processing_families import load_processor
from trainers.arguments import StageArguments
from trainers.dpo import QwenVLDPOTrainer
from trainers.dpo_arguments import DPOArguments
from trainers.grpo import QwenVLGRPOTrainer
from trainers.ppo import PPOArguments, QwenVLPPOTrainer
from trainers.reward_solution import answer_of, read_solution, text_of
from trainers.rewards import RewardTerm
from trainers.rloo import QwenVLRLOOTrainer
from trainers.sft import QwenVLSFTTrainer

TASKS = ("grounding", "reading")
SCENES = 5000  # to learn from, two questions each
HELD_OUT = 300  # scenes
GROUP = 4  # completions per prompt
PROMPTS = 64  # per step
TEMPERATURE = 1.0
Method = StrEnum("Method", ["sft", "dpo", "grpo", "rloo", "ppo"])
# Peak learning rates. GRPO's was tried for four minutes each: at 2e-4 and 3e-4 the entropy falls twice as fast, to the
# same scores or worse. RLOO's and PPO's were not tried. DPO alone, at 1e-4, pushes the right boxes down with the wrong
# ones (mean IoU of sampled boxes 0.45 to 0.16 in 90 seconds); beside SFT's loss it does not.
RATES = {Method.sft: 3e-4, Method.dpo: 1e-4, Method.grpo: 1e-4, Method.rloo: 1e-4, Method.ppo: 1e-4}
DPO_LOSSES = {"sigmoid": 0.3, "sft": 1.0}
TEST_SEED, DEVELOPMENT_SEED, QUESTION_SEED = 300, 301, 7

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


# --- Questions ---


def rows(scenes: Sequence[Scene], seed: int) -> list[Example]:
    """For each scene a question where a digit is and one which digit it is, with their answers."""
    rng = np.random.default_rng(seed)
    return [replace(chat(scene, rng, [task]), weight=1.0) for scene in scenes for task in TASKS]


def prompt_of(example: Example) -> list[Message]:
    return list(example.messages[:-1])


def as_reward_row(example: Example) -> Example:
    (part,) = example.messages[-1]["content"]
    solution = part["bbox"] if part["type"] == "box" else part["text"]
    return Example(prompt_of(example), kind="reward", solution=solution, task=example.task)


def as_preference_row(example: Example, rng: np.random.Generator) -> Example:
    """The right answer against a box that misses it by up to half its size, or against another digit."""
    (part,) = example.messages[-1]["content"]
    if part["type"] == "box":
        wrong = {**part, "bbox": _moved(part["bbox"], example.pictures[0].size, rng)}
    else:
        wrong = {**part, "text": str(rng.choice([name for name in NUMERALS if name != part["text"]]))}
    answers = [[{"role": "assistant", "content": [answer]}] for answer in (part, wrong)]
    return Example(prompt_of(example), kind="preference", chosen=answers[0], rejected=answers[1], task=example.task)


def _moved(box: Sequence[int], size: tuple[int, int], rng: np.random.Generator) -> list[int]:
    """The box moved and resized by 2 to 6 pixels a side, inside the picture."""
    low, high = np.zeros(4, dtype=int), np.array([size[0], size[1]] * 2)
    while True:
        moved = (np.array(box) + rng.choice([-1, 1], size=4) * rng.integers(2, 7, size=4)).clip(low, high)
        if (moved[2:] - moved[:2]).min() >= 3 and not np.array_equal(moved, box):
            return [int(number) for number in moved]


def right_form(completions: Sequence[Any], solution: Sequence[Any], reader: Sequence[Any], **_: Any) -> list[float]:
    """1 for a single well-formed box where a box is asked for, and for none where a word is."""
    scores = []
    for completion, value, read in zip(completions, solution, reader, strict=True):
        parsed = read.shapes(answer_of(text_of(completion)))
        wanted = 0 if read_solution(value).boxes is None else 1
        scores.append(float(len(parsed.shapes) == wanted and not parsed.problems))
    return scores


REWARDS = (RewardTerm("box_iou"), RewardTerm("exact"), RewardTerm("form", 0.1, function=right_form))


# --- Learning ---


class Budget(TrainerCallback):
    """Ends training when the process has used so many seconds of processor time since its start."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.process_time()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self.used = time.process_time() - self.start
        control.should_training_stop = control.should_training_stop or self.used >= self.seconds
        return control


def make_trainer(
    method: Method,
    model: PreTrainedModel,
    processor: Any,
    examples: list[Example],
    rate: float,
    seed: int,
    output: str,
) -> Any:
    """The trainer of `method`, without an end: a Budget stops it."""
    common: dict[str, Any] = {
        "output_dir": output,
        "learning_rate": rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "max_steps": 100_000,
        "weight_decay": 0.0,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "seed": seed,
    }
    if method is Method.sft:
        arguments = StageArguments(per_device_train_batch_size=32, **common)
        return QwenVLSFTTrainer(model, arguments, examples, processing_class=processor)
    if method is Method.dpo:
        rng = np.random.default_rng(seed)
        pairs = [as_preference_row(example, rng) for example in examples]
        losses = {"loss_type": list(DPO_LOSSES), "loss_weights": list(DPO_LOSSES.values())}
        arguments = DPOArguments(per_device_train_batch_size=32, beta=0.1, **losses, **common)
        return QwenVLDPOTrainer(model, arguments, pairs, processing_class=processor)
    sampling = {
        "per_device_train_batch_size": GROUP * PROMPTS,
        "num_generations": GROUP,
        "max_completion_length": LONGEST,
        "temperature": TEMPERATURE,
    }
    config, trainer = {
        Method.grpo: (GRPOConfig, QwenVLGRPOTrainer),
        Method.rloo: (RLOOConfig, QwenVLRLOOTrainer),
        Method.ppo: (PPOArguments, QwenVLPPOTrainer),
    }[method]
    # As a mean over tokens, TRL's default, the two tokens of a word would weigh a fifteenth of a box.
    own = {"loss_type": "grpo"} if method is Method.grpo else {"beta": 0.01}
    prompts = [as_reward_row(example) for example in examples]
    return trainer(model, REWARDS, config(**common, **sampling, **own), prompts, processor)


# --- Commands ---


@app.command()
def run(
    model: Annotated[Path, typer.Option(help="Folder of a model that `make demo` taught.")],
    method: Annotated[Method, typer.Option(help="sft is the control: the same rows, learned from as they are.")],
    seed: Annotated[int, typer.Option(help="Of the training scenes, the sampling and the order.")] = 0,
    minutes: Annotated[float, typer.Option(help="Of processor time, for learning.")] = 2.0,
    rate: Annotated[float | None, typer.Option(help="Learning rate; by default the method's.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the JSON.")] = Path("runs/preference"),
    development: Annotated[bool, typer.Option(help="Score on other held-out scenes: for choosing numbers.")] = False,
) -> None:
    """Teach one model by one method, and write its scores before and after."""
    torch.set_num_threads(1)
    set_seed(seed)
    processor = load_processor(str(model))
    policy = AutoModelForImageTextToText.from_pretrained(model)
    if development:
        held_out = make_scenes(digits_of(DEV_FORMS), HELD_OUT, seed=DEVELOPMENT_SEED)
    else:
        held_out = make_scenes(digits_of(TEST_FORMS), HELD_OUT, seed=TEST_SEED)
    scenes = make_scenes(digits_of((*TRAIN_FORMS, *DEV_FORMS)), SCENES, seed=500 + seed)
    questions = rows(held_out, QUESTION_SEED)
    before = measure(policy, processor, questions, TEMPERATURE)
    budget = Budget(60 * minutes)
    with TemporaryDirectory() as folder:
        chosen = RATES[method] if rate is None else rate
        trainer = make_trainer(method, policy, processor, rows(scenes, seed), chosen, seed, folder)
        trainer.add_callback(budget)
        trainer.train()
    after = measure(policy, processor, questions, TEMPERATURE)
    record = {
        "method": method.value,
        "seed": seed,
        "model": model.name,
        "rate": chosen,
        "minutes": budget.used / 60,
        "steps": trainer.state.global_step,
        "before": asdict(before),
        "after": asdict(after),
        "log": trainer.state.log_history,
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{method.value}-{model.name}-{seed}.json"
    path.write_text(json.dumps(record, indent=1), encoding="utf-8")
    for name, title in TITLES.items():
        start, end = getattr(before, name), getattr(after, name)
        gain, low, high = difference(start, end)
        typer.echo(f"{title:20} {np.mean(start):.3f} -> {np.mean(end):.3f}  {gain:+.3f} ({low:+.3f} to {high:+.3f})")
    typer.echo(f"{trainer.state.global_step} steps in {budget.used / 60:.2f} minutes; {path}")


@app.command("table")
def print_table(folder: Annotated[Path, typer.Argument(help="With the JSONs of `run`.")]) -> None:
    """Print the comparison of all runs in a folder as Markdown, and write it as a page with pictures."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    if not records:
        raise ValueError(f"{folder} has no runs: make some with `run --output {folder}`.")
    typer.echo(table(records))
    path = folder / "report.html"
    path.write_text(page(records), encoding="utf-8")
    typer.echo(path)


if __name__ == "__main__":
    app()
