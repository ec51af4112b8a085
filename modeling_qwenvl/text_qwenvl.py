"""Qwen-7B as transformers' Qwen2 plus what it does, in evaluation, on rows longer than its training length.

Dynamic NTK raises the RoPE base for the whole row; log-n attention scales queries far down the row. Both read the
length of the row as it stands in the batch, padding included, as the original does; rotations themselves are relative.

Legend: B rows, T tokens, K heads, D width of a head.
"""

from collections.abc import Callable
from math import ceil, log, log2

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2Model,
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import merge_with_config_defaults

from .configuration_qwenvl import QwenVLTextConfig


def ntk_alpha(length: int, seq_length: int) -> float:
    """How much dynamic NTK stretches a row of `length` tokens: 1 up to the training length `seq_length`, then 3, 7.

    Example:
        >>> [ntk_alpha(length, 2048) for length in (2048, 2049, 4096, 4097, 8192)]
        [1.0, 3.0, 3.0, 7.0, 7.0]
    """
    return max(2.0 ** ceil(log2(length / seq_length) + 1) - 1.0, 1.0)


def logn_scale(first: int, count: int, seq_length: int, device: torch.device | None = None) -> torch.Tensor:
    """Query scales (count,) float32 of positions p = `first`, `first + 1`, ...: max(1, ln(p + 1) / ln(seq_length)).

    Example:
        >>> logn_scale(3, 2, seq_length=2).tolist()  # ln 4 / ln 2 and ln 5 / ln 2
        [2.0, 2.321928024291992]
    """
    places = torch.arange(first + 1, first + count + 1, dtype=torch.float64, device=device)
    return (places.log() / log(seq_length)).clamp(min=1.0).float()


class QwenVLTextRotaryEmbedding(Qwen2RotaryEmbedding):
    """RoPE in float32 with the stretched base, and the log-n scale of each query, for the forward that is running.

    `alpha` and `first` (index of the first token in its row) are set by `QwenVLTextModel.forward` before each use.
    """

    alpha: float = 1.0
    first: int = 0

    @torch.no_grad()
    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        inv_freq = self.inv_freq.to(x.device, torch.float32)
        if self.alpha != 1.0:
            dim = 2 * len(inv_freq)
            base = self.config.rope_parameters["rope_theta"] * self.alpha ** (dim / (dim - 2))
            inv_freq = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=x.device) / dim)
        angles = position_ids[..., None].float() * inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        T = position_ids.shape[-1]
        use_logn = self.config.use_logn_attn and not self.training and self.first + T > self.config.seq_length
        scale_T = logn_scale(self.first, T, self.config.seq_length, x.device) if use_logn else None
        return angles.cos(), angles.sin(), scale_T


class QwenVLTextAttention(Qwen2Attention):
    """Qwen2's attention with RoPE applied in float32, as the original does, and queries scaled by log-n."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cos, sin, scale_T = position_embeddings
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        dtype = query.dtype
        query, key = (x.to(dtype) for x in apply_rotary_pos_emb(query.float(), key.float(), cos, sin))
        if scale_T is not None:
            query = query * scale_T.to(dtype)[:, None]
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out_BTKD, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(out_BTKD.flatten(2)), weights


class QwenVLTextModel(Qwen2Model):
    """The decoder of Qwen-7B, without head.

    In evaluation a row longer than `seq_length` is stretched by dynamic NTK. The stretch is fixed by the forward that
    starts a cache and stays with that cache, whose keys are already rotated. In training there is neither NTK nor
    log-n, whatever ran before (the original leaked the last evaluation's stretch into training).
    """

    config: QwenVLTextConfig
    _can_compile_fullgraph = False  # the stretch depends on the row's length
    _can_record_outputs = {**Qwen2Model._can_record_outputs, "attentions": QwenVLTextAttention}  # noqa: RUF012

    def __init__(self, config: QwenVLTextConfig):
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = QwenVLTextAttention(config, index)
        self.rotary_emb = QwenVLTextRotaryEmbedding(config)
        self.post_init()

    @merge_with_config_defaults
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        """As `Qwen2Model.forward`; a cache may be continued by any number of tokens."""
        tokens = input_ids if input_ids is not None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        first = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        self.rotary_emb.first = first
        self.rotary_emb.alpha = self._stretch(past_key_values, first, tokens.shape[1] if tokens is not None else 0)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _stretch(self, cache: Cache | None, first: int, count: int) -> float:
        """The NTK alpha of this forward, which continues `cache` (it holds `first` tokens) by `count` tokens."""
        if not self.config.use_dynamic_ntk:
            return 1.0
        if first == 0:
            alpha = 1.0 if self.training or count == 0 else ntk_alpha(count, self.config.seq_length)
            if cache is not None:
                # It belongs to the keys, so it travels with them through beam search, copies and interleaved calls.
                cache.qwenvl_ntk_alpha = alpha
            return alpha
        assert cache is not None  # it holds tokens
        if "qwenvl_ntk_alpha" in vars(cache):
            return cache.qwenvl_ntk_alpha
        if first > self.config.seq_length:
            raise ValueError(
                f"The cache holds {first} tokens, more than seq_length = {self.config.seq_length}, and was not "
                "started by this model, so the RoPE base of its keys is unknown: fill the cache with this model."
            )
        return 1.0
