"""Cross-entropy of each target, with one tensor of vocabulary size instead of four.

Autograd's cross-entropy keeps the logits, their log-softmax and two gradients; for 1,000 targets of Qwen2.5-VL each
takes 600 MB. Here the gradient is written over the logits.

Shapes: S targets, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_NUMBERS = 2**22  # what is worked on at a time, so that temporary tensors stay small


def token_losses(logits_SV: Tensor, tokens_S: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Loss of each target, in nats, float32.

    Cross-entropy against (1 - e) of the target plus e spread over the vocabulary (arXiv 1512.00567, section 7), plus
    `z_loss` times the squared log-normaliser, which keeps logits from drifting (PaLM, arXiv 2204.02311, section 5).

    The backward pass overwrites float32 logits: what needs them afterwards must copy them before. It runs once;
    a second one raises RuntimeError.

    Example:
        >>> token_losses(torch.zeros(1, 4), torch.tensor([2]))  # ln 4
        tensor([1.3863])
    """
    return _TokenLosses.apply(logits_SV.float(), tokens_S, label_smoothing, z_loss)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_SV: Tensor, tokens_S: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
        norms = [_log_normaliser(chunk) for chunk in _chunks(logits_SV)]
        norm_S = torch.cat(norms) if norms else logits_SV.new_zeros(0)
        ctx.save_for_backward(logits_SV, tokens_S, norm_S)
        ctx.label_smoothing, ctx.z_loss = label_smoothing, z_loss
        target_S = logits_SV.gather(1, tokens_S[:, None])[:, 0]
        losses_S = norm_S - (1 - label_smoothing) * target_S
        if label_smoothing:
            losses_S = losses_S - label_smoothing * logits_SV.mean(-1)
        return losses_S + z_loss * norm_S.square() if z_loss else losses_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_S: Tensor) -> tuple[Tensor, None, None, None]:
        logits_SV, tokens_S, norm_S = ctx.saved_tensors
        # d/dz_j of the loss: p_j (1 + 2 z norm) - (1 - e) [j = target] - e / V
        of_p_S = gradient_S * (1 + 2 * ctx.z_loss * norm_S)
        start = 0
        for chunk in _chunks(logits_SV):
            rows = slice(start, start + len(chunk))
            chunk.sub_(norm_S[rows, None]).exp_().mul_(of_p_S[rows, None])
            if ctx.label_smoothing:
                chunk.sub_(gradient_S[rows, None] * (ctx.label_smoothing / logits_SV.shape[1]))
            start += len(chunk)
        of_target_S = (ctx.label_smoothing - 1) * gradient_S
        logits_SV.scatter_add_(1, tokens_S[:, None], of_target_S[:, None])
        return logits_SV, None, None, None


def _log_normaliser(logits_SV: Tensor) -> Tensor:
    """torch.logsumexp with one temporary tensor instead of two."""
    max_S = logits_SV.amax(-1)
    return max_S + (logits_SV - max_S[:, None]).exp_().sum(-1).log()


def _chunks(logits_SV: Tensor) -> tuple[Tensor, ...]:
    """Views of a few rows each."""
    return logits_SV.split(max(1, CHUNK_NUMBERS // logits_SV.shape[1])) if len(logits_SV) else ()
