"""A recipe, run: model, processor, data, stage trainer, weights. What `qwenvl train recipe.yaml` calls.

    python -m trainers.train recipe.yaml optimizer.learning_rate=1e-5

is the same, and so is

    from trainers.recipe_reading import load_recipe
    from trainers.train import train
    train(load_recipe("recipe.yaml", ["optimizer.learning_rate=1e-5"]))
"""

import logging
import sys
from pathlib import Path

from rich.console import Console
from transformers import set_seed

from trainers.checkpoints import find_last_checkpoint
from trainers.dpo import QwenVLDPOTrainer
from trainers.evaluation import GenerationEvaluation
from trainers.example_batches import at_stage_resolution
from trainers.families import unwrap
from trainers.multitask import QwenVLMultiTaskTrainer
from trainers.pretrain import QwenVLPretrainTrainer
from trainers.publish_record import RECIPE_FILE, write_data_counts
from trainers.recipe_arguments import stage_arguments
from trainers.recipe_data import RecipeData, load_recipe_data
from trainers.recipe_dpo import build_dpo_trainer
from trainers.recipe_model import load_recipe_model, load_recipe_processor, trained_parts
from trainers.recipe_reading import dump_recipe, load_recipe
from trainers.recipe_rollouts import build_rollout_trainer
from trainers.recipes import SAMPLED_STAGES, Recipe
from trainers.rollout_mixin import RolloutMixin
from trainers.sft import QwenVLSFTTrainer
from trainers.stage_trainer import StageTrainer

TRAINERS: dict[str, type[StageTrainer]] = {
    "pretrain": QwenVLPretrainTrainer,
    "multitask": QwenVLMultiTaskTrainer,
    "sft": QwenVLSFTTrainer,
}
FINAL = "final"


def build_trainer(recipe: Recipe) -> StageTrainer | QwenVLDPOTrainer | RolloutMixin:
    """The stage's trainer with everything that `recipe` says, nothing trained yet.

    Raises ValueError for a missing model or data, bad rows, and another number of devices than the recipe's.
    """
    return _build(recipe)[0]


def _build(recipe: Recipe) -> tuple[StageTrainer | QwenVLDPOTrainer | RolloutMixin, RecipeData]:
    if recipe.stage == "dpo":
        return build_dpo_trainer(recipe)
    if recipe.stage in SAMPLED_STAGES:
        return build_rollout_trainer(recipe)
    arguments = stage_arguments(recipe)
    # LoRA's and new tokens' first values come from here.
    set_seed(recipe.run.seed)
    processor = load_recipe_processor(recipe)
    model = load_recipe_model(recipe, processor)
    trainer_class = TRAINERS[recipe.stage]
    stage = trainer_class.stage
    resized = at_stage_resolution(processor, unwrap(model).config, stage, recipe.data.picture_side)
    data = load_recipe_data(recipe, stage, resized)
    asked = data.held_out[: recipe.run.answers]
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.held_out or None,
        processing_class=resized,
        trained=trained_parts(recipe),
        generation=GenerationEvaluation(asked) if asked else None,
    )
    return trainer, data


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Runs `recipe` and returns the folder with the final weights and the processor, `run.output_dir`/final.

    The recipe itself, every default spelled out, is written to `run.output_dir`/recipe.yaml; data.json and
    trainer_state.json beside it tell a model card (publish_record.py) the rows and what was measured. `resume` goes on
    from the last whole checkpoint there.

    Raises ValueError, besides `build_trainer`, if the folder holds checkpoints of another run.
    """
    output_dir = Path(recipe.run.output_dir)
    if not resume and find_last_checkpoint(output_dir) is not None:
        raise ValueError(
            f"{output_dir} holds checkpoints already: pass --resume to go on from the last, or set run.output_dir to "
            "another folder."
        )
    trainer, data = _build(recipe)
    if trainer.is_world_process_zero():
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / RECIPE_FILE).write_text(dump_recipe(recipe), encoding="utf-8")
        write_data_counts(output_dir, **data.counts)
    trainer.train(resume_from_checkpoint="auto" if resume else None)
    trainer.save_model(str(output_dir / FINAL))
    trainer.save_state()
    return output_dir / FINAL


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    name, *overrides = [argument for argument in sys.argv[1:] if argument != "--resume"]
    Console().print(f"Weights: {train(load_recipe(name, overrides), resume='--resume' in sys.argv)}")
