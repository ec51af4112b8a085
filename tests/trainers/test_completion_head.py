"""Scores of tokens by the chunked head, against autograd on the whole logits."""

import pytest
import torch
from torch import nn

from trainers import completion_head
from trainers.completion_head import token_scores

ALL = ("log_probs", "entropy", "mean_logits", "log_sum_sq_probs", "is_top1")


def by_hand(logits, index, tokens):
    probabilities = logits.softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1)
    return {
        "log_probs": probabilities[index, tokens].log(),
        "entropy": entropy[index],
        "mean_logits": logits.mean(-1)[index],
        "log_sum_sq_probs": probabilities.square().sum(-1).log()[index],
        "is_top1": logits[index].argmax(-1) == tokens,
    }


@pytest.fixture
def case():
    """5 hidden states of width 7 predict 6 of 11 tokens, the first two from the same state."""
    generator = torch.Generator().manual_seed(3)
    head = nn.Linear(7, 11, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(11, 7, generator=generator))
    hidden = torch.randn(5, 7, generator=generator)
    index = torch.tensor([1, 1, 0, 4, 2, 3])
    tokens = torch.tensor([8, 2, 0, 10, 5, 5])
    tokens[2] = head(hidden)[0].argmax()  # one token that is the most likely
    return head, hidden.requires_grad_(), index, tokens


@pytest.mark.parametrize("kept", [2**27, 0], ids=["logits kept", "logits computed again"])
@pytest.mark.parametrize("chunk", [2**24, 22], ids=["at once", "two rows at a time"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_and_gradients_equal_autograd_on_the_whole_logits(case, monkeypatch, kept, chunk, temperature):
    monkeypatch.setattr(completion_head, "KEPT_NUMBERS", kept)
    monkeypatch.setattr(completion_head, "CHUNK_NUMBERS", chunk)
    head, hidden, index, tokens = case
    wanted = by_hand(head(hidden) / temperature, index, tokens)
    found = token_scores(head, hidden, index, tokens, temperature, ALL)
    assert list(found) == list(ALL)
    for name in ALL:
        torch.testing.assert_close(found[name], wanted[name])
    assert found["is_top1"].any()
    assert not found["is_top1"].all()
    assert not any(found[name].requires_grad for name in ALL[2:])
    weights = torch.linspace(-1, 2, 6)
    inputs = [hidden, head.weight]
    for parts in (("log_probs",), ("entropy",), ("log_probs", "entropy")):
        expected = torch.autograd.grad(sum((wanted[n] * weights).sum() for n in parts), inputs, retain_graph=True)
        scores = token_scores(head, hidden, index, tokens, temperature, ALL)
        torch.testing.assert_close(
            torch.autograd.grad(sum((scores[n] * weights).sum() for n in parts), inputs), expected
        )


def test_a_head_that_is_no_plain_linear_layer_gives_the_same(case):
    head, hidden, index, tokens = case
    with_bias = nn.Linear(7, 11)
    with torch.no_grad():
        with_bias.weight.copy_(head.weight)
        with_bias.bias.zero_()
    assert token_scores(with_bias, hidden, index, tokens, 0.7)["log_probs"].tolist() == pytest.approx(
        token_scores(head, hidden, index, tokens, 0.7)["log_probs"].tolist(), abs=1e-6
    )


def test_a_frozen_head_gets_no_gradient(case):
    head, hidden, index, tokens = case
    head.requires_grad_(False)
    token_scores(head, hidden, index, tokens)["log_probs"].sum().backward()
    assert head.weight.grad is None
    assert hidden.grad.abs().sum() > 0


def test_nothing_scored_is_nothing_with_a_graph(case):
    head, hidden, _, _ = case
    none = torch.zeros(0, dtype=torch.long)
    scores = token_scores(head, hidden[:0], none, none)["log_probs"]
    scores.sum().backward()
    assert scores.shape == (0,)
    assert head.weight.grad.abs().sum() == 0


def test_under_autocast_the_product_is_in_bfloat16_and_the_rest_in_float32(case):
    head, hidden, index, tokens = case
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = token_scores(head, hidden, index, tokens)["log_probs"]
        logits = head(hidden).float()
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, logits.log_softmax(-1)[index, tokens])
    scores.sum().backward()
    assert head.weight.grad.dtype == hidden.grad.dtype == torch.float32
