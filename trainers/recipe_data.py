"""Recipe -> Examples to train on and to evaluate on. Rows are read and checked at the start, pictures when used."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from processing.example import Example, RowError
from processing.length import LengthPolicy
from processing.mixing import Mixture
from processing.rows import read_rows
from processing.supervision import Supervision
from trainers.recipes import DataFile, Recipe
from trainers.stages import Stage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecipeData:
    """Examples, which a trainer encodes itself: `train` once per epoch or a Mixture, and `held_out` for evaluation.

    `counts`: "train" and "validation" -> path of each file -> how many of its rows are used.
    """

    train: Any
    held_out: list[Example]
    counts: dict[str, dict[str, int]]


def load_recipe_data(recipe: Recipe, stage: Stage, processor: Any) -> RecipeData:
    """Reads `data.train` and `data.validation`.

    All rows once per epoch, or a mixture where the files have different weights. `processor` is at the resolution of
    the run.

    Raises ValueError (RowError with file, line and id) for rows that cannot be read, and if there are none.
    """
    data = recipe.data
    if not data.train:
        raise ValueError(f"The recipe {recipe.name} names no rows: set data.train to a list of {{path: ...}}.")
    supervise = Supervision(processor, length=LengthPolicy(data.max_length, ("shrink", "trim", data.too_long)))
    files = [_read(file, recipe, stage, supervise) for file in data.train]
    train = [example for examples in files for example in examples]
    held_out_files = [_read(file, recipe, stage, supervise) for file in data.validation]
    held_out = [example for examples in held_out_files for example in examples]
    counts = {"train": _counts(data.train, files), "validation": _counts(data.validation, held_out_files)}
    if len({file.weight for file in data.train}) == 1:
        return RecipeData(train, held_out, counts)
    # Numbered, since the same file may be listed twice.
    names = [f"{number} {file.path}" for number, file in enumerate(data.train)]
    weights = dict(zip(names, (file.weight for file in data.train), strict=True))
    mixture = Mixture(dict(zip(names, files, strict=True)), weights, stop="all", seed=recipe.run.seed)
    return RecipeData(mixture, held_out, counts)


def load_examples(recipe: Recipe, read: Callable[[DataFile], list[Example]]) -> RecipeData:
    """Whole files of Examples, once per epoch, for trainers that encode them themselves.

    Raises ValueError if the recipe names no rows.
    """
    if not recipe.data.train:
        raise ValueError(f"The recipe {recipe.name} names no rows: set data.train to a list of {{path: ...}}.")
    train = {file.path: read(file) for file in recipe.data.train}
    validation = {file.path: read(file) for file in recipe.data.validation}
    held_out = [example for examples in validation.values() for example in examples]
    counts = {
        name: {path: len(examples) for path, examples in files.items()}
        for name, files in (("train", train), ("validation", validation))
    }
    return RecipeData([e for examples in train.values() for e in examples], held_out, counts)


def usable(
    file: DataFile, recipe: Recipe, examples: list[Example], fits: Callable[[Example], bool] | None = None
) -> list[Example]:
    """`examples` of `file`, without those that do not fit where the recipe drops them (without `fits`, all do).

    Raises ValueError if none is left.
    """
    if fits is not None and recipe.data.too_long == "drop":
        kept = [example for example in examples if fits(example)]
        if len(kept) < len(examples):
            logger.warning(
                "%s: %d of %d rows are too long and left out.", file.path, len(examples) - len(kept), len(examples)
            )
        examples = kept
    if not examples:
        raise ValueError(f"{file.path} has no row to train on.")
    return examples


def _read(file: DataFile, recipe: Recipe, stage: Stage, supervise: Supervision) -> list[Example]:
    examples = [_in_style(example, stage) for example in read_rows(file.path, format=file.format)]
    return usable(file, recipe, examples, lambda example: supervise.measure(example) is not None)


def _counts(files: Sequence[DataFile], examples: Sequence[Sequence[Example]]) -> dict[str, int]:
    return {file.path: len(rows) for file, rows in zip(files, examples, strict=True)}


def _in_style(example: Example, stage: Stage) -> Example:
    # The paper's stages 1 and 2 write prompt and answer one after the other, without roles.
    try:
        return replace(example, style=stage.label_style)
    except ValueError as error:
        raise RowError(example.source, f"{error} (stage {stage.name})") from error
