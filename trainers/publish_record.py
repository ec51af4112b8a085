"""What a model card is written from: a RunRecord, taken from what `qwenvl train` left behind, or written by a
script of one's own with `save_record`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from pydantic import TypeAdapter
from transformers.trainer import TRAINER_STATE_NAME

from trainers.recipe_reading import load_recipe
from trainers.recipes import Recipe

RECIPE_FILE = "recipe.yaml"
RECORD_FILE = "run_record.json"
DATA_FILE = "data.json"
# Licences of models that people start from, for where the model's own card, which has the last word, is out of reach.
LICENSES = {
    "Qwen/Qwen-VL": "Tongyi Qianwen LICENSE AGREEMENT",
    "Qwen/Qwen-VL-Chat": "Tongyi Qianwen LICENSE AGREEMENT",
    "Qwen/Qwen2-VL-2B-Instruct": "apache-2.0",
    "Qwen/Qwen2-VL-7B-Instruct": "apache-2.0",
    "Qwen/Qwen2.5-VL-7B-Instruct": "apache-2.0",
    "Qwen/Qwen2.5-VL-32B-Instruct": "apache-2.0",
}


@dataclass(frozen=True)
class DataSource:
    """Rows that were trained on or scored on. `note`: where they come from, in words."""

    name: str
    num_rows: int
    note: str = ""


@dataclass(frozen=True)
class Metric:
    """A number and under which conditions it was measured: on what, how many, how the answers were made."""

    name: str
    value: float
    conditions: str


@dataclass(frozen=True)
class RunRecord:
    """What a card says of how the model came to be.

    Attributes:
        base_model: Hub name of what the run started from; None for a model trained from nothing.
        base_license: the licence of the base model; of the model itself where there is no base.
        stage: "pretrain", "multitask", "sft", ...
        trained: part -> how it learned ("full", "lora", "frozen").
        settings: what a reader needs to repeat the run, by name, in the order to be shown.
        text: sentences on what the model is and is not for.
    """

    base_model: str | None
    base_license: str
    stage: str
    trained: Mapping[str, str]
    train_data: tuple[DataSource, ...]
    validation_data: tuple[DataSource, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    metrics: tuple[Metric, ...] = ()
    text: str = ""


def write_data_counts(run_dir: Path, train: Mapping[str, int], validation: Mapping[str, int]) -> None:
    """Notes how many rows each file gave, beside the recipe: a file may have changed by the time a card is written."""
    counts = {"train": dict(train), "validation": dict(validation)}
    (run_dir / DATA_FILE).write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")


def save_record(record: RunRecord, run_dir: Path) -> None:
    """For `read_record`: what a run that is not `qwenvl train` says of itself."""
    (run_dir / RECORD_FILE).write_text(TypeAdapter(RunRecord).dump_json(record, indent=1).decode(), encoding="utf-8")


def read_record(run_dir: Path, base_model: str | None = None, license: str | None = None) -> RunRecord:
    """The record that `save_record` wrote, or else that of a run of `qwenvl train` in `run_dir`.

    `base_model`: its name on the Hub, where the recipe names a folder. `license`: of the base model, where neither its
    own card nor the table here says it.

    Raises ValueError if the run's files are missing, or the base model or its licence cannot be named.
    """
    if (run_dir / RECORD_FILE).is_file():
        record = TypeAdapter(RunRecord).validate_json((run_dir / RECORD_FILE).read_text(encoding="utf-8"))
        return replace(record, base_model=base_model or record.base_model, base_license=license or record.base_license)
    for name in (RECIPE_FILE, DATA_FILE, TRAINER_STATE_NAME):
        if not (run_dir / name).is_file():
            raise ValueError(
                f"{run_dir} has no {name}, which `qwenvl train` writes: a card is written from the run. Name "
                "the folder of a finished run with --run."
            )
    recipe = load_recipe(run_dir / RECIPE_FILE)
    counts = json.loads((run_dir / DATA_FILE).read_text())
    history = json.loads((run_dir / TRAINER_STATE_NAME).read_text())["log_history"]
    base = base_model or recipe.model.path
    if Path(base).exists():
        raise ValueError(
            f"The base model is the folder {base}, which nobody else has: say what it is on the Hub with --base-model."
        )
    return RunRecord(
        base_model=base,
        base_license=license or base_license(base, recipe.model.path),
        stage=recipe.stage,
        trained=recipe.training,
        train_data=_sources(counts["train"]),
        validation_data=_sources(counts["validation"]),
        settings=_settings(recipe, history),
        metrics=_metrics(recipe, history, sum(counts["validation"].values())),
    )


def base_license(name: str, path: str) -> str:
    """The licence that the card in folder `path` declares, or the table's for the Hub name `name`."""
    card = Path(path) / "README.md"
    if card.is_file():
        declared = ModelCard.load(card).data
        found = declared.license_name or declared.license
        if found:
            return str(found)
    if name in LICENSES:
        return LICENSES[name]
    raise ValueError(f"The licence of {name} is not known here: name it with --license (as 'apache-2.0').")


def _sources(counts: Mapping[str, int]) -> tuple[DataSource, ...]:
    # The name alone: folders say more of a machine and its owner than of the data.
    return tuple(DataSource(Path(path).name, count) for path, count in counts.items())


def _settings(recipe: Recipe, history: list[dict[str, Any]]) -> dict[str, str]:
    optimizer, lora = recipe.optimizer, recipe.lora
    steps = max((entry["step"] for entry in history), default=0)
    settings = {
        "steps": f"{steps:,} of {optimizer.global_batch_size} rows",
        "optimizer": f"AdamW, betas {optimizer.beta1} and {optimizer.beta2}, weight decay {optimizer.weight_decay}",
        "learning rate": f"{optimizer.learning_rate:g}, {optimizer.schedule}",
        "longest row": f"{recipe.data.max_length:,} tokens",
        "pictures": f"at most {recipe.data.picture_side} x {recipe.data.picture_side} pixels",
        "precision": f"{recipe.hardware.precision}, trained weights in {recipe.model.trained_dtype}",
        "devices": str(recipe.hardware.devices),
        "seed": str(recipe.run.seed),
    }
    if lora is not None:
        settings["LoRA"] = f"rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout}"
    if recipe.model.quantization != "none":
        settings["base in training"] = recipe.model.quantization
    return settings


def _metrics(recipe: Recipe, history: list[dict[str, Any]], num_rows: int) -> tuple[Metric, ...]:
    """The last evaluation's."""
    evaluations = [entry for entry in history if "eval_loss" in entry]
    if not evaluations:
        return ()
    last = evaluations[-1]
    asked = min(recipe.run.answers, num_rows)
    metrics = [Metric("loss", last["eval_loss"], f"{num_rows} held-out rows, after step {last['step']:,}")]
    for name, value in last.items():
        if name.startswith("eval_") and "/" in name:
            conditions = f"{asked} held-out rows, greedy answers, after step {last['step']:,}"
            metrics.append(Metric(name.removeprefix("eval_"), value, conditions))
    return tuple(metrics)
