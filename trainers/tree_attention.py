"""How the mask of a tree of completions reaches a model's attention, and which models would misread a tree.

A mask with four axes goes through transformers as it is (`transformers.masking_utils`), so that each attention gets
its own form of it: sdpa booleans, eager numbers to add, flex attention blocks, of which it leaves out those that
nobody sees. Flex attention on a CPU has no backward pass (torch 2.15).

What a model does on its own by the place of a token in the row, a tree changes without an error: windows, recurrent
layers, distances added to the scores. Such models are refused here.

Shapes: R rows of T tokens.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import flex_attention_mask

from modeling_qwenvl.configuration_qwenvl import QwenVLTextConfig
from trainers.completion_layout import Layout, dense_mask, sees
from trainers.families import family_of

# transformers' flex attention by a name that transformers does not refuse for Qwen2-VL, Qwen2.5-VL and Qwen3-VL (their
# `_supports_flex_attn` is not set): attn_implementation={"text_config": "block_attention"}.
BLOCKS = "block_attention"
AttentionInterface.register(BLOCKS, flex_attention_forward)
AttentionMaskInterface.register(BLOCKS, flex_attention_mask)


def check_tree(model: PreTrainedModel) -> None:
    """Refuses (ValueError) a model whose layers read a token's place in the row, whatever its position.

    Args:
        model: of a family in trainers/families.py, without its wrappers.
    """
    decoder = model.get_submodule(family_of(model).language_model)
    config = model.config.get_text_config()
    others = set(_layer_types(config)) - {"full_attention", "sliding_attention"}
    reason = None
    if others or decoder._is_stateful:
        reason = f"has layers that are no attention over the whole row ({', '.join(sorted(others)) or 'recurrent'})"
    elif not decoder._supports_attention_backend:
        reason = "has an attention of its own, which may count from a token's place in the row"
    if reason is not None:
        raise ValueError(
            f"{type(decoder).__name__} {reason}, and a tree holds several completions in one row: choose the layout "
            "'rows'."
        )


def tree_mask(model: PreTrainedModel, layout: Layout) -> Tensor | BlockMask:
    """What `model` takes as `attention_mask` of a tree: (R, 1, T, T) bool, the same to add, or a block mask.

    Raises:
        ValueError: an attention that takes no such mask; a tree longer than the model's window, or so long that
            Qwen-VL would stretch its rotations by the length of the row.
    """
    config = model.config.get_text_config()
    length = layout.branch_RT.shape[1]
    window = config.to_dict().get("sliding_window")
    # Mistral has a window without saying which layers have it.
    has_window = window is not None and "sliding_attention" in (_layer_types(config) or ["sliding_attention"])
    if has_window and length > window:
        raise ValueError(
            f"A tree of {length} tokens is longer than sliding_window = {window}, which counts from a token's place "
            "in the row: choose the layout 'rows'."
        )
    stretches = isinstance(config, QwenVLTextConfig) and (config.use_dynamic_ntk or config.use_logn_attn)
    if stretches and not model.training and length > config.seq_length:
        raise ValueError(
            f"A tree of {length} tokens is longer than seq_length = {config.seq_length}, where Qwen-VL, in "
            "evaluation, stretches its rotations and queries by the length of the row, which is not that of one "
            "completion: choose the layout 'rows', or switch use_dynamic_ntk and use_logn_attn off."
        )
    attention = config._attn_implementation
    if attention in ("flex_attention", BLOCKS):
        return _block_mask(layout)
    if attention == "sdpa":
        return dense_mask(layout.branch_RT)
    if attention == "eager":
        return torch.where(dense_mask(layout.branch_RT), 0.0, torch.finfo(model.dtype).min).to(model.dtype)
    raise ValueError(
        f"The tree layout needs a mask of its own, which {attention!r} attention does not take: load the model with "
        "attn_implementation='sdpa' (or 'flex_attention'), or choose the layout 'rows'."
    )


def _block_mask(layout: Layout) -> BlockMask:
    """In blocks of torch's size; a dense one is made in between and let go."""
    R, T = layout.branch_RT.shape

    def sees_in_block(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(layout.branch_RT, row, query, key)

    return create_block_mask(sees_in_block, B=R, H=None, Q_LEN=T, KV_LEN=T, device=layout.branch_RT.device)


def _layer_types(config: PreTrainedConfig) -> list[str]:
    """Kinds of layers, where the configuration says them by layer."""
    return config.to_dict().get("layer_types") or []
