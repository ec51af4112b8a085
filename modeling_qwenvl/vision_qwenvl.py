"""The vision tower of Qwen-VL: pixels (B, 3, H, W) to one vector per patch (B, N, C), patches in row-major order.

OpenCLIP ViT-bigG (Qwen-VL paper, section 2.1): pre-norm blocks, exact GELU, full attention; neither class token nor
final norm.

Legend: B pictures, N patches (a grid of `rows` x `columns`), C width, K heads, D width of a head.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_qwenvl import QwenVLVisionConfig
from .position_tables import resize_table


def patch_grid(pixel_values: torch.Tensor, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches of a batch of pictures (B, 3, H, W).

    Raises:
        ValueError: not four dimensions, or H or W is not a multiple of `patch_size`.

    Example:
        >>> patch_grid(torch.zeros(1, 3, 28, 42), patch_size=14)
        (2, 3)
    """
    if pixel_values.ndim != 4:
        raise ValueError(
            f"pixel_values has {pixel_values.ndim} dimensions, shape {tuple(pixel_values.shape)}; expected 4: "
            "(number of pictures, 3, height, width), the pictures of all rows one after the other."
        )
    height, width = pixel_values.shape[-2:]
    if height % patch_size or width % patch_size or not height or not width:
        raise ValueError(
            f"A picture of {height} x {width} pixels cannot be cut into patches of {patch_size} x {patch_size}: "
            "resize it to multiples of the patch size (the image processor does)."
        )
    return height // patch_size, width // patch_size


class QwenVLVisionAttention(nn.Module):
    def __init__(self, config: QwenVLVisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_BNC: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        B, N, _ = hidden_BNC.shape
        query_BKND, key_BKND, value_BKND = self.qkv(hidden_BNC).view(B, N, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out_BNKD, weights = attention(
            self, query_BKND, key_BKND, value_BKND, attention_mask=None, scaling=self.scaling, dropout=0.0, **kwargs
        )
        return self.proj(out_BNKD.reshape(B, N, -1)), weights


class QwenVLVisionMLP(nn.Module):
    def __init__(self, config: QwenVLVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden)))


class QwenVLVisionLayer(GradientCheckpointingLayer):
    def __init__(self, config: QwenVLVisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = QwenVLVisionAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = QwenVLVisionMLP(config)

    def forward(self, hidden_BNC: torch.Tensor, **kwargs) -> torch.Tensor:
        hidden_BNC = hidden_BNC + self.attn(self.norm1(hidden_BNC), **kwargs)[0]
        return hidden_BNC + self.mlp(self.norm2(hidden_BNC))


class QwenVLVisionModel(PreTrainedModel):
    """The tower. Any picture size that is a multiple of the patch size will do; the position table is resized to it.

    Example:
        >>> tower = QwenVLVisionModel(QwenVLVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
        >>> tower(torch.zeros(1, 3, 28, 42)).last_hidden_state.shape
        torch.Size([1, 6, 32])
    """

    config: QwenVLVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _input_embed_layer = "patch_embedding"
    _no_split_modules = ("QwenVLVisionLayer",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": QwenVLVisionLayer, "attentions": QwenVLVisionAttention}  # noqa: RUF012

    def __init__(self, config: QwenVLVisionConfig):
        super().__init__(config)
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False
        )
        self.position_embedding = nn.Parameter(torch.empty(config.position_grid**2, config.hidden_size))
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(QwenVLVisionLayer(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, QwenVLVisionModel):
            init.normal_(module.position_embedding, std=self.config.hidden_size**-0.5)

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutput:
        """One vector per patch.

        Args:
            pixel_values: (B, 3, H, W), normalised as the image processor does; H and W multiples of `patch_size`.

        Returns:
            `last_hidden_state` (B, H/p * W/p, C), row-major.
        """
        grid = patch_grid(pixel_values, self.config.patch_size)
        hidden_BNC = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        hidden_BNC = hidden_BNC + resize_table(self.position_embedding, grid)
        hidden_BNC = self.pre_norm(hidden_BNC)
        for layer in self.layers:
            hidden_BNC = layer(hidden_BNC, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_BNC)
