"""Recipe of the stage dpo -> QwenVLDPOTrainer with everything that it says, nothing trained yet."""

from transformers import set_seed

from processing.example import Example
from processing.rows import read_rows
from trainers.dpo import QwenVLDPOTrainer
from trainers.dpo_arguments import DPOArguments
from trainers.example_batches import at_stage_resolution
from trainers.families import unwrap
from trainers.optimizer import LearningRates
from trainers.preference_pairs import PreferencePairs
from trainers.recipe_arguments import check_devices, values_for
from trainers.recipe_data import RecipeData, load_examples, usable
from trainers.recipe_model import load_recipe_model, load_recipe_processor, trained_parts
from trainers.recipes import DataFile, Recipe
from trainers.stages import SFT

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
    values = values_for(DPOArguments, recipe)
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
    data = load_examples(recipe, lambda file: _read(file, recipe, pairs))
    trainer = QwenVLDPOTrainer(
        model,
        arguments,
        data.train,
        data.held_out or None,
        processing_class=processor,
        trained=trained_parts(recipe),
        learning_rates=learning_rates(recipe),
    )
    return trainer, data


def _read(file: DataFile, recipe: Recipe, pairs: PreferencePairs) -> list[Example]:
    examples = list(read_rows(file.path, format=file.format))
    for example in examples:
        pairs.check(example)
    return usable(file, recipe, examples, pairs.fits)
