"""PPO's arithmetic: rewards per token, advantages, the clipped value loss, KL control.

Shapes: N completions of up to T tokens. `mask_NT` is 1 at tokens and 0 at padding, which stands behind the tokens. The
value at t is that of the state before token t.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def token_rewards(scores_N: Tensor, log_ratio_NT: Tensor, mask_NT: Tensor, kl_coefficient: float) -> Tensor:
    """(N, T): minus the KL penalty at every token, and the score of the answer at its last one.

    log_ratio_NT: log-probability of each token under the policy that wrote it minus that under the reference
    (arXiv 1909.08593, equation 2, spread over the tokens). A completion without tokens gets nothing.

    Example:
        >>> ratio, mask = torch.tensor([[0.5, 1.0, 7.0]]), torch.tensor([[1, 1, 0]])
        >>> token_rewards(torch.tensor([3.0]), ratio, mask, kl_coefficient=0.1)
        tensor([[-0.0500,  2.9000,  0.0000]])
    """
    rewards_NT = -kl_coefficient * log_ratio_NT * mask_NT
    lengths_N = mask_NT.sum(dim=1)
    written = lengths_N.nonzero()[:, 0]
    rewards_NT[written, lengths_N[written] - 1] += scores_N[written]
    return rewards_NT


def generalized_advantages(
    rewards_NT: Tensor, values_NT: Tensor, mask_NT: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, (N, T) each, 0 at padding (GAE, arXiv 1506.02438, equation 16).

    The answer ends with its last token, after which nothing is worth anything.

    Example:
        >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
        >>> generalized_advantages(rewards, values, torch.ones(1, 2), gamma=1.0, lam=0.5)  # 0.75; -0.25 + 0.5 x 0.75
        (tensor([[0.1250, 0.7500]]), tensor([[0.6250, 1.0000]]))
    """
    values_NT = values_NT * mask_NT
    advantages_NT = torch.zeros_like(values_NT)
    next_value_N = advantage_N = torch.zeros_like(values_NT[:, 0])
    for t in reversed(range(values_NT.shape[1])):
        error_N = rewards_NT[:, t] + gamma * next_value_N - values_NT[:, t]
        advantage_N = (error_N + gamma * lam * advantage_N) * mask_NT[:, t]
        advantages_NT[:, t] = advantage_N
        next_value_N = values_NT[:, t]
    return advantages_NT, advantages_NT + values_NT


def value_losses(values_NT: Tensor, old_values_NT: Tensor, returns_NT: Tensor, clip: float) -> Tensor:
    """(N, T): half the squared error of the value, or of the value moved by at most `clip` from the old one, whichever
    is larger (the reference implementation of arXiv 1707.06347).

    Example:
        >>> value_losses(torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[1.0]]), clip=0.2)  # 0.8 ** 2 / 2
        tensor([[0.3200]])
    """
    near_NT = old_values_NT + (values_NT - old_values_NT).clamp(-clip, clip)
    return 0.5 * torch.maximum((values_NT - returns_NT) ** 2, (near_NT - returns_NT) ** 2)


def whitened(values_NT: Tensor, mask_NT: Tensor, totals: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the tokens; 0 at padding.

    totals: sum, sum of squares and number of the tokens' values, over all devices (`token_totals`, summed).

    Example:
        >>> values, mask = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1, 1, 0]])
        >>> whitened(values, mask, token_totals(values, mask))
        tensor([[-1.0000,  1.0000,  0.0000]])
    """
    mean = totals[0] / totals[2].clamp(min=1)
    variance = (totals[1] / totals[2].clamp(min=1) - mean**2).clamp(min=0)
    return (values_NT - mean) / (variance.sqrt() + 1e-8) * mask_NT


def token_totals(values_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """(3,): sum, sum of squares and number of what `mask_NT` leaves."""
    kept = values_NT * mask_NT
    return torch.stack([kept.sum(), (kept**2).sum(), mask_NT.sum().to(kept.dtype)])


@dataclass
class KLControl:
    """The coefficient of the KL penalty, constant or steered to a target (arXiv 1909.08593, section 2.2).

    target: KL of an answer, in nats, that is aimed at; None keeps the coefficient. horizon: answers after which an
    error of 20 % has moved the coefficient by 20 %.

    Example:
        >>> control = KLControl(0.1, target=6.0, horizon=100)
        >>> control.update(kl=9.0, num_answers=10), control.update(kl=3.0, num_answers=10)  # errors clipped to 20 %
        (0.10200000000000001, 0.09996)
    """

    coefficient: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl: float, num_answers: int) -> float:
        """The coefficient after a batch of answers whose mean KL was `kl`."""
        if self.target is not None:
            error = min(0.2, max(-0.2, kl / self.target - 1))
            self.coefficient *= 1 + error * num_answers / self.horizon
        return self.coefficient
