"""Encoded examples -> the batch that a model's forward takes: padded, or packed into one row without padding.

Letters: B examples, L tokens of the longest example (padded) or of all together (packed), G pictures of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .chat_spans import IGNORE
from .encoded_example import EncodedExample
from .example import Example
from .packing import mrope_positions
from .supervision import Supervision

Batch = dict[str, Any]


@dataclass(frozen=True)
class SupervisedCollator:
    """Examples as read -> batch: encodes each, then hands them to `collate`. Pictures are then decoded in the workers.

    Examples that the length policy drops are missing in the batch.

    Raises:
        RowError: as `Supervision`. ValueError: all examples of the batch are dropped.

    Example:
        >>> collate = SupervisedCollator(Supervision(processor), PaddedCollator(processor.tokenizer.pad_token_id))
        >>> loader = DataLoader(list(read_rows("train.jsonl")), batch_size=8, num_workers=2, collate_fn=collate)
    """

    supervise: Supervision
    collate: Callable[[Sequence[EncodedExample]], Batch]

    def __call__(self, examples: Sequence[Example]) -> Batch:
        encoded = list(self.supervise.stream(examples))
        if not encoded:
            raise ValueError(
                f"All {len(examples)} examples of a batch are too long and dropped, the first is "
                f"{examples[0].source.where}: measure them beforehand (Supervision.measure), or raise max_length"
            )
        return self.collate(encoded)


@dataclass(frozen=True)
class PaddedCollator:
    """One row per example, padded on the right to the longest.

    The attention mask comes from the lengths: a padding id inside a text stays visible. Pictures of all examples go
    one after the other; a batch without pictures has no picture keys. `loss_weights` is there when any weight differs
    from 1.

    Args:
        pad_token_id: fills `input_ids`; nothing reads it.
        pad_to_multiple_of: rounds L up, for tensor cores.
        padding_side: "right" for training; "left" if rows are to be continued.

    Example (two rows of Qwen2-VL, the first with a picture of 2 x 4 patches = 2 tokens, the second text of weight 2):
        >>> PaddedCollator(pad_token_id=0)([with_picture, text_only])
        {'input_ids': tensor([[11, 99, 99, 12, 13],
                              [21, 22, 23,  0,  0]]),
         'attention_mask': tensor([[1, 1, 1, 1, 1],
                                   [1, 1, 1, 0, 0]]),
         'labels': tensor([[-100, -100, -100,   12,   13],
                           [-100,   22,   23, -100, -100]]),
         'loss_weights': tensor([[0., 0., 0., 1., 1.],
                                 [0., 2., 2., 0., 0.]]),
         'mm_token_type_ids': tensor([[0, 1, 1, 0, 0],
                                      [0, 0, 0, 0, 0]]),
         'pixel_values': tensor of shape (8, 1176),
         'image_grid_thw': tensor([[1, 2, 4]])}
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1
    padding_side: str = "right"

    def __post_init__(self) -> None:
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is {self.padding_side!r}, it must be 'left' or 'right'")

    def __call__(self, examples: Sequence[EncodedExample]) -> Batch:
        longest = max(example.length for example in examples)
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of

        def stack(rows: Sequence[Tensor], fill: float) -> Tensor:
            batch = rows[0].new_full((len(rows), width), fill)
            for line, row in zip(batch, rows, strict=True):
                line[slice(width - len(row), None) if self.padding_side == "left" else slice(len(row))] = row
            return batch

        columns = _token_columns(examples)
        fills = {"input_ids": self.pad_token_id, "labels": IGNORE, "loss_weights": 0.0, "mm_token_type_ids": 0}
        batch: Batch = {name: stack(rows, fills[name]) for name, rows in columns.items()}
        batch["attention_mask"] = stack([torch.ones_like(example.input_ids) for example in examples], 0)
        return batch | _vision_tensors(examples)


@dataclass(frozen=True)
class PackedCollator:
    """All examples in one row, one after the other, without padding; no example attends to another.

    Use it with `sampling.PackedBatchSampler` (rows filled to a length) or with any batches (padding-free). Positions
    start again at 0 with every example; transformers turns that into a block mask (eager, sdpa, flex attention) or
    into
    the sequence boundaries of flash attention, only as long as there is no attention mask and no cache: hence no
    `attention_mask`, and `use_cache` False. (Boundaries are not sent as `cu_seq_lens_q`: the Qwen2-VL families would
    hand them to their vision tower too, which has its own.) The first label of every example is ignored: in a padded
    row nothing predicts it, here the last token of its neighbour would.

    Args:
        merge_size: of the image processor, for families with M-RoPE; None for the others (Qwen-VL).
        tokens_per_second: of the vision config, for videos with Qwen2.5-VL.

    Example (the two rows of `PaddedCollator`'s example; the rows of `position_ids` are text, time, height, width):
        >>> PackedCollator(merge_size=2)([with_picture, text_only])
        {'input_ids': tensor([[11, 99, 99, 12, 13, 21, 22, 23]]),
         'labels': tensor([[-100, -100, -100, 12, 13, -100, 22, 23]]),
         'loss_weights': tensor([[0., 0., 0., 1., 1., 0., 2., 2.]]),
         'mm_token_type_ids': tensor([[0, 1, 1, 0, 0, 0, 0, 0]]),
         'position_ids': tensor([[[0, 1, 2, 3, 4, 0, 1, 2]],
                                 [[0, 1, 1, 3, 4, 0, 1, 2]],
                                 [[0, 1, 1, 3, 4, 0, 1, 2]],
                                 [[0, 1, 2, 3, 4, 0, 1, 2]]]),
         'use_cache': False,
         'pixel_values': tensor of shape (8, 1176),
         'image_grid_thw': tensor([[1, 2, 4]])}

    Without `merge_size`, `position_ids` is the first of these rows: shape (1, L).
    """

    merge_size: int | None = None
    tokens_per_second: float | None = None

    @classmethod
    def for_processor(cls, processor: Any, tokens_per_second: float | None = None) -> PackedCollator:
        """The collator that fits the family of `processor`."""
        has_mrope = processor.return_mm_token_type_ids
        return cls(processor.image_processor.merge_size if has_mrope else None, tokens_per_second)

    def __call__(self, examples: Sequence[EncodedExample]) -> Batch:
        columns = _token_columns(examples)
        columns["labels"] = [torch.cat([row.new_tensor([IGNORE]), row[1:]]) for row in columns["labels"]]
        if "loss_weights" in columns:
            columns["loss_weights"] = [torch.cat([row.new_zeros(1), row[1:]]) for row in columns["loss_weights"]]
        batch: Batch = {name: torch.cat(rows)[None] for name, rows in columns.items()}
        batch["position_ids"] = torch.cat([self._positions(example) for example in examples], dim=-1)
        batch["use_cache"] = False
        return batch | _vision_tensors(examples)

    def _positions(self, example: EncodedExample) -> Tensor:
        text = torch.arange(example.length)[None]
        if self.merge_size is None:
            return text
        if example.mm_token_type_ids is None:
            raise ValueError(f"{example.source.where} has no mm_token_type_ids: its processor is not one with M-RoPE")
        seconds = example.vision.get("second_per_grid_ts")
        if seconds is not None and self.tokens_per_second is None:
            raise ValueError("Videos of Qwen2.5-VL need tokens_per_second, which its vision config holds")
        grid = mrope_positions(
            example.mm_token_type_ids.tolist(),
            merge_size=self.merge_size,
            image_grid_thw=example.vision.get("image_grid_thw"),
            video_grid_thw=example.vision.get("video_grid_thw"),
            seconds_per_grid=None if seconds is None else seconds.tolist(),
            tokens_per_second=self.tokens_per_second or 1.0,
        )
        return torch.cat([text, grid])[:, None]


def _token_columns(examples: Sequence[EncodedExample]) -> dict[str, list[Tensor]]:
    """The columns with one entry per token, each a list of B rows (L_i,)."""
    if not examples:
        raise ValueError("A batch needs at least one example")
    columns = {"input_ids": [e.input_ids for e in examples], "labels": [e.labels for e in examples]}
    if any(example.loss_weights is not None for example in examples):
        columns["loss_weights"] = [
            (e.labels != IGNORE).float() if e.loss_weights is None else e.loss_weights for e in examples
        ]
    types = [e.mm_token_type_ids for e in examples if e.mm_token_type_ids is not None]
    if types:
        if len(types) != len(examples):
            raise ValueError("Examples with and without mm_token_type_ids: they come from different processors")
        columns["mm_token_type_ids"] = types
    return columns


def _vision_tensors(examples: Sequence[EncodedExample]) -> dict[str, Tensor]:
    """What the image and video processors gave, of all examples that have it, in their order."""
    names = dict.fromkeys(name for example in examples for name in example.vision)
    return {name: torch.cat([e.vision[name] for e in examples if name in e.vision]) for name in names}
