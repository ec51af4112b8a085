"""Adapters from the tower's patch vectors (B, N, C) to vectors of the language model's width (B, Q, E).

Legend: B pictures, N patches, C width of the tower, Q tokens per picture, E width of the language model, K heads,
D width of a head.
"""

from math import ceil, isqrt, log, log2, sqrt
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward

from .configuration_qwenvl import QwenVLConfig
from .position_tables import BASE, resize_table, sincos_table

LAYER_NORM_EPS = 1e-6
INIT_STD = 0.02
# Attention logit, in units of one cosine, that the "local" initialisation gives to a query's own place.
LOCAL_SHARPNESS = 4.0


class SinCosTable(nn.Module):
    """The resampler's fixed table: saved and loaded with the weights (the original's is bfloat16), never trained."""

    def __init__(self, grid_size: int, width: int):
        super().__init__()
        self.grid_size = grid_size
        self.table = nn.Parameter(torch.empty(grid_size**2, width))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # The checkpoint loader puts a fresh parameter here, with its gradient switched on.
        super().register_parameter(name, None if param is None else param.requires_grad_(False))

    def forward(self, grid: tuple[int, int]) -> torch.Tensor:
        # Detached, so that a blanket requires_grad_(True) on the model does not train the table either.
        return resize_table(self.table.detach(), grid)


class QwenVLResampler(GradientCheckpointingLayer):
    """One cross-attention layer: `num_queries` learned queries read the patches (Qwen-VL paper, section 2.1).

    Positions are added to queries and keys, not to values; no residual, no MLP. A norm and a projection follow.
    """

    def __init__(self, config: QwenVLConfig):
        super().__init__()
        self.config = config
        patch_width, width = config.vision_config.hidden_size, config.text_config.hidden_size
        self.num_heads = config.adapter_num_heads
        self.scaling = (width // self.num_heads) ** -0.5
        self.num_key_value_groups = 1
        self.is_causal = False
        self.query = nn.Parameter(torch.empty(config.num_queries, width))
        self.positions = SinCosTable(isqrt(config.num_image_tokens), width)
        # The original has no projection, and no key in the checkpoint, where the widths agree.
        self.kv_proj = nn.Identity() if patch_width == width else nn.Linear(patch_width, width, bias=False)
        self.ln_q = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.ln_kv = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.ln_post = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.proj = nn.Linear(width, width, bias=False)

    def queries_keys_values(self, features_BNC: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        """What attends and what is attended to, split into heads: (B, K, Q, D), (B, K, N, D), (B, K, N, D)."""
        own_grid = (self.positions.grid_size, self.positions.grid_size)
        query_1QE = (self.ln_q(self.query) + self.positions(own_grid))[None]
        value_BNE = self.ln_kv(self.kv_proj(features_BNC))
        key_BNE = value_BNE + self.positions(grid)
        query_1QE, key_BNE, value_BNE = self.q_proj(query_1QE), self.k_proj(key_BNE), self.v_proj(value_BNE)
        query_BQE = query_1QE.expand(len(features_BNC), -1, -1)
        heads = [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query_BQE, key_BNE, value_BNE)]
        return tuple(heads)

    def forward(self, features_BNC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Patches (B, N, C) that lie on `grid` = (rows, columns), row-major, to (B, Q, E)."""
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out_BQKD, _ = attention(
            self,
            *self.queries_keys_values(features_BNC, grid),
            attention_mask=None,
            scaling=self.scaling,
            dropout=0.0,
        )
        return self.proj(self.ln_post(self.out_proj(out_BQKD.flatten(2))))


class QwenVLMLPAdapter(GradientCheckpointingLayer):
    """Two layers with a GELU between, patch by patch (LLaVA-1.5)."""

    def __init__(self, config: QwenVLConfig):
        super().__init__()
        patch_width, width = config.vision_config.hidden_size, config.text_config.hidden_size
        self.linear_1 = nn.Linear(patch_width, width)
        self.activation = ACT2FN["gelu"]
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features_BNC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return self.linear_2(self.activation(self.linear_1(features_BNC)))


class QwenVLLinearAdapter(GradientCheckpointingLayer):
    """One layer, patch by patch (LLaVA)."""

    def __init__(self, config: QwenVLConfig):
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features_BNC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return self.linear(features_BNC)


ADAPTERS: dict[str, Any] = {"resampler": QwenVLResampler, "mlp": QwenVLMLPAdapter, "linear": QwenVLLinearAdapter}


def init_resampler(resampler: QwenVLResampler) -> None:
    """The original's initialisation, then, if the config says "local", ours. `init.*` leaves loaded tensors alone."""
    width = resampler.query.shape[1]
    init.trunc_normal_(resampler.query, std=INIT_STD)
    init.copy_(resampler.positions.table, sincos_table(resampler.positions.grid_size, width))
    for name in ("kv_proj", "q_proj", "k_proj", "v_proj", "out_proj"):
        linear = getattr(resampler, name)
        if isinstance(linear, nn.Linear):
            init.trunc_normal_(linear.weight, std=INIT_STD)
            if linear.bias is not None:
                init.zeros_(linear.bias)
    init.normal_(resampler.proj.weight, std=width**-0.5)
    if resampler.config.adapter_init == "local":
        _init_looking_at_own_place(resampler)


def _init_looking_at_own_place(resampler: QwenVLResampler) -> None:
    """Let each query first attend to its own place: queries and keys read the same few fast sines and cosines.

    Ours, not the paper's. The code's base of 10000 is made for long axes: on a grid of 4 to 16 cells nearly all of its
    channels hardly change from cell to cell, so that a random start attends to everything everywhere. We take the
    frequencies 1, 1/2, 1/4, ... down to about one half turn over the grid, for both axes; the logit of a query and a
    key is then LOCAL_SHARPNESS * sum over frequencies and axes of cos(frequency * distance), largest at distance 0.
    Contents do not disturb it, because the norms' gains start at 0 in those channels (they are trained).
    """
    width, grid_size = resampler.query.shape[1], resampler.positions.grid_size
    per_axis, head_dim = width // 4, width // resampler.num_heads
    num_octaves = ceil(log2(max(grid_size, 2))) + 1
    octaves = sorted({min(round(i * log(2) / log(BASE) * per_axis), per_axis - 1) for i in range(num_octaves)})
    # Layout of the table: sin(column), cos(column), sin(row), cos(row), per_axis channels each.
    device = resampler.k_proj.weight.device
    channels = torch.tensor([block * per_axis + f for block in range(4) for f in octaves], device=device)
    if len(channels) > head_dim:
        raise ValueError(
            f"adapter_init 'local' needs {len(channels)} channels per head for a grid of {grid_size} x {grid_size} "
            f"queries, but a head has {head_dim}: use fewer heads or fewer queries."
        )
    pick_KDE = torch.zeros(resampler.num_heads, head_dim, width, device=device)
    pick_KDE[:, torch.arange(len(channels), device=device), channels] = sqrt(LOCAL_SHARPNESS / resampler.scaling)
    pick_EE = pick_KDE.flatten(0, 1)
    is_picked_E1 = pick_EE.any(dim=1, keepdim=True)
    # The other rows stay random, small ones in the queries, so that they hardly count and yet have a gradient.
    for linear, scale in ((resampler.q_proj, 0.1), (resampler.k_proj, 1.0)):
        init.copy_(linear.weight, torch.where(is_picked_E1, pick_EE, scale * linear.weight.float()))
    gain_E = torch.ones(width, device=device).index_fill(0, channels, 0.0)
    init.copy_(resampler.ln_q.weight, gain_E)
    init.copy_(resampler.ln_kv.weight, gain_E)
