"""Recipe of the stage dpo -> QwenVLDPOTrainer with everything that it says, nothing trained yet."""

import dataclasses
import logging
from typing import Any

from transformers import set_seed

from processing.example import Example
from processing.rows import read_rows
from trainers.arguments import StageArguments
from trainers.dpo import QwenVLDPOTrainer
from trainers.dpo_arguments import DPOArguments
from trainers.example_batches import at_stage_resolution
from trainers.families import unwrap
from trainers.optimizer import LearningRates
from trainers.preference_pairs import PreferencePairs
from trainers.recipe_arguments import check_devices, training_values
from trainers.recipe_data import RecipeData
from trainers.recipe_model import load_recipe_model, load_recipe_processor, trained_parts
from trainers.recipes import DataFile, Recipe
from trainers.stages import SFT

logger = logging.getLogger(__name__)

# Key of the section -> name of an argument of TRL's or ours, where the value goes over as it is.
ARGUMENT_OF: dict[str, str] = {
    "beta": "beta",
    "divergence": "f_divergence_type",
    "ld_alpha": "ld_alpha",
    "label_smoothing": "label_smoothing",
    "weighted": "use_weighting",
    "reference": "reference",
    "reference_cache_dir": "reference_cache_dir",
    "layout": "completion_layout",
}


def dpo_arguments(recipe: Recipe) -> DPOArguments:
    """The trainer's settings that `recipe` stands for.

    Raises ValueError as `trainers.recipe_arguments.stage_arguments`.
    """
    section = recipe.preference
    assert section is not None  # a rule of contradictions.py
    known = {field.name for field in dataclasses.fields(DPOArguments)}
    stages_own = {field.name for field in dataclasses.fields(StageArguments)} - known
    values: dict[str, Any] = {name: value for name, value in training_values(recipe).items() if name not in stages_own}
    values |= {name: getattr(section, key) for key, name in ARGUMENT_OF.items()}
    values["loss_type"] = list(section.losses)
    values["loss_weights"] = list(section.loss_weights) or None
    if section.alpha is not None:
        values["f_alpha_divergence_coef"] = section.alpha
    # Which layers recompute is set part by part, in recipe_model.py.
    arguments = DPOArguments(**values, activation_checkpointing=False)
    check_devices(arguments, recipe)
    return arguments


def learning_rates(recipe: Recipe) -> LearningRates:
    """Those of the parts."""
    parts = recipe.parts
    return LearningRates(
        base=recipe.optimizer.learning_rate,
        tower=parts.tower.learning_rate,
        adapter=parts.adapter.learning_rate,
        embeddings=parts.embeddings.learning_rate,
        tower_layer_decay=parts.tower.layer_decay,
    )


def build_dpo_trainer(recipe: Recipe) -> tuple[QwenVLDPOTrainer, RecipeData]:
    """The trainer and its rows.

    Raises ValueError as `trainers.train.build_trainer`, and for rows that are no preferences.
    """
    arguments = dpo_arguments(recipe)
    set_seed(recipe.run.seed)
    processor = load_recipe_processor(recipe)
    model = load_recipe_model(recipe, processor)
    resized = at_stage_resolution(processor, unwrap(model).config, SFT, recipe.data.picture_side)
    pairs = PreferencePairs(resized, recipe.data.max_length)
    if not recipe.data.train:
        raise ValueError(f"The recipe {recipe.name} names no rows: set data.train to a list of {{path: ...}}.")
    train = {file.path: _read(file, recipe, pairs) for file in recipe.data.train}
    validation = {file.path: _read(file, recipe, pairs) for file in recipe.data.validation}
    held_out = [example for examples in validation.values() for example in examples]
    counts = {
        name: {path: len(examples) for path, examples in files.items()}
        for name, files in (("train", train), ("validation", validation))
    }
    data = RecipeData([e for examples in train.values() for e in examples], held_out or None, held_out, None, counts)
    trainer = QwenVLDPOTrainer(
        model,
        arguments,
        data.train,
        data.validation,
        processing_class=processor,
        trained=trained_parts(recipe),
        learning_rates=learning_rates(recipe),
    )
    return trainer, data


def _read(file: DataFile, recipe: Recipe, pairs: PreferencePairs) -> list[Example]:
    examples = list(read_rows(file.path, format=file.format))
    for example in examples:
        pairs.check(example)
    if recipe.data.too_long == "drop":
        kept = [example for example in examples if pairs.fits(example)]
        if len(kept) < len(examples):
            logger.warning(
                "%s: %d of %d rows are too long and left out.", file.path, len(examples) - len(kept), len(examples)
            )
        examples = kept
    if not examples:
        raise ValueError(f"{file.path} has no row to train on.")
    return examples
