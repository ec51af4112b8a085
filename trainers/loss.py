"""The next-token loss at supervised positions only: labels are shifted once, and no other logits are made.

Shapes: B rows, L tokens, S supervised targets of the batch, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from processing.chat_spans import IGNORE
from trainers.token_losses import token_losses


@dataclass(frozen=True)
class Targets:
    """What a batch is trained to predict.

    Attributes:
        predicts_BL: bool; True where the hidden state has to predict the next token.
        tokens_S: long; those next tokens, row by row, in the order that `predicts_BL` selects.
        weights_S: float32; how much each counts.
    """

    predicts_BL: Tensor
    tokens_S: Tensor
    weights_S: Tensor


def find_targets(labels_BL: Tensor, loss_weights_BL: Tensor | None = None) -> Targets:
    """Shifts labels and weights: position t predicts token t + 1.

    `labels_BL` are aligned with the input, -100 where there is no loss; `loss_weights_BL` belong to the same tokens as
    the labels, not negative, 1 everywhere if not given. Targets of weight 0 are left out.

    Example:
        >>> find_targets(torch.tensor([[-100, -100, 7, 8]])).predicts_BL
        tensor([[False,  True,  True, False]])
    """
    counts_BL = labels_BL != IGNORE
    if loss_weights_BL is not None:
        counts_BL = counts_BL & (loss_weights_BL != 0)
    predicts_BL = functional.pad(counts_BL[:, 1:], (0, 1), value=False)
    next_BL = counts_BL.clone()
    next_BL[:, 0] = False  # nothing comes before the first token to predict it
    tokens_S = labels_BL[next_BL]
    if loss_weights_BL is None:
        weights_S = torch.ones_like(tokens_S, dtype=torch.float32)
    else:
        weights_S = loss_weights_BL[next_BL].float()
    return Targets(predicts_BL, tokens_S, weights_S)


def supervised_loss(
    model: nn.Module,
    inputs: dict[str, Any],
    total_weight: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Any]:
    """Weighted mean of the token losses of one batch, and the model's outputs with `logits` of shape (S, V).

    `inputs` is what the collator made: `labels`, optionally `loss_weights`, and the model's own inputs. The sum of
    weighted losses is divided by `total_weight`, the weight of all targets that the step is made of; with gradient
    accumulation or several devices that is more than this batch, and the result is this batch's share of the mean over
    all tokens. Without it, the batch's own weight is taken.

    A batch without targets gives a loss of 0 that still has a graph, so that all devices join the backward pass.
    """
    inputs = dict(inputs)
    targets = find_targets(inputs.pop("labels"), inputs.pop("loss_weights", None))
    # A cache would silently switch off the mask of packed rows (transformers builds its masks for the cache then).
    outputs = model(**inputs | {"logits_to_keep": targets.predicts_BL, "use_cache": False})
    losses_S = token_losses(outputs.logits, targets.tokens_S, label_smoothing, z_loss)
    total = targets.weights_S.sum() if total_weight is None else total_weight
    return (losses_S * targets.weights_S).sum() / total, outputs


def weight_of(batches: list[dict[str, Any]]) -> Tensor:
    """Summed weight of all targets in `batches`, float32: how many there are, where no weights are given."""
    weights = [find_targets(batch["labels"], batch.get("loss_weights")).weights_S.sum() for batch in batches]
    return torch.stack(weights).sum()
