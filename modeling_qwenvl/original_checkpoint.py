"""The names and layouts of the 2023 checkpoint, read by `from_pretrained` and written back bit for bit.

One table of transforms, registered with transformers, serves both directions.
"""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    ConversionOps,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    revert_weight_conversion,
)

from .original_config import original_config

LAYER = r"^transformer\.h\.(\d+)\."
BLOCK = r"^transformer\.visual\.transformer\.resblocks\.(\d+)\."
RENAMED = [
    (r"^transformer\.wte\.", "model.language_model.embed_tokens."),
    (r"^transformer\.ln_f\.", "model.language_model.norm."),
    (LAYER + r"ln_1\.", r"model.language_model.layers.\1.input_layernorm."),
    (LAYER + r"ln_2\.", r"model.language_model.layers.\1.post_attention_layernorm."),
    (LAYER + r"attn\.c_attn\.", r"model.language_model.layers.\1.self_attn.c_attn."),
    (LAYER + r"attn\.c_proj\.", r"model.language_model.layers.\1.self_attn.o_proj."),
    # w2 is the gate, w1 the other half.
    (LAYER + r"mlp\.w1\.", r"model.language_model.layers.\1.mlp.up_proj."),
    (LAYER + r"mlp\.w2\.", r"model.language_model.layers.\1.mlp.gate_proj."),
    (LAYER + r"mlp\.c_proj\.", r"model.language_model.layers.\1.mlp.down_proj."),
    (r"^transformer\.visual\.conv1\.", "model.visual.patch_embedding."),
    (r"^transformer\.visual\.positional_embedding", "model.visual.position_embedding"),
    (r"^transformer\.visual\.ln_pre\.", "model.visual.pre_norm."),
    (BLOCK + r"ln_1\.", r"model.visual.layers.\1.norm1."),
    (BLOCK + r"ln_2\.", r"model.visual.layers.\1.norm2."),
    (BLOCK + r"attn\.in_proj\.", r"model.visual.layers.\1.attn.interleaved_qkv."),
    (BLOCK + r"attn\.out_proj\.", r"model.visual.layers.\1.attn.proj."),
    (BLOCK + r"mlp\.c_fc\.", r"model.visual.layers.\1.mlp.fc1."),
    (BLOCK + r"mlp\.c_proj\.", r"model.visual.layers.\1.mlp.fc2."),
    (r"^transformer\.visual\.attn_pool\.pos_embed", "model.adapter.positions.table"),
    (r"^transformer\.visual\.attn_pool\.query", "model.adapter.query"),
    (r"^transformer\.visual\.attn_pool\.kv_proj\.", "model.adapter.kv_proj."),
    (r"^transformer\.visual\.attn_pool\.ln_q\.", "model.adapter.ln_q."),
    (r"^transformer\.visual\.attn_pool\.ln_kv\.", "model.adapter.ln_kv."),
    (r"^transformer\.visual\.attn_pool\.attn\.out_proj\.", "model.adapter.out_proj."),
    (r"^transformer\.visual\.attn_pool\.attn\.in_proj_", "model.adapter.in_proj_"),
    (r"^transformer\.visual\.ln_post\.", "model.adapter.ln_post."),
    (r"^transformer\.visual\.proj", "model.adapter.transposed_proj"),
]


class SplitHeads(ConversionOps):
    """From the original tower's rows, where each head holds its q, k and v, to all q, all k, all v; or back."""

    def __init__(self, is_back: bool = False):
        self.is_back = is_back

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        config: Any = None,
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        (tensors,) = input_dict.values()
        fused = tensors[0] if isinstance(tensors, list) else tensors
        num_heads = config.vision_config.num_attention_heads
        order = (3, num_heads) if self.is_back else (num_heads, 3)
        split = fused.unflatten(0, (*order, -1)).transpose(0, 1).flatten(0, 2)
        return {target_patterns[0]: split.contiguous()}

    @property
    def reverse_op(self) -> "SplitHeads":
        return SplitHeads(not self.is_back)


def transforms() -> list[WeightTransform]:
    """Original names to native names. The converters come after all renamings and see the renamed keys."""
    # Every renaming is anchored at the start: transformers searches patterns in the whole key, and unanchored ones
    # (".ln_1.", ".mlp.c_proj.") would rename the tower's keys too.
    table: list[WeightTransform] = [WeightRenaming(source, target) for source, target in RENAMED]
    for kind in ("weight", "bias"):
        qkv = [f".self_attn.{name}_proj.{kind}" for name in "qkv"]
        table.append(WeightConverter(rf"\.self_attn\.c_attn\.{kind}", qkv, [Chunk(dim=0)]))
        table.append(WeightConverter(rf"\.attn\.interleaved_qkv\.{kind}", f".attn.qkv.{kind}", [SplitHeads()]))
        qkv = [f"adapter.{name}_proj.{kind}" for name in "qkv"]
        table.append(WeightConverter(rf"adapter\.in_proj_{kind}", qkv, [Chunk(dim=0)]))
    table.append(WeightConverter(r"adapter\.transposed_proj", "adapter.proj.weight", [Transpose(0, 1)]))
    return table


def register_original_names() -> None:
    """Let `from_pretrained` of every Qwen-VL class read original checkpoints."""
    register_checkpoint_conversion_mapping("qwen_vl", transforms(), overwrite=True)


def to_original_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of a native Qwen-VL under the names and in the layouts of the 2023 checkpoint, bit for bit.

    Raises:
        ValueError: the model is quantised, or has parts that the original format cannot name.
    """
    original_config(model.config)
    state_dict = model.state_dict()
    if "lm_head.weight" not in state_dict:
        raise ValueError(f"{type(model).__name__} has no head: the original format needs the whole model.")
    if any(not tensor.is_floating_point() for tensor in state_dict.values()):
        raise ValueError("The original format has no quantised weights: load the model without quantization_config.")
    return _reverted(model, state_dict)


def _reverted(model: PreTrainedModel, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # transformers reverts only what was used in loading: say that everything was.
    used = model.__dict__.get("_weight_conversions")
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    try:
        return revert_weight_conversion(model, state_dict)
    finally:
        model._weight_conversions = used


def write_original_checkpoint(
    model: PreTrainedModel, folder: str | Path, max_shard_size: str = "2GB", safe_serialization: bool = False
) -> None:
    """Write `model` as the 2023 checkpoint: the original `config.json`, names and layouts, in shards with an index.

    Args:
        safe_serialization: safetensors files; otherwise `pytorch_model-*.bin`, as the original repository.

    Raises:
        ValueError: as `to_original_state_dict`.
    """
    folder = Path(folder)
    state_dict = {name: tensor.contiguous().cpu() for name, tensor in to_original_state_dict(model).items()}
    config = original_config(model.config) | {"torch_dtype": str(model.dtype).removeprefix("torch.")}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    stem, suffix = ("model", "safetensors") if safe_serialization else ("pytorch_model", "bin")
    split = split_torch_state_dict_into_shards(
        state_dict, filename_pattern=f"{stem}{{suffix}}.{suffix}", max_shard_size=max_shard_size
    )
    for file_name, names in split.filename_to_tensors.items():
        shard = {name: state_dict[name] for name in names}
        if safe_serialization:
            save_file(shard, folder / file_name, metadata={"format": "pt"})
        else:
            torch.save(shard, folder / file_name)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
