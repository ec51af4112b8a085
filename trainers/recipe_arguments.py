"""Recipe -> StageArguments (transformers' TrainingArguments): one table of names, and the few values to work out."""

from dataclasses import fields
from typing import Any

import torch
from transformers import TrainingArguments

from trainers.arguments import StageArguments
from trainers.recipes import Recipe

# Key of a recipe -> name of an argument, where the value goes over as it is.
ARGUMENT_OF: dict[str, str] = {
    "optimizer.learning_rate": "learning_rate",
    "optimizer.warmup_steps": "warmup_steps",
    "optimizer.beta1": "adam_beta1",
    "optimizer.beta2": "adam_beta2",
    "optimizer.epsilon": "adam_epsilon",
    "optimizer.weight_decay": "weight_decay",
    "optimizer.max_grad_norm": "max_grad_norm",
    "optimizer.label_smoothing": "label_smoothing_factor",
    "optimizer.z_loss": "z_loss",
    "parts.tower.learning_rate": "tower_learning_rate",
    "parts.tower.layer_decay": "tower_layer_decay",
    "parts.adapter.learning_rate": "adapter_learning_rate",
    "parts.embeddings.learning_rate": "embeddings_learning_rate",
    "data.picture_side": "resolution",
    "data.max_length": "max_length",
    "data.packing": "packing",
    "data.workers": "dataloader_num_workers",
    "hardware.per_device_batch_size": "per_device_train_batch_size",
    "run.output_dir": "output_dir",
    "run.seed": "seed",
    "run.log_every": "logging_steps",
    "run.save_every": "save_steps",
    "run.keep_checkpoints": "save_total_limit",
    "run.report_to": "report_to",
    "run.feature_cache_dir": "feature_cache_dir",
}
SCHEDULERS = {"cosine": "cosine_with_min_lr", "linear": "linear", "constant": "constant_with_warmup"}
OPTIMIZERS = {"float32": "adamw_torch_fused", "8bit": "adamw_bnb_8bit", "8bit_paged": "paged_adamw_8bit"}


def training_values(recipe: Recipe) -> dict[str, Any]:
    """Names and values of TrainingArguments, and of StageArguments, that `recipe` stands for."""
    values: dict[str, Any] = {name: _value(recipe, key) for key, name in ARGUMENT_OF.items()}
    optimizer, hardware = recipe.optimizer, recipe.hardware
    values |= {
        "max_steps": -1 if optimizer.max_steps is None else optimizer.max_steps,
        "num_train_epochs": 1.0 if optimizer.epochs is None else optimizer.epochs,
        "gradient_accumulation_steps": recipe.accumulation_steps,
        "lr_scheduler_type": SCHEDULERS[optimizer.schedule],
        "optim": OPTIMIZERS[optimizer.states],
        "bf16": hardware.precision == "bfloat16",
        "per_device_eval_batch_size": hardware.per_device_batch_size,
        "eval_strategy": "no" if recipe.run.evaluate_every is None else "steps",
        "eval_steps": recipe.run.evaluate_every,
        "save_strategy": "steps",
        "fsdp": True if hardware.sharding == "full" else None,
        "use_cpu": not torch.accelerator.is_available(),
    }
    if optimizer.schedule == "cosine":
        # As a share, so that parts with their own rate end at the same share of it.
        values["lr_scheduler_kwargs"] = {"min_lr_rate": optimizer.min_learning_rate / optimizer.learning_rate}
    return values


def values_for(arguments: type[TrainingArguments], recipe: Recipe) -> dict[str, Any]:
    """`training_values` without those that StageArguments has and `arguments`, of another trainer, has not."""
    stages_own = {field.name for field in fields(StageArguments)} - {field.name for field in fields(arguments)}
    return {name: value for name, value in training_values(recipe).items() if name not in stages_own}


def stage_arguments(recipe: Recipe) -> StageArguments:
    """The trainer's settings that `recipe` stands for.

    Raises ValueError if this run has another number of devices than the recipe, so that the global batch would differ.

    Example:
        >>> arguments = stage_arguments(load_recipe("paper_sft"))
        >>> arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs, arguments.gradient_accumulation_steps
        (<SchedulerType.COSINE_WITH_MIN_LR: 'cosine_with_min_lr'>, {'min_lr_rate': 0.1}, 128)
    """
    arguments = StageArguments(**training_values(recipe))
    check_devices(arguments, recipe)
    return arguments


def check_devices(arguments: TrainingArguments, recipe: Recipe) -> None:
    """ValueError if this run has another number of devices than the recipe."""
    hardware, optimizer = recipe.hardware, recipe.optimizer
    if arguments.world_size != hardware.devices:
        raise ValueError(
            f"The recipe {recipe.name} is for {hardware.devices} device(s), this run has {arguments.world_size}: "
            f"start it with `torchrun --nproc-per-node {hardware.devices} -m trainers.train`, or set hardware.devices "
            f"to {arguments.world_size} (the global batch stays {optimizer.global_batch_size})."
        )


def _value(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value
