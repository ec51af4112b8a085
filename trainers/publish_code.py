"""Writes a Qwen-VL together with the code it needs, for `from_pretrained(..., trust_remote_code=True)`.

    python -m trainers.publish_code SOURCE OUTPUT

A process of its own: transformers marks the registered classes for the rest of the process, so that every model it
saved afterwards would carry code too.
"""

import sys

from transformers import AutoModelForImageTextToText

from modeling_qwenvl import QwenVLForConditionalGeneration
from processing import QWenTokenizer, QwenVLProcessor
from processing.processing_families import load_processor


def main(source: str, output: str) -> None:
    processor = load_processor(source)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype="auto")
    assert isinstance(model, QwenVLForConditionalGeneration)
    type(model.config).register_for_auto_class("AutoConfig")
    QwenVLForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
    QwenVLProcessor.register_for_auto_class("AutoProcessor")
    if isinstance(processor.tokenizer, QWenTokenizer):
        QWenTokenizer.register_for_auto_class("AutoTokenizer")
    model.save_pretrained(output)
    processor.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
