"""Recipe of the stages grpo, rloo and ppo -> trainer with everything that it says, nothing trained yet."""

from transformers import TrainingArguments, set_seed
from trl import GRPOConfig, RLOOConfig

from processing.example import Example
from processing.rows import read_rows
from trainers.example_batches import at_stage_resolution
from trainers.families import unwrap
from trainers.grpo import QwenVLGRPOTrainer
from trainers.ppo import PPOArguments, QwenVLPPOTrainer
from trainers.recipe_arguments import check_devices, values_for
from trainers.recipe_data import RecipeData, load_examples, usable
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
    values = values_for(config, recipe)
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
    data = load_examples(recipe, lambda file: _read(file, recipe))
    processor = load_recipe_processor(recipe)
    model = load_recipe_model(recipe, processor)
    trainer = SAMPLED[recipe.stage][1](
        model,
        [RewardTerm(one.name, one.weight, one.final_weight, one.settings) for one in section.rewards],
        arguments,
        data.train,
        at_stage_resolution(processor, unwrap(model).config, SFT, recipe.data.picture_side),
        eval_dataset=data.held_out or None,
        trained=trained_parts(recipe),
        learning_rates=learning_rates(recipe),
        max_length=recipe.data.max_length,
        layout=section.layout,
    )
    return trainer, data


def _read(file: DataFile, recipe: Recipe) -> list[Example]:
    return usable(file, recipe, list(read_rows(file.path, format=file.format)))
