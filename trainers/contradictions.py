"""Values of a recipe that cannot hold together: one sentence for each, which says what to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainers.recipes import Recipe


def contradictions(recipe: Recipe) -> list[str]:
    """What in `recipe` contradicts something else in it; empty for a sound one.

    Example:
        >>> load_recipe("paper_sft", ["hardware.devices=3"])
        Traceback (most recent call last):
        ValueError: paper_sft: optimizer.global_batch_size 128 is not a multiple of 3 device(s) x \
hardware.per_device_batch_size 1
    """
    parts, optimizer, hardware, data = recipe.parts, recipe.optimizer, recipe.hardware, recipe.data
    at_once = hardware.devices * hardware.per_device_batch_size
    quantized = recipe.model.quantization == "nf4"
    tower = parts.tower
    tower_is_plain = (tower.learning_rate, tower.layer_decay, tower.last_blocks) == (None, 1.0, None)
    weights = {file.weight for file in data.train}
    is_dpo = recipe.stage == "dpo"
    sampling = recipe.sampling
    is_sampled = recipe.stage in ("grpo", "rloo", "ppo")
    compares = is_dpo or is_sampled  # with a reference or with other answers; no next-token loss
    rules = [
        (
            "nothing learns: every part is frozen; set train of a part to full or lora",
            not recipe.trained_parts,
        ),
        (
            "4-bit weights cannot learn (model.quantization is nf4 and parts.language_model.train is full): "
            "train it with lora, or set model.quantization to none",
            quantized and parts.language_model.train == "full",
        ),
        (
            "4-bit weights are only trained beside LoRA: set parts.language_model.train to lora, or "
            "model.quantization to none",
            quantized and not recipe.lora_parts,
        ),
        (
            f"parts {', '.join(recipe.lora_parts)} train through LoRA, but lora is null: give its rank and alpha",
            bool(recipe.lora_parts) and recipe.lora is None,
        ),
        (
            "lora is given, but no part says train: lora; set one to lora, or set lora to null",
            not recipe.lora_parts and recipe.lora is not None,
        ),
        (
            "the tower cannot be trained whole next to LoRA: set parts.tower.train to lora or frozen",
            bool(recipe.lora_parts) and parts.tower.train == "full",
        ),
        (
            "the language model cannot be trained whole next to LoRA: train it with lora, or no part",
            bool(recipe.lora_parts) and parts.language_model.train == "full",
        ),
        (
            "parts.embeddings.train is new_tokens, which needs LoRA in another part: say full, or use LoRA",
            parts.embeddings.train == "new_tokens" and not recipe.lora_parts,
        ),
        (
            "parts.tower is frozen, but has a learning_rate, a layer_decay or last_blocks: train it, or set them "
            "to null, 1.0 and null",
            parts.tower.train == "frozen" and not tower_is_plain,
        ),
        (
            "parts.adapter is frozen, but has a learning_rate of its own: train it, or set it to null",
            parts.adapter.train == "frozen" and parts.adapter.learning_rate is not None,
        ),
        (
            "parts.embeddings is frozen, but has a learning_rate of its own: train it, or set it to null",
            parts.embeddings.train == "frozen" and parts.embeddings.learning_rate is not None,
        ),
        (
            "a frozen tower keeps nothing to recompute: set parts.tower.checkpointing to false",
            parts.tower.train == "frozen" and parts.tower.checkpointing,
        ),
        (
            "parts.embeddings.train is new_tokens, but model.new_tokens is empty: name the tokens",
            parts.embeddings.train == "new_tokens" and not recipe.model.new_tokens,
        ),
        (
            "model.new_tokens would stay at their random start: set parts.embeddings.train to new_tokens or full",
            bool(recipe.model.new_tokens) and parts.embeddings.train == "frozen",
        ),
        (
            f"optimizer.min_learning_rate {optimizer.min_learning_rate} is above the learning_rate "
            f"{optimizer.learning_rate}",
            optimizer.min_learning_rate > optimizer.learning_rate,
        ),
        (
            f"optimizer.min_learning_rate belongs to the cosine, but the schedule is {optimizer.schedule}: "
            "set it to 0.0",
            optimizer.min_learning_rate > 0 and optimizer.schedule != "cosine",
        ),
        (
            f"give one of optimizer.max_steps ({optimizer.max_steps}) and optimizer.epochs ({optimizer.epochs}), "
            "and set the other to null",
            (optimizer.max_steps is None) == (optimizer.epochs is None),
        ),
        (
            f"optimizer.warmup_steps {optimizer.warmup_steps} is neither a whole number nor a share below 1",
            optimizer.warmup_steps >= 1 and optimizer.warmup_steps != int(optimizer.warmup_steps),
        ),
        (
            f"optimizer.warmup_steps {optimizer.warmup_steps:g} leaves nothing of max_steps {optimizer.max_steps}",
            optimizer.max_steps is not None and optimizer.warmup_steps >= optimizer.max_steps,
        ),
        (
            f"optimizer.global_batch_size {optimizer.global_batch_size} is not a multiple of "
            f"{hardware.devices} device(s) x hardware.per_device_batch_size {hardware.per_device_batch_size}",
            optimizer.global_batch_size % at_once != 0,
        ),
        (
            "data.train gives its files different weights, and a mixture has no epochs: set optimizer.max_steps, "
            "and optimizer.epochs to null",
            len(weights) > 1 and optimizer.max_steps is None,
        ),
        (
            "data.train gives its files different weights, which data.packing does not know: repeat a file "
            "instead, or set packing to false",
            len(weights) > 1 and data.packing,
        ),
        (
            f"data.video_side {data.video_side} is above data.picture_side {data.picture_side}, which also limits the "
            "frames of videos: raise picture_side, or set video_side to null",
            data.video_side is not None and data.video_side > data.picture_side,
        ),
        (
            f"hardware.precision float32 multiplies no mixed weights, but model.dtype is {recipe.model.dtype} and "
            f"model.trained_dtype {recipe.model.trained_dtype}: make them equal, or set precision to bfloat16",
            hardware.precision == "float32" and recipe.model.dtype != recipe.model.trained_dtype,
        ),
        (
            "sharding over one device is nothing: set hardware.sharding to none, or hardware.devices above 1",
            hardware.sharding == "full" and hardware.devices == 1,
        ),
        (
            "4-bit weights are not sharded here: set hardware.sharding to none",
            hardware.sharding == "full" and quantized,
        ),
        (
            "run.answers asks for held-out rows to be answered, but run.evaluate_every is null: set it, or answers "
            "to 0",
            recipe.run.answers > 0 and recipe.run.evaluate_every is None,
        ),
        (
            "run.feature_cache_dir keeps what a frozen tower gives, but parts.tower learns: freeze it, or set the "
            "cache to null",
            recipe.run.feature_cache_dir is not None and parts.tower.train != "frozen",
        ),
        (
            f"stage {recipe.stage} and preference {'given' if recipe.preference else 'null'}: the section belongs to "
            "stage dpo, which needs it (losses: [sigmoid] is DPO)",
            is_dpo != (recipe.preference is not None),
        ),
        (
            "optimizer.label_smoothing and z_loss belong to next-token losses: set them to 0.0 for stage "
            f"{recipe.stage} (preference.label_smoothing is another one)",
            compares and (optimizer.label_smoothing, optimizer.z_loss) != (0.0, 0.0),
        ),
        (
            "preference training switches dropout off, so that policy and reference start alike: set lora.dropout to "
            "0.0",
            compares and recipe.lora is not None and recipe.lora.dropout > 0,
        ),
        (
            f"stage {recipe.stage} has no data.packing and no different weights of files: set packing to false and "
            "weights to 1.0",
            compares and (data.packing or len(weights) > 1),
        ),
        (
            f"run.feature_cache_dir is not for stage {recipe.stage}, which encodes each picture once for policy and "
            "reference: set it to null",
            compares and recipe.run.feature_cache_dir is not None,
        ),
        (
            "run.answers asks for held-out rows with one answer, which rows of stage "
            f"{recipe.stage} have not: set it to 0",
            compares and recipe.run.answers > 0,
        ),
        (
            f"stage {recipe.stage} and sampling {'given' if sampling else 'null'}: the section belongs to the stages "
            "grpo, rloo and ppo, which need it (rewards: [{name: box_iou}])",
            is_sampled != (sampling is not None),
        ),
        (
            f"hardware.per_device_batch_size {hardware.per_device_batch_size} completions do not hold whole groups of "
            f"{sampling.group if sampling else 0}: make it a multiple of sampling.group",
            sampling is not None and hardware.per_device_batch_size % sampling.group != 0,
        ),
        (
            "sampling.values belongs to stage ppo: set it to null",
            sampling is not None and sampling.values is not None and recipe.stage != "ppo",
        ),
        (
            "sampling.loss belongs to stage grpo, the others have one: set it to dapo",
            sampling is not None and sampling.loss != "dapo" and recipe.stage != "grpo",
        ),
        (
            "stage ppo keeps its value head whole: set hardware.sharding to none",
            recipe.stage == "ppo" and hardware.sharding == "full",
        ),
        (
            "data.too_long drop is not for sampled stages, whose answers have no length yet: set it to raise",
            is_sampled and data.too_long == "drop",
        ),
        (
            "sampling.layout tree needs a dense mask, which flash attention does not take: set it to rows, or "
            "model.attention to sdpa",
            sampling is not None and sampling.layout == "tree" and recipe.model.attention == "flash_attention_2",
        ),
        (
            "preference.layout tree needs a dense mask, which flash attention does not take: set it to rows, or "
            "model.attention to sdpa",
            recipe.preference is not None
            and recipe.preference.layout == "tree"
            and recipe.model.attention == "flash_attention_2",
        ),
        (
            "run.evaluate_every is set, but data.validation is empty: name a file of held-out rows",
            recipe.run.evaluate_every is not None and not data.validation,
        ),
    ]
    return [message for message, applies in rules if applies]
