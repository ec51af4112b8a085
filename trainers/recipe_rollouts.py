"""Recipe of the stages grpo, rloo and ppo -> trainer with everything that it says, nothing trained yet."""

import dataclasses
from typing import Any

from transformers import TrainingArguments, set_seed
from trl import GRPOConfig, RLOOConfig

from processing.example import Example
from processing.rows import read_rows
from trainers.arguments import StageArguments
from trainers.example_batches import at_stage_resolution
from trainers.families import unwrap
from trainers.grpo import QwenVLGRPOTrainer
from trainers.ppo import PPOArguments, QwenVLPPOTrainer
from trainers.recipe_arguments import check_devices, training_values
from trainers.recipe_data import RecipeData
from trainers.recipe_dpo import learning_rates
from trainers.recipe_model import load_recipe_model, load_recipe_processor, trained_parts
from trainers.recipes import DataFile, Recipe
from trainers.rewards import RewardTerm
from trainers.rloo import QwenVLRLOOTrainer
from trainers.rollout_mixin import RolloutMixin
from trainers.stages import SFT

SAMPLED: dict[str, tuple[type[TrainingArguments], type[RolloutMixin]]] = {
    "grpo": (GRPOConfig, QwenVLGRPOTrainer),
    "rloo": (RLOOConfig, QwenVLRLOOTrainer),
    "ppo": (PPOArguments, QwenVLPPOTrainer),
}
# Key of the section -> name of an argument, where the value goes over as it is.
ARGUMENT_OF: dict[str, str] = {
    "group": "num_generations",
    "longest": "max_completion_length",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "beta": "beta",
    "clip": "epsilon",
    "passes": "num_iterations",
    "vllm": "use_vllm",
    "show": "log_completions",
}
VALUE_ARGUMENT_OF: dict[str, str] = {
    "gamma": "gamma",
    "lam": "lam",
    "coefficient": "value_coefficient",
    "kl_target": "kl_target",
}


def rollout_arguments(recipe: Recipe) -> TrainingArguments:
    """The trainer's settings that `recipe` stands for.

    Raises ValueError as `trainers.recipe_arguments.stage_arguments`.
    """
    section = recipe.sampling
    assert section is not None  # a rule of contradictions.py
    config = SAMPLED[recipe.stage][0]
    known = {field.name for field in dataclasses.fields(config)}
    stages_own = {field.name for field in dataclasses.fields(StageArguments)} - known
    values: dict[str, Any] = {name: value for name, value in training_values(recipe).items() if name not in stages_own}
    values |= {name: getattr(section, key) for key, name in ARGUMENT_OF.items()}
    if recipe.stage == "grpo":
        values["loss_type"] = section.loss
    if section.values is not None:
        values |= {name: getattr(section.values, key) for key, name in VALUE_ARGUMENT_OF.items()}
    # Which layers recompute is set part by part, in recipe_model.py.
    arguments = config(**values, activation_checkpointing=False)
    check_devices(arguments, recipe)
    return arguments


def build_rollout_trainer(recipe: Recipe) -> tuple[RolloutMixin, RecipeData]:
    """The trainer and its rows.

    Raises ValueError as `trainers.train.build_trainer`, and for rows without a solution that the rewards can read.
    """
    section = recipe.sampling
    assert section is not None
    arguments = rollout_arguments(recipe)
    set_seed(recipe.run.seed)
    if not recipe.data.train:
        raise ValueError(f"The recipe {recipe.name} names no rows: set data.train to a list of {{path: ...}}.")
    train = {file.path: _read(file) for file in recipe.data.train}
    validation = {file.path: _read(file) for file in recipe.data.validation}
    processor = load_recipe_processor(recipe)
    model = load_recipe_model(recipe, processor)
    held_out = [example for examples in validation.values() for example in examples]
    counts = {
        name: {path: len(examples) for path, examples in files.items()}
        for name, files in (("train", train), ("validation", validation))
    }
    data = RecipeData([e for examples in train.values() for e in examples], held_out or None, held_out, None, counts)
    trainer = SAMPLED[recipe.stage][1](
        model,
        [RewardTerm(one.name, one.weight, one.final_weight, one.settings) for one in section.rewards],
        arguments,
        data.train,
        at_stage_resolution(processor, unwrap(model).config, SFT, recipe.data.picture_side),
        eval_dataset=data.validation,
        trained=trained_parts(recipe),
        learning_rates=learning_rates(recipe),
        max_length=recipe.data.max_length,
        layout=section.layout,
    )
    return trainer, data


def _read(file: DataFile) -> list[Example]:
    examples = list(read_rows(file.path, format=file.format))
    if not examples:
        raise ValueError(f"{file.path} has no row to train on.")
    return examples
