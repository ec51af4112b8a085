"""The output head where tokens are scored: log-probability and entropy of each, with the logits of few rows at a time.

With a vocabulary of 151,936 the logits of 500 tokens take 300 MB, and autograd would keep three such tensors. Here the
forward pass keeps one, or none where it would be large (the backward pass then computes the logits again), and the
gradient is written over it.

Shapes: U hidden states of width E, S scored tokens (several may be predicted by one hidden state), V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers.integrations import is_deepspeed_zero3_enabled

CHUNK_NUMBERS = 2**24  # logits made at a time
KEPT_NUMBERS = 2**27  # more logits than this are computed again in the backward pass: 512 MB of float32


def token_scores(
    head: nn.Module,
    hidden_UE: Tensor,
    index_S: Tensor,
    tokens_S: Tensor,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = ("log_probs",),
) -> dict[str, Tensor]:
    """Scores of tokens under softmax(logits / temperature), in float32 (S,).

    Args:
        head: the model's output embeddings; where it is no plain linear layer (quantised, sharded, LoRA), autograd
            keeps what it always keeps.
        hidden_UE: what the head reads.
        index_S: long; row of `hidden_UE` that predicts each token.
        tokens_S: long; the tokens.
        outputs: which scores: "log_probs" (nats, always given) and "entropy" (nats) have gradients; "mean_logits",
            "log_sum_sq_probs" (log of the sum of squared probabilities) and "is_top1" (bool) have none.

    Example:
        >>> head = nn.Linear(2, 4, bias=False)
        >>> token_scores(head, torch.zeros(1, 2), torch.tensor([0, 0]), torch.tensor([1, 3]))["log_probs"]  # -ln 4
        tensor([-1.3863, -1.3863], grad_fn=<...>)
    """
    weight = head.weight
    wanted = tuple(dict.fromkeys(("log_probs", *outputs)))
    is_plain = type(head) is nn.Linear and head.bias is None and not isinstance(weight, DTensor)
    if is_plain and not is_deepspeed_zero3_enabled() and hidden_UE.device == weight.device:
        scores_S = _TokenScores.apply(hidden_UE, weight, index_S, tokens_S, temperature, wanted)
        return dict(zip(wanted, scores_S, strict=True))
    return _scores_of(head(hidden_UE).float() / temperature, index_S, tokens_S, wanted)[0]


def _scores_of(
    logits_UV: Tensor, index_S: Tensor, tokens_S: Tensor, wanted: tuple[str, ...]
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """The wanted scores, and per hidden state the log-normaliser and (0 where it is not wanted) the entropy."""
    norm_U = logits_UV.logsumexp(-1)
    entropy_U = torch.zeros_like(norm_U)
    scores = {"log_probs": logits_UV[index_S, tokens_S] - norm_U[index_S]}
    if "entropy" in wanted:
        logps_UV = logits_UV - norm_U[:, None]
        entropy_U = -(logps_UV.exp() * logps_UV).sum(-1)
        scores["entropy"] = entropy_U[index_S]
    with torch.no_grad():
        if "mean_logits" in wanted:
            scores["mean_logits"] = logits_UV.mean(-1)[index_S]
        if "log_sum_sq_probs" in wanted:
            scores["log_sum_sq_probs"] = ((2 * logits_UV).logsumexp(-1) - 2 * norm_U)[index_S]
        if "is_top1" in wanted:
            scores["is_top1"] = logits_UV.argmax(-1)[index_S] == tokens_S
    return scores, (norm_U, entropy_U)


class _TokenScores(torch.autograd.Function):
    """`head` and `_scores_of` in chunks of hidden states, with a backward pass that writes over the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_UE: Tensor,
        weight_VE: Tensor,
        index_S: Tensor,
        tokens_S: Tensor,
        temperature: float,
        wanted: tuple[str, ...],
    ) -> tuple[Tensor, ...]:
        ctx.dtypes = hidden_UE.dtype, weight_VE.dtype
        device = hidden_UE.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden_UE, weight_VE = hidden_UE.to(dtype), weight_VE.to(dtype)
        U, V = len(hidden_UE), len(weight_VE)
        ctx.rows = max(1, CHUNK_NUMBERS // V)
        ctx.temperature, ctx.wanted = temperature, wanted
        keeps = any(ctx.needs_input_grad[:2]) and U * V <= KEPT_NUMBERS
        found = {
            name: hidden_UE.new_zeros(len(tokens_S), dtype=torch.bool if name == "is_top1" else torch.float32)
            for name in wanted
        }
        norm_U, entropy_U = hidden_UE.new_zeros(2, U, dtype=torch.float32)
        kept = []
        with torch.autocast(device, enabled=False):
            for start in range(0, U, ctx.rows):
                here = slice(start, start + ctx.rows)
                is_here = (index_S >= start) & (index_S < start + ctx.rows)
                logits = _logits(hidden_UE[here], weight_VE, temperature)
                scores, (norm_U[here], entropy_U[here]) = _scores_of(
                    logits, index_S[is_here] - start, tokens_S[is_here], wanted
                )
                for name in wanted:
                    found[name][is_here] = scores[name]
                if keeps:
                    kept.append(logits)
        ctx.save_for_backward(hidden_UE, weight_VE, index_S, tokens_S, norm_U, entropy_U, *kept)
        ctx.mark_non_differentiable(*(found[name] for name in wanted if name not in ("log_probs", "entropy")))
        return tuple(found[name] for name in wanted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_UE, weight_VE, index_S, tokens_S, norm_U, entropy_U, *kept = ctx.saved_tensors
        by_name = dict(zip(ctx.wanted, gradients, strict=True))
        logp_gradient_S = by_name["log_probs"]
        of_logps_U = torch.zeros_like(norm_U).index_add_(0, index_S, logp_gradient_S)
        of_entropy_U = torch.zeros_like(norm_U)
        if "entropy" in by_name:
            of_entropy_U.index_add_(0, index_S, by_name["entropy"])
        hidden_gradient = torch.zeros_like(hidden_UE) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.zeros_like(weight_VE) if ctx.needs_input_grad[1] else None
        for number, start in enumerate(range(0, len(hidden_UE), ctx.rows)):
            here = slice(start, start + ctx.rows)
            is_here = (index_S >= start) & (index_S < start + ctx.rows)
            logits = kept[number] if kept else _logits(hidden_UE[here], weight_VE, ctx.temperature)
            logps = logits.sub_(norm_U[here, None])
            # d log p_t / d z_j = [j = t] - p_j; d H / d z_j = -p_j (log p_j + H)
            factor = -of_logps_U[here, None]
            if bool(of_entropy_U[here].any()):
                factor = factor - of_entropy_U[here, None] * (logps + entropy_U[here, None])
            gradient = logps.exp_().mul_(factor)
            places = (index_S[is_here] - start, tokens_S[is_here])
            gradient.index_put_(places, logp_gradient_S[is_here], accumulate=True)
            gradient = gradient.div_(ctx.temperature).to(weight_VE.dtype)
            if hidden_gradient is not None:
                hidden_gradient[here] = gradient @ weight_VE
            if weight_gradient is not None:
                torch.addmm(weight_gradient, gradient.T, hidden_UE[here], out=weight_gradient)
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            None if hidden_gradient is None else hidden_gradient.to(hidden_dtype),
            None if weight_gradient is None else weight_gradient.to(weight_dtype),
            None,
            None,
            None,
            None,
        )


def _logits(hidden_UE: Tensor, weight_VE: Tensor, temperature: float) -> Tensor:
    logits = (hidden_UE @ weight_VE.T).float()
    return logits if temperature == 1.0 else logits.div_(temperature)
