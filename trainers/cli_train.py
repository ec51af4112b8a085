"""`qwenvl train`, `qwenvl estimate`, `qwenvl merge`: recipes from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer

Result = TypeVar("Result")
RecipeName = Annotated[
    str, typer.Argument(help="A recipe file (.yaml), or the name of one that comes with the package.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value, as in YAML; can be given several times.")
]


def train(
    recipe: RecipeName,
    set_: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last whole checkpoint in run.output_dir.")] = False,
) -> None:
    """Train as a recipe says; the weights go to run.output_dir/final."""
    import logging

    from rich.console import Console

    from trainers.recipe_reading import load_recipe

    logging.basicConfig(level=logging.INFO)
    loaded = _or_exit(lambda: load_recipe(recipe, set_ or ()))

    from trainers.train import train

    final = _or_exit(lambda: train(loaded, resume=resume))
    Console().print(f"Weights: {final}")


def estimate(
    recipe: RecipeName,
    set_: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option(help="Name of a GPU instead of hardware.memory_gib, as 'RTX 4090'.")
    ] = None,
) -> None:
    """Say what memory a recipe needs, part by part; exit with 1 if it does not fit."""
    from rich.console import Console

    from trainers.recipe_reading import load_recipe

    loaded = _or_exit(lambda: load_recipe(recipe, set_ or ()))

    from trainers.estimate import GPUS, estimate

    if gpu is not None and gpu not in GPUS:
        _exit(f"{gpu} is not in the table of GPUs: {', '.join(GPUS)}. Or set hardware.memory_gib.")
    found = _or_exit(lambda: estimate(loaded))
    console = Console()
    console.print(found.table())
    wanted = loaded.hardware.memory_gib if gpu is None else GPUS[gpu]
    place = f"{wanted:g} GiB" if gpu is None else f"{gpu} ({wanted:g} GiB)"
    console.print(f"{'Fits' if found.fits(wanted) else 'Does not fit'} {place}: {found.gib_needed:.1f} GiB needed.")
    others = [name for name, memory in GPUS.items() if found.fits(memory)]
    console.print(f"Fits: {', '.join(others) or 'none of the GPUs in the table'}.")
    if not found.fits(wanted):
        raise typer.Exit(1)


def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder with adapter_config.json.")],
    output: Annotated[Path, typer.Argument(help="Folder for the merged model; must not exist or be empty.")],
    base: Annotated[
        str | None, typer.Option(help="The unquantised base; by default the one that the adapter names.")
    ] = None,
) -> None:
    """Merge LoRA onto its unquantised base: an ordinary model folder, with the processor."""
    from rich.console import Console

    from trainers.merge import merge

    if output.is_dir() and any(output.iterdir()):
        _exit(f"{output} is not empty: give another folder.")
    report = _or_exit(lambda: merge(adapter, output, base))
    Console().print(f"{output}: {report}")


def _or_exit(work: Callable[[], Result]) -> Result:
    """The result of `work`; a refusal becomes one line and exit code 2."""
    try:
        return work()
    except (ValueError, FileNotFoundError) as error:
        _exit(str(error))


def _exit(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(2)
