"""Several conversations about the same pictures in one row: a tree, whose trunk is what they begin with.

    pictures | question 1, answer 1 | question 2, answer 2 | ...

A token sees the trunk and its own conversation, and has the position that it would have alone: every conversation
learns as in a row of its own, but the pictures pass through tower, adapter and language model once for all of them.

Legend: B trees, T tokens of the longest tree.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from processing.chat_spans import IGNORE
from processing.encoded_example import EncodedExample
from trainers.completion_layout import PADDING, dense_mask

Tree = Sequence[EncodedExample]


class TreeCollator:
    """Trees -> the batch that a model's forward takes, padded on the right, with `attention_mask` (B, 1, T, T) bool.

    Args:
        picture_end_id: the token that ends a picture; the trunk ends with the last of them.
        pad_token_id: fills `input_ids`; nothing reads it.

    Raises:
        ValueError: the conversations of a tree differ in their trunks, or one is supervised from the trunk's end on:
            what stands before its first token in the row is the end of its neighbour.
    """

    def __init__(self, picture_end_id: int, pad_token_id: int):
        self.picture_end_id, self.pad_token_id = picture_end_id, pad_token_id

    def trunk(self, tree: Tree) -> int:
        """How many tokens the conversations of a tree share: those up to the end of their last picture, or none."""
        ends = (tree[0].input_ids == self.picture_end_id).nonzero()
        return int(ends[-1]) + 1 if len(ends) else 0

    def num_tokens(self, tree: Tree) -> int:
        """Tokens of the tree in its row: those of the trunk count once."""
        trunk = self.trunk(tree)
        return trunk + sum(example.length - trunk for example in tree)

    def __call__(self, trees: Sequence[Tree]) -> dict[str, Any]:
        rows = [self._row(tree) for tree in trees]
        fills = {
            "input_ids": self.pad_token_id,
            "labels": IGNORE,
            "loss_weights": 0,
            "position_ids": 0,
            "branch": PADDING,
        }
        batch = {
            name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fill)
            for name, fill in fills.items()
        }
        batch["attention_mask"] = dense_mask(batch.pop("branch"))
        pixels = [tree[0].vision["pixel_values"] for tree in trees if tree[0].vision]
        return batch | ({"pixel_values": torch.cat(pixels)} if pixels else {})

    def _row(self, tree: Tree) -> dict[str, Tensor]:
        trunk = self.trunk(tree)
        for number, example in enumerate(tree):
            if not torch.equal(example.input_ids[:trunk], tree[0].input_ids[:trunk]):
                raise ValueError(f"Conversations 0 and {number} of a tree differ in the first {trunk} tokens.")
            if example.labels[trunk] != IGNORE:
                raise ValueError(f"Conversation {number} of a tree is supervised from its first token on.")
        columns = {
            "input_ids": [example.input_ids for example in tree],
            "labels": [example.labels for example in tree],
            "loss_weights": [_weights(example) for example in tree],
            "position_ids": [torch.arange(example.length) for example in tree],
            "branch": [torch.full((example.length,), number) for number, example in enumerate(tree, start=1)],
        }
        columns["branch"][0][:trunk] = 0
        # ChatML's control tokens are supervised in the trunk too, once per conversation.
        columns["loss_weights"][0][:trunk] = sum(weights[:trunk] for weights in columns["loss_weights"])
        return {name: torch.cat([v[0][:trunk], *(x[trunk:] for x in v)]) for name, v in columns.items()}


def _weights(example: EncodedExample) -> Tensor:
    return (example.labels != IGNORE).float() if example.loss_weights is None else example.loss_weights.clone()
