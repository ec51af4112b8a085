"""The end of the demonstration: the taught model as it would go to the Hub, tried and described, but not sent."""

from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from examples.handwriting.recipe import Recipe
from examples.handwriting.results import BLIND, Run
from examples.handwriting.scoring import TASKS
from trainers.publish import Publication, prepare, show
from trainers.publish_files import CARD
from trainers.publish_record import DataSource, Metric, RunRecord, save_record

NAME = "you/handwriting-qwen-vl"
QUESTION = "How many digits are there?"
LAST = "stage 3"
TEXT = (
    "A tiny Qwen-VL that learned to read handwritten digits on a sheet, without a GPU, in minutes, to show that every "
    "part of the training works. It knows nothing else: pictures of other things, other words and other languages are "
    "outside of what it saw. The digits are those of scikit-learn's copy of the UCI Optical Recognition of "
    "Handwritten Digits (CC BY 4.0); held-out pictures show digits that no training picture shows."
)


def publish_demo(output: Path, recipe: Recipe, run: Run, model_dir: Path) -> Publication:
    """Builds `output`/published from the taught model, with its code and its card, and prints both. Sends nothing."""
    record = demo_record(recipe, run)
    save_record(record, output)
    console = Console()
    with console.status("dry run of publishing: loading the model in a fresh process, without this package"):
        found = prepare(model_dir, output / "published", NAME, record, has_code=True, question=QUESTION)
    show(found, NAME, console)
    card = (found.plan.folder / CARD).read_text(encoding="utf-8")
    console.print(Markdown(card.split("-->", 1)[1]))
    console.print(f"To send it: qwenvl upload {model_dir} {NAME} --code --upload", highlight=False, soft_wrap=True)
    return found


def demo_record(recipe: Recipe, run: Run) -> RunRecord:
    """What the card says, from what was measured."""
    right = [
        Metric(
            f"{label}, {words}",
            score.mean,
            f"{score.right} of {score.total} held-out pictures right, greedy; "
            f"95 % interval {score.interval[0]:.2f} to {score.interval[1]:.2f}",
        )
        for task, words in TASKS.items()
        for label, moment in (("answers", LAST), ("blank paper instead of the picture", BLIND))
        for score in (run.scores[moment][task],)
    ]
    return RunRecord(
        base_model=None,
        base_license="Apache-2.0",
        stage="sft",
        trained={stage.name: stage.trained for stage in run.stages},
        train_data=tuple(
            DataSource(f"{stage.name}: {stage.learned_from}", stage.different, f"{stage.seen:,} with repetitions")
            for stage in run.stages
        ),
        settings={
            "recipe": f"{recipe.name}, of examples/handwriting/recipe.py",
            "steps": "; ".join(f"{stage.name} {stage.steps:,}" for stage in run.stages),
            "optimizer": "AdamW, cosine",
            "time": f"{run.total_seconds / 60:.1f} minutes",
            "parameters": ", ".join(f"{part} {count:,}" for part, count in run.parameters.items()),
            "seed": str(run.seed),
        },
        metrics=tuple(right),
        text=TEXT,
    )
