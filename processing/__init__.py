"""Files, text and pictures -> tensors, and answers -> boxes.

Importing the package registers its classes with transformers' Auto classes (auto_classes.py).
"""

from .auto_classes import QwenVLProcessorKey as _registered  # noqa: F401
from .image_processing_pil_qwenvl import QwenVLImageProcessorPil
from .image_processing_qwenvl import QwenVLImageProcessor
from .list_format import boxes_with_ref, from_list_format, list_format_parts, to_list_format
from .processing_qwenvl import QwenVLProcessor
from .tokenization_qwenvl import QWenTokenizer, add_qwenvl_tokens, train_qwenvl_tokenizer

__all__ = [
    "QWenTokenizer",
    "QwenVLImageProcessor",
    "QwenVLImageProcessorPil",
    "QwenVLProcessor",
    "add_qwenvl_tokens",
    "boxes_with_ref",
    "from_list_format",
    "list_format_parts",
    "to_list_format",
    "train_qwenvl_tokenizer",
]
