"""Recipe -> processor and model, ready to train: loaded, quantised, wrapped by LoRA, as the recipe says."""

from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, PreTrainedModel

import modeling_qwenvl  # noqa: F401 -- registers Qwen-VL with AutoModelForImageTextToText
from processing.processing_families import DynamicResolutionMixin, load_processor
from trainers.families import find_parts
from trainers.freezing import TrainedParts, freeze
from trainers.lora import TORCH_DTYPES, add_lora, cast_trained, check_quantized, make_room, quantization_config
from trainers.recipes import Recipe


def model_path(recipe: Recipe) -> str:
    if not recipe.model.path:
        raise ValueError(f"The recipe {recipe.name} names no model: set model.path to a folder or a Hub name.")
    return recipe.model.path


def load_recipe_processor(recipe: Recipe) -> Any:
    """The processor of `model.path`, with `model.new_tokens` and the limits on videos. The trainer sets
    `data.picture_side`.

    Raises ValueError for limits on videos with Qwen-VL, which sees none.
    """
    processor = load_processor(model_path(recipe))
    processor.tokenizer.add_tokens(list(recipe.model.new_tokens))
    data = recipe.data
    if (data.video_side, data.video_fps, data.video_frames) != (None, None, None):
        if not isinstance(processor, DynamicResolutionMixin):
            raise ValueError(
                f"The recipe {recipe.name} sets data.video_side, video_fps or video_frames, but {model_path(recipe)} "
                "is a Qwen-VL, which sees no videos."
            )
        side = data.video_side
        processor.set_video_limits(None if side is None else side**2, data.video_fps, data.video_frames)
    return processor


def load_recipe_model(recipe: Recipe, processor: Any) -> PreTrainedModel | PeftModel:
    """The model of `model.path`, with what the recipe puts around it.

    Frozen weights are held in `model.dtype`, those that learn in `model.trained_dtype`. Raises ValueError if 4 bits
    reached anything else than the language model.
    """
    path, settings = model_path(recipe), recipe.model
    dtype = TORCH_DTYPES[settings.dtype]
    options: dict[str, Any] = {}
    if settings.quantization == "nf4":
        device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else "cpu"
        options["quantization_config"] = quantization_config(path, TORCH_DTYPES[recipe.hardware.precision])
        options["device_map"] = {"": device}
    model = AutoModelForImageTextToText.from_pretrained(
        path, dtype=dtype, attn_implementation=settings.attention, **options
    )
    if settings.quantization == "nf4":
        check_quantized(model)

    return prepare_model(model, recipe, processor.tokenizer.convert_tokens_to_ids(list(settings.new_tokens)))


def prepare_model(model: PreTrainedModel, recipe: Recipe, new_token_ids: list[int]) -> PreTrainedModel | PeftModel:
    """What the recipe does to a loaded model: room for new tokens, LoRA, what is frozen, dtypes, recomputation."""
    make_room(model, max(new_token_ids, default=-1) + 1)
    if recipe.lora is not None:
        prepared: PreTrainedModel | PeftModel = add_lora(model, recipe, new_token_ids)
    else:
        prepared = model
        freeze(model, trained_parts(recipe))
        cast_trained(model, TORCH_DTYPES[recipe.model.trained_dtype])
    _set_checkpointing(model, recipe)
    return prepared


def trained_parts(recipe: Recipe) -> TrainedParts:
    """What learns, in the stage trainers' terms."""
    return TrainedParts(recipe.trained_parts, recipe.parts.tower.last_blocks, recipe.parts.frozen_patterns)


def _set_checkpointing(model: PreTrainedModel, recipe: Recipe) -> None:
    """Recomputation in the parts that ask for it. Done after PEFT, which would make a frozen tower's input learn."""
    asked = {"tower": recipe.parts.tower.checkpointing, "language_model": recipe.parts.language_model.checkpointing}
    for part, wanted in asked.items():
        if wanted:
            for module in find_parts(model).modules(part):
                assert isinstance(module, PreTrainedModel)
                module.activation_checkpointing_enable({"use_reentrant": False})
