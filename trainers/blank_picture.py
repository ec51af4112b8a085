"""A blank picture without loss, for batches that have no picture where every process must run the tower.

FSDP and DeepSpeed gather a module's weights from all processes when it runs. A process whose batch is text alone would
leave out the tower's turn, and the others would wait, or take the next module's weights for the tower's. With a blank
picture, a row of a few tokens that nothing supervises, every process runs every module; the loss and its gradients are
what they were. (DistributedDataParallel only has to be told to look for parts that did not run, see arguments.py.)
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from processing.chat_spans import IGNORE
from processing.encoded_example import EncodedExample
from processing.special_tokens import IMAGE_PAD, IMAGE_SLOT, IMGPAD, VISION_END, VISION_START

BLANK_SIDE = 28  # pixels; the processor resizes it to its own smallest size


def blank_picture(processor: Any) -> EncodedExample:
    """The smallest picture that `processor` makes, with the tokens around it and no label.

    Example:
        >>> blank_picture(processor).input_ids.shape  # Qwen2.5-VL: 4 tokens and their two borders
        torch.Size([6])
    """
    slot = IMAGE_SLOT if processor.image_token == IMGPAD else VISION_START + IMAGE_PAD + VISION_END
    picture = Image.new("RGB", (BLANK_SIDE, BLANK_SIDE))
    inputs = dict(processor(text=[slot], images=[picture], return_tensors="pt"))
    (ids,) = inputs.pop("input_ids")
    inputs.pop("attention_mask")
    types = inputs.pop("mm_token_type_ids")[0] if "mm_token_type_ids" in inputs else None
    return EncodedExample(ids, torch.full_like(ids, IGNORE), mm_token_type_ids=types, vision=inputs)


class BlankPictureCollator:
    """Base of collators of encoded examples. `StageTrainer` sets `blank` where processes share a model's weights."""

    blank: EncodedExample | None = None

    def with_picture(self, examples: Sequence[EncodedExample]) -> list[EncodedExample]:
        """`examples`, and `blank` behind them if none of them has a picture or a video."""
        if self.blank is None or any(example.vision for example in examples):
            return list(examples)
        return [*examples, self.blank]
