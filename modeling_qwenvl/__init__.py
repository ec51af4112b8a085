"""The Qwen-VL model for transformers 5. Importing this package registers it with transformers' Auto classes."""

from .configuration_qwenvl import QwenVLConfig, QwenVLTextConfig, QwenVLVisionConfig
from .modeling_qwenvl import QwenVLForConditionalGeneration, QwenVLModel, QwenVLPreTrainedModel
from .original_checkpoint import to_original_state_dict, write_original_checkpoint
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
    "to_original_state_dict",
    "write_original_checkpoint",
]
