"""EncodedExample: one example as tensors, between `supervision.py`, which makes it, and the collators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .chat_spans import IGNORE
from .example import Source


@dataclass(frozen=True)
class EncodedExample:
    """One example as the model reads it. L tokens, pictures included.

    input_ids: int64 (L,). labels: int64 (L,), the id where supervised and -100 elsewhere; unshifted, the model shifts.
    loss_weights: float32 (L,), 0 where unsupervised; None if every supervised token weighs 1.
    mm_token_type_ids: int64 (L,), 0 text, 1 picture, 2 video, which M-RoPE needs; None for other families.
    vision: tensors of the image and video processors, such as pixel_values and image_grid_thw; empty without pictures.
    fitted: length steps that were applied ("shrink", "trim").
    """

    input_ids: Tensor
    labels: Tensor
    loss_weights: Tensor | None = None
    mm_token_type_ids: Tensor | None = None
    vision: Mapping[str, Tensor] = field(default_factory=dict)
    task: str | None = None
    source: Source = field(default_factory=Source)
    fitted: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        return len(self.input_ids)

    @property
    def num_supervised(self) -> int:
        return int((self.labels != IGNORE).sum())
