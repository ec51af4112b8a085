"""`python -m examples.handwriting.demo --output runs/demo`: teaches a small Qwen-VL and writes a report."""

import json
import logging
import platform
import shutil
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Annotated

import torch
import transformers
import typer
from rich import get_console
from rich.table import Table

from examples.handwriting.lesson import Lesson, Taught
from examples.handwriting.progress import make_progress
from examples.handwriting.publishing import publish_demo
from examples.handwriting.recipe import LONG, SHORT, Recipe
from examples.handwriting.report import report
from examples.handwriting.results import BLIND, MOMENTS, Run
from examples.handwriting.scenes import as_row
from examples.handwriting.scoring import TASKS

RECIPES = {"short": SHORT, "long": LONG}
RecipeName = StrEnum("RecipeName", list(RECIPES))
NUM_SAMPLES = 6  # held-out pictures that are saved to try the model on


def main(
    output: Annotated[
        Path, typer.Option(help="Folder for report, model and sample pictures; its files are replaced.")
    ] = Path("runs/demo"),
    recipe: Annotated[
        RecipeName, typer.Option(help="short: ten minutes on two cores; long: half an hour.")
    ] = RecipeName.short,
    minutes: Annotated[
        float | None, typer.Option(help="Steps are left out to end in this time; by default the recipe's.")
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="How many models to teach; the report shows the first, and all scores.")
    ] = 1,
) -> None:
    """Teach a small Qwen-VL to read handwritten digits, from nothing, and report what it learned."""
    first, *_ = run_demo(output, RECIPES[recipe], minutes, range(seeds))
    publish_demo(output, RECIPES[recipe], first.run, first.model_dir)


def run_demo(output: Path, recipe: Recipe, minutes: float | None = None, seeds: Sequence[int] = (0,)) -> list[Taught]:
    """`main` for Python: teaches a model per seed; report.html, results.json, model/ and samples/ go to `output`.

    Models after the first go to `output`/seed_1/model and so on.
    """
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    console = get_console()  # also that of the questions inside training
    if minutes is not None:
        recipe = replace(recipe, limit_minutes=minutes)
    output.mkdir(parents=True, exist_ok=True)
    taught = []
    with make_progress(console) as progress:
        for seed in seeds:
            folder = output if seed == seeds[0] else output / f"seed_{seed}"
            deadline = perf_counter() + 60 * recipe.limit_minutes
            taught.append(Lesson(recipe, seed, folder, progress, deadline).teach())
    first = taught[0]
    samples = _save_samples(first, output / "samples")
    commands = [
        f"qwenvl chat --model {first.model_dir} --image {samples[0]}",
        f"qwenvl chat --model {first.model_dir} --image {samples[0]} "
        f'--question "Where is the {first.held_out[0].marks[0].name}?" --draw boxes.png',
    ]
    runs = [one.run for one in taught]
    page = output / "report.html"
    page.write_text(report(runs, first.answers, machine(), recipe.name, commands), encoding="utf-8")
    results = {"recipe": recipe.name, "machine": machine(), "runs": [run.as_json() for run in runs]}
    (output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    console.print(_table(runs[0]))
    console.print(f"{runs[0].total_seconds / 60:.1f} minutes. The report: [bold]{page}[/bold]", highlight=False)
    console.print(f"The model: {first.model_dir}. Ask it something:", highlight=False)
    for command in commands:
        console.print(f"  {command}", highlight=False, soft_wrap=True)
    return taught


def _save_samples(taught: Taught, folder: Path) -> list[Path]:
    """The first held-out scenes as PNG, and truth.json with what is on them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    paths = [folder / f"{number}.png" for number in range(min(NUM_SAMPLES, len(taught.held_out)))]
    for path, scene in zip(paths, taught.held_out, strict=False):
        scene.picture.save(path)
    truth = {path.name: as_row(scene) for path, scene in zip(paths, taught.held_out, strict=False)}
    (folder / "truth.json").write_text(json.dumps(truth, indent=1), encoding="utf-8")
    return paths


def machine() -> dict[str, str]:
    """What the run ran on."""
    threads = torch.get_num_threads()
    return {
        "processors": f"{threads} core{'s' if threads > 1 else ''}",
        "machine": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
    } | {name: version(name) for name in ("torch", "transformers", "scikit-learn")}


def _table(run: Run) -> Table:
    table = Table("task", title="share of right answers on held-out scenes")
    for moment in (*MOMENTS, BLIND):
        table.add_column(MOMENTS.get(moment, moment), justify="right")
    for task in TASKS:
        table.add_row(task, *(f"{run.scores[moment][task].mean:.2f}" for moment in (*MOMENTS, BLIND)))
    return table


if __name__ == "__main__":
    typer.run(main)
