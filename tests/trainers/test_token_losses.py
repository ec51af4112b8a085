"""Losses and gradients of single targets equal formulas written out, and torch's own."""

import math

import pytest
import torch
from torch.nn import functional

from trainers import token_losses as module
from trainers.token_losses import token_losses


def test_the_loss_of_even_odds_is_the_log_of_the_vocabulary():
    assert token_losses(torch.zeros(1, 7), torch.tensor([3])).item() == pytest.approx(math.log(7))


def test_label_smoothing_spreads_its_share_over_the_vocabulary():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    uniform = -(math.log(0.5) + 2 * math.log(0.25)) / 3
    expected = 0.9 * -math.log(0.5) + 0.1 * uniform
    assert token_losses(logits, torch.tensor([0]), label_smoothing=0.1).item() == pytest.approx(expected, abs=1e-6)


def test_z_loss_adds_the_squared_log_normaliser():
    logits = torch.zeros(1, 4) + 3.0  # log-normaliser: 3 + ln 4
    expected = math.log(4) + 0.01 * (3 + math.log(4)) ** 2
    assert token_losses(logits, torch.tensor([0]), z_loss=0.01).item() == pytest.approx(expected, abs=1e-6)


def test_low_precision_logits_are_raised_to_float32_before_the_softmax():
    logits = torch.randn(3, 101).bfloat16()
    losses = token_losses(logits, torch.tensor([1, 2, 3]))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, token_losses(logits.float(), torch.tensor([1, 2, 3])))


def _by_autograd(logits, tokens, label_smoothing, z_loss):
    losses = functional.cross_entropy(logits, tokens, reduction="none", label_smoothing=label_smoothing)
    return losses + z_loss * logits.logsumexp(-1).square()


@pytest.mark.parametrize("rows_at_a_time", [2, 100])
@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.7), (0.3, 0.7)])
def test_losses_and_gradients_equal_autograds(label_smoothing, z_loss, rows_at_a_time, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_NUMBERS", rows_at_a_time * 7)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator)
    tokens, weights = torch.tensor([3, 0, 6, 3, 1]), torch.tensor([1.0, 2.0, 0.0, 0.5, 1.5])
    plain = logits.clone().requires_grad_()
    expected = _by_autograd(plain, tokens, label_smoothing, z_loss)
    (expected * weights).sum().backward()

    ours = logits.clone().requires_grad_()
    losses = token_losses(ours * 1.0, tokens, label_smoothing, z_loss)
    (losses * weights).sum().backward()

    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=0, atol=1e-6)


def test_low_precision_logits_get_their_gradient_in_their_precision():
    logits = torch.randn(3, 11).bfloat16().requires_grad_()
    token_losses(logits, torch.tensor([1, 2, 3])).sum().backward()
    expected = logits.detach().float().softmax(-1)
    expected[torch.arange(3), torch.tensor([1, 2, 3])] -= 1
    torch.testing.assert_close(logits.grad, expected.bfloat16())


def test_no_target_gives_no_loss_and_a_graph():
    logits = torch.zeros(0, 7, requires_grad=True)
    losses = token_losses(logits, torch.zeros(0, dtype=torch.long))
    losses.sum().backward()
    assert losses.shape == (0,)
    assert logits.grad.shape == (0, 7)


def test_a_second_backward_pass_is_refused_because_the_first_wrote_over_the_logits():
    weight = torch.ones(2, 7, requires_grad=True)
    loss = token_losses(weight * 2, torch.tensor([1, 2])).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
