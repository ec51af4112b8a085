"""Examples -> packed rows of a stage: several examples in one sequence without padding, none of which sees another.

Who shares a row is decided once, before training, by the lengths and the seed; which rows make a step is the Trainer's
business, as without packing.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from processing.collators import PackedCollator
from processing.encoded_example import EncodedExample
from processing.example import Example, RowError
from processing.packing import fill
from processing.sampling import PackedBatchSampler
from trainers.example_batches import ExampleCollator

logger = logging.getLogger(__name__)

_NUM_SHOWN = 3  # rows that a message about many rows quotes


class PackedRows(Dataset):
    """Each item is the encoded examples that fill one row; `rows` says which of `examples` they are."""

    def __init__(self, examples: Sequence[Example], collator: ExampleCollator, rows: Sequence[Sequence[int]]) -> None:
        self.examples, self.collator, self.rows = examples, collator, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[EncodedExample]:
        return [self.collator.encode(self.examples[i]) for i in self.rows[index]]


@dataclass(frozen=True)
class PackedRowsCollator:
    """Joins the packed rows of a batch into one: `PackedCollator` keeps their examples apart anyway.

    Bare Examples, of evaluation, are padded: Qwen-VL's dynamic NTK, which acts there, looks at the length of the row.
    """

    padded: ExampleCollator
    packed: PackedCollator

    @classmethod
    def for_model(cls, model: PreTrainedModel, padded: ExampleCollator) -> "PackedRowsCollator":
        """ValueError if the language model's attention does not see where one example of a packed row ends."""
        attention = model.config.get_text_config()._attn_implementation
        if attention not in ("eager", "sdpa", "flex_attention") and not is_flash_attention_requested(
            requested_attention_implementation=attention
        ):
            raise ValueError(
                f"packing with attention {attention!r} would let the examples of a row see each other: transformers "
                "derives their boundaries for eager, sdpa, flex_attention and flash attention. Load the model with "
                "one of these (attn_implementation), or set packing to False."
            )
        # Of Qwen2.5-VL, whose videos are spaced by it.
        tokens_per_second = model.config.vision_config.to_dict().get("tokens_per_second")
        return cls(padded, PackedCollator.for_processor(padded.supervise.processor, tokens_per_second))

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        if isinstance(rows[0], Example):
            return self.padded(rows)
        return self.packed([example for row in rows for example in row])


def pack_examples(
    dataset: Sequence[Example] | IterableDataset, collator: ExampleCollator, capacity: int, seed: int
) -> PackedRows:
    """`dataset` in rows of at most `capacity` tokens; of one task each, where the stage wants that.

    Every length is measured now, from the text and the heads of the pictures.

    Raises ValueError for a dataset without a length, for one without rows, and if rows cannot be read or stay longer
    than `capacity`: how many they are, and the first of them by file, line and id.

    Example:
        >>> pack_examples(examples, collator, capacity=120, seed=0).rows  # of 55, 40, 61 and 70 tokens
        [[2, 0], [3, 1]]
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"packing needs all lengths before training, and a {type(dataset).__name__} is read on the way: give a "
            "list of Examples, or set packing to False."
        )
    lengths, refused = [], []
    for example in dataset:
        try:
            lengths.append(collator.measure(example))
        except RowError as error:
            refused.append(str(error))
    if refused:
        more = f"\n... and {len(refused) - _NUM_SHOWN} more" if len(refused) > _NUM_SHOWN else ""
        raise ValueError(
            f"{len(refused)} of {len(dataset)} rows do not go into packed rows of {capacity} tokens:\n"
            + "\n".join(refused[:_NUM_SHOWN])
            + more
        )
    if not lengths:
        raise ValueError("The dataset has no rows to pack.")
    tasks = [example.task for example in dataset] if collator.stage.packs_by_task else None
    rows = PackedBatchSampler(lengths, capacity, tasks, seed=seed).all_batches()
    filled = fill(rows, lengths, capacity)
    logger.info(
        "%d examples packed into %d rows of %d tokens, %.0f%% full.", len(lengths), len(rows), capacity, 100 * filled
    )
    return PackedRows(dataset, collator, rows)
