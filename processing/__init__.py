"""Files, text and pictures -> tensors, and answers -> boxes.

Importing the package registers its classes with transformers' Auto classes (auto_classes.py).
"""

from .auto_classes import QwenVLProcessorKey as _registered  # noqa: F401
from .image_processing_pil_qwenvl import QwenVLImageProcessorPil
from .image_processing_qwenvl import QwenVLImageProcessor
from .processing_qwenvl import QwenVLProcessor
from .tokenization_qwenvl import QWenTokenizer, train_qwenvl_tokenizer

__all__ = [
    "QWenTokenizer",
    "QwenVLImageProcessor",
    "QwenVLImageProcessorPil",
    "QwenVLProcessor",
    "train_qwenvl_tokenizer",
]
