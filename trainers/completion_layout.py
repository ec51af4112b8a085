"""How prompts and their completions lie in the rows that the language model sees: as plain rows, or as trees.

**rows**: one row per completion, as it would stand alone. **tree**: one row per prompt,

    prompt | completion 1 | completion 2 | ...

where a token sees its own completion and the prompt, and keeps the position that it would have alone. The prompt is
computed once, and its last hidden state predicts the first token of every completion.

Shapes: N completions in rows of L tokens; R rows of T tokens as the model sees them; S scored tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from processing.chat_spans import IGNORE

LayoutName = Literal["rows", "tree"]
PADDING = -1


@dataclass(frozen=True)
class Layout:
    """Where each token of the model's input comes from, and where each scored token is predicted.

    Attributes:
        sources_RT: (2, R, T) long; row and column in the (N, L) batch of the token at each place, 0 at padding.
        branch_RT: (R, T) long; 0 for the prompt (in "rows" for everything), 1, 2, ... for the completions,
            -1 for padding.
        predicting_2S: (2, S) long; row and column in (R, T) of the hidden state that predicts each scored token, in
            the order of `labels[:, 1:] != -100`.
    """

    sources_RT: Tensor
    branch_RT: Tensor
    predicting_2S: Tensor

    def gather(self, values: Tensor) -> Tensor:
        """(..., N, L) -> (..., R, T)."""
        return values[..., self.sources_RT[0], self.sources_RT[1]]


def sees(branch_RT: Tensor, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Whether the token at place `query` of a row sees the one at `key`: bool, in the shape of the three long tensors
    together. `branch_RT`: as in Layout."""
    branch = branch_RT[row, key]
    return (query >= key) & ((branch == 0) | (branch == branch_RT[row, query]))


def dense_mask(branch_RT: Tensor) -> Tensor:
    """(R, 1, T, T) bool; True where a token (third axis) sees another (fourth axis). `branch_RT`: as in Layout.

    Example:
        >>> dense_mask(torch.tensor([[0, 1, 2]]))[0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [1, 0, 1]], dtype=torch.int32)
    """
    R, T = branch_RT.shape
    rows_R, places_T = (torch.arange(size, device=branch_RT.device) for size in (R, T))
    return sees(branch_RT, rows_R[:, None, None, None], places_T[:, None], places_T)


def rows_layout(attention_mask_NL: Tensor, labels_NL: Tensor) -> Layout:
    """The batch as it is, padded left or right."""
    N, L = attention_mask_NL.shape
    device = attention_mask_NL.device
    places = torch.meshgrid(torch.arange(N, device=device), torch.arange(L, device=device), indexing="ij")
    branch = attention_mask_NL.long() - 1
    return Layout(torch.stack(places), branch, (labels_NL[:, 1:] != IGNORE).nonzero().T)


def tree_layout(input_ids_NL: Tensor, attention_mask_NL: Tensor, labels_NL: Tensor, group_N: Tensor) -> Layout:
    """One row per group, groups in order, padded on the right.

    The prompt of a group is what stands before its first scored token. What follows the last token needed to predict
    a scored one is left out.

    Raises:
        ValueError: the rows of a group begin with different prompts.
    """
    attended = attention_mask_NL.bool()
    scored = (labels_NL != IGNORE) & attended
    place_NL = torch.zeros_like(input_ids_NL)
    sources, branches = [], []
    for group in range(int(group_N.max()) + 1):
        rows = (group_N == group).nonzero()[:, 0].tolist()
        columns = [attended[row].nonzero()[:, 0] for row in rows]
        first_scored = [int(scored[row, places].long().argmax()) for row, places in zip(rows, columns, strict=True)]
        lengths = [start for row, start in zip(rows, first_scored, strict=True) if scored[row].any()]
        prompt = min(lengths, default=len(columns[0]))
        prompt_ids = input_ids_NL[rows[0], columns[0][:prompt]]
        nodes = [torch.stack([torch.full_like(columns[0][:prompt], rows[0]), columns[0][:prompt]])]
        branch = [torch.zeros(prompt, dtype=torch.long)]
        count = prompt
        for number, (row, places) in enumerate(zip(rows, columns, strict=True), start=1):
            if not scored[row].any():
                continue
            if not torch.equal(input_ids_NL[row, places[:prompt]], prompt_ids):
                raise ValueError(
                    f"Rows {rows[0]} and {row} belong to group {group}, but their prompts of {prompt} tokens differ: "
                    "only completions of one prompt, with the same pictures, can share a tree."
                )
            place_NL[row, places[:prompt]] = torch.arange(prompt, device=place_NL.device)
            # The last scored token is predicted, but predicts nothing.
            own = places[prompt : int(scored[row, places].nonzero()[-1])]
            place_NL[row, own] = torch.arange(count, count + len(own), device=place_NL.device)
            nodes.append(torch.stack([torch.full_like(own, row), own]))
            branch.append(torch.full((len(own),), number))
            count += len(own)
        sources.append(torch.cat(nodes, dim=1).T)
        branches.append(torch.cat(branch))
    rows_S, columns_S = scored[:, 1:].nonzero().T
    return Layout(
        sources_RT=pad_sequence(sources, batch_first=True).permute(2, 0, 1),
        branch_RT=pad_sequence(branches, batch_first=True, padding_value=PADDING).to(input_ids_NL.device),
        predicting_2S=torch.stack([group_N[rows_S], place_NL[rows_S, columns_S]]),
    )
