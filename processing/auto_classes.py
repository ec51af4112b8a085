"""Makes transformers' Auto classes know the classes of this package, by their names.

A saved folder names its classes: `processor_class` and `image_processor_type` in processor_config.json,
`tokenizer_class` in tokenizer_config.json. The Auto classes look these names up among what is registered. The registry
wants a config class as key; the model's config belongs to another package, so the key is one that no model uses.
"""

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedConfig

from .processing_qwenvl import IMAGE_PROCESSORS, QwenVLProcessor
from .tokenization_qwenvl import QWenTokenizer


class QwenVLProcessorKey(PreTrainedConfig):
    """Key of the registrations below; configures nothing."""

    model_type = "qwen_vl_processor"


AutoTokenizer.register(QwenVLProcessorKey, QWenTokenizer)
AutoImageProcessor.register(QwenVLProcessorKey, image_processor_classes=IMAGE_PROCESSORS)
AutoProcessor.register(QwenVLProcessorKey, QwenVLProcessor)
