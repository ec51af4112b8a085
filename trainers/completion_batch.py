"""Prompts with their completions as tensors, and the batch that `trainers.completion_logps` scores.

Letters: N completions in rows of L tokens, G prompts, P tokens of one prompt, C of one completion.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from processing.chat_spans import IGNORE
from processing.example import Source

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class CompletionGroup:
    """One prompt, its pictures and videos, and some completions.

    prompt_P: int64 ids, placeholders of pictures included. completions: int64 ids (C,) each.
    labels: for each completion (C,), its ids where a token is scored, -100 elsewhere.
    vision: what the image and video processors made of the prompt's pictures and videos, each once; else empty.
    """

    prompt_P: Tensor
    completions: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    vision: Mapping[str, Tensor] = field(default_factory=dict)
    num_pictures: int = 0
    num_videos: int = 0
    source: Source = field(default_factory=Source)


def collate_groups(
    groups: Sequence[CompletionGroup], pad_token_id: int, order: Literal["group", "completion"] = "group"
) -> Batch:
    """A batch as `add_completion_head` describes it, padded on the right, with `completion_mask` in place of `labels`
    (1 where a token is scored), as TRL's trainers have it.

    Args:
        order: of the rows. "group": the completions of the first group, of the second, ...; "completion": the first
            completion of every group, the second of every group, ... (TRL's DPO: all chosen, then all rejected), which
            needs equally many in each.

    Example (two groups with completions (a1, a2) and (b1, b2)):
        >>> collate_groups(groups, pad_token_id=0)["group_of_row"].tolist()
        [0, 0, 1, 1]
        >>> collate_groups(groups, pad_token_id=0, order="completion")["group_of_row"].tolist()
        [0, 1, 0, 1]
    """
    places = [(g, c) for g, group in enumerate(groups) for c in range(len(group.completions))]
    if order == "completion":
        if len({len(group.completions) for group in groups}) != 1:
            raise ValueError(f"The groups have {[len(group.completions) for group in groups]} completions, not equal.")
        places.sort(key=lambda place: (place[1], place[0]))
    ids = [torch.cat([groups[g].prompt_P, groups[g].completions[c]]) for g, c in places]
    masks = [
        torch.cat([torch.zeros_like(groups[g].prompt_P), (groups[g].labels[c] != IGNORE).long()]) for g, c in places
    ]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "completion_mask": pad_sequence(masks, batch_first=True),
        "group_of_row": torch.tensor([g for g, _ in places]),
        "num_pictures": torch.tensor([group.num_pictures for group in groups]),
    }
    if any(group.num_videos for group in groups):
        batch["num_videos"] = torch.tensor([group.num_videos for group in groups])
    names = dict.fromkeys(name for group in groups for name in group.vision)
    return batch | {name: torch.cat([g.vision[name] for g in groups if name in g.vision]) for name in names}
