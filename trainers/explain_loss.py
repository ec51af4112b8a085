"""The loss of a batch position by position: what was read, what should come, what the model expected."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import PreTrainedTokenizerBase

from trainers.loss import find_targets, supervised_loss
from trainers.token_losses import token_losses

CONTEXT_CHARACTERS = 24


@dataclass(frozen=True)
class ExplainedToken:
    """One supervised token.

    Attributes:
        row, position: where the target stands in `labels`.
        context: end of the text before it, in this row.
        target, top: the target's text, and that of the token the model finds most probable.
        probability, top_probability: of the two, in [0, 1].
        loss: -ln(probability), in nats.
        share: what this token adds to the batch's loss: loss * weight / sum of weights.
    """

    row: int
    position: int
    context: str
    target: str
    probability: float
    top: str
    top_probability: float
    loss: float
    share: float


@dataclass(frozen=True)
class ExplainedLoss:
    """All supervised tokens of a batch; their shares sum up to `loss`, the (weighted) mean over tokens, in nats."""

    tokens: list[ExplainedToken]
    loss: float

    def table(self) -> Table:
        """For `rich.print`; tokens that the model would have got right are green."""
        title = f"{len(self.tokens)} supervised tokens, loss {self.loss:.4f}, perplexity {math.exp(self.loss):.2f}"
        table = Table("row", "position", "read", "target", title=title)
        for heading in ("probability", "most probable", "its probability", "loss", "share"):
            table.add_column(heading, justify="left" if heading == "most probable" else "right")
        for token in self.tokens:
            # Text, not markup: a target may well be "[/b]".
            texts = [Text(_visible(text)) for text in (token.context, token.target, token.top)]
            table.add_row(
                str(token.row),
                str(token.position),
                texts[0],
                texts[1],
                f"{token.probability:.4f}",
                texts[2],
                f"{token.top_probability:.4f}",
                f"{token.loss:.4f}",
                f"{token.share:.4f}",
                style="green" if token.top == token.target else None,
            )
        return table


@torch.no_grad()
def explain_loss(model: nn.Module, batch: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> ExplainedLoss:
    """Explains the plain loss (no label smoothing, no z-loss) of a batch that a collator made, in eval mode.

    Raises ValueError for a batch without supervised tokens.

    Example:
        >>> explained = explain_loss(model, collator([example]), processor.tokenizer)
        >>> rich.print(explained.table())
    """
    targets = find_targets(batch["labels"], batch.get("loss_weights"))
    if not len(targets.tokens_S):
        raise ValueError(
            f"The batch has no supervised token in its {len(batch['labels'])} row(s): nothing to explain."
        )
    was_training = model.training
    model.eval()
    try:
        loss, outputs = supervised_loss(model, batch)
    finally:
        model.train(was_training)

    losses_S = token_losses(outputs.logits, targets.tokens_S)
    top_S = outputs.logits.float().softmax(-1).max(-1)
    shares_S = losses_S * targets.weights_S / targets.weights_S.sum()
    tokens = []
    for index, (row, predicting) in enumerate(targets.predicts_BL.nonzero().tolist()):
        before = tokenizer.decode(batch["input_ids"][row, : predicting + 1])
        tokens.append(
            ExplainedToken(
                row=row,
                position=predicting + 1,
                context=before[-CONTEXT_CHARACTERS:],
                target=tokenizer.decode(targets.tokens_S[index]),
                probability=math.exp(-losses_S[index].item()),
                top=tokenizer.decode(top_S.indices[index]),
                top_probability=top_S.values[index].item(),
                loss=losses_S[index].item(),
                share=shares_S[index].item(),
            )
        )
    return ExplainedLoss(tokens, loss.item())


def _visible(text: str) -> str:
    """Line breaks and tabs as escapes: in a table they would be invisible."""
    return text.replace("\n", "\\n").replace("\t", "\\t")
