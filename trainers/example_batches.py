"""Examples -> batches of a stage: the stage's resolution and label style, padded (packed: packed_examples.py)."""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, ProcessorMixin

from processing.collators import PaddedCollator
from processing.encoded_example import EncodedExample
from processing.example import Example, RowError
from processing.length import LengthPolicy, has_dynamic_resolution, with_max_pixels
from processing.processing_qwenvl import QwenVLProcessor
from processing.supervision import Supervision
from trainers.stages import Stage


def at_stage_resolution(
    processor: ProcessorMixin, config: PreTrainedConfig, stage: Stage, resolution: int | None
) -> ProcessorMixin:
    """A copy of `processor`, with the same tokenizer, for pictures of `resolution` pixels.

    Qwen-VL makes every picture a square of that side. Families with dynamic resolution keep the picture's shape, with
    at most `resolution` ** 2 pixels. Without `resolution`, Qwen-VL's own tower gets the stage's, but no more than the
    side it is configured for; any other model gets what its processor says.

    Raises ValueError if `resolution` is given for a processor that has neither kind of size.
    """
    if isinstance(processor, QwenVLProcessor):
        vision = config.vision_config
        if resolution is None and vision.model_type == "qwen_vl_vision":
            resolution = min(stage.resolution, vision.image_size)
        if resolution is None:
            return processor
        resized = copy(processor)
        resized.image_processor = copy(processor.image_processor)
        resized.image_processor.size = type(processor.image_processor.size)(height=resolution, width=resolution)
        return resized
    if resolution is None:
        return processor
    if not has_dynamic_resolution(processor):
        raise ValueError(
            f"resolution={resolution}, but {type(processor).__name__} makes pictures of one fixed size "
            f"({processor.image_processor.size}): leave resolution out."
        )
    return with_max_pixels(processor, resolution**2)


class ExampleCollator:
    """Encodes Examples and makes a padded batch of them; for `DataLoader(collate_fn=...)`, also in workers.

    The stage's label style replaces the example's own: "plain" needs one prompt and one answer. With `max_length`, in
    tokens, pictures of longer examples shrink, then their last turns are left out, then they are refused.

    Raises RowError, which names the row, for an example that cannot be read, fits no template or is too long.
    """

    def __init__(self, processor: ProcessorMixin, stage: Stage, max_length: int | None = None) -> None:
        self.stage = stage
        self.supervise = Supervision(processor, length=None if max_length is None else LengthPolicy(max_length))
        self.collate = PaddedCollator(processor.tokenizer.pad_token_id)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return self.collate([self.encode(example) for example in examples])

    def encode(self, example: Example) -> EncodedExample:
        """One example, its pictures decoded."""
        encoded = self.supervise(self._in_style(example))
        assert encoded is not None  # the policy ends with "raise"
        return encoded

    def measure(self, example: Example) -> int:
        """Number of tokens that `encode` will give, from the heads of the pictures."""
        length = self.supervise.measure(self._in_style(example))
        assert length is not None
        return length

    def _in_style(self, example: Any) -> Example:
        if not isinstance(example, Example):
            raise ValueError(
                f"The dataset holds a {type(example).__name__}: without a data_collator it must hold Examples "
                "(processing.rows.read_rows makes them)."
            )
        try:
            return replace(example, style=self.stage.label_style)
        except ValueError as error:
            raise RowError(example.source, f"{error} (stage {self.stage.name})") from error
