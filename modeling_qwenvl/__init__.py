"""The Qwen-VL model for transformers 5. Importing this package registers it with transformers' Auto classes."""

from .composition import add_image_tokens
from .configuration_qwenvl import QwenVLConfig, QwenVLTextConfig, QwenVLVisionConfig
from .modeling_qwenvl import QwenVLForConditionalGeneration, QwenVLModel, QwenVLPreTrainedModel
from .original_checkpoint import to_original_state_dict, write_original_checkpoint
from .parameter_table import parameter_counts, parameter_table
from .text_qwenvl import QwenVLTextModel
from .vision_qwenvl import QwenVLVisionModel

__all__ = [
    "QwenVLConfig",
    "QwenVLForConditionalGeneration",
    "QwenVLModel",
    "QwenVLPreTrainedModel",
    "QwenVLTextConfig",
    "QwenVLTextModel",
    "QwenVLVisionConfig",
    "QwenVLVisionModel",
    "add_image_tokens",
    "parameter_counts",
    "parameter_table",
    "to_original_state_dict",
    "write_original_checkpoint",
]
