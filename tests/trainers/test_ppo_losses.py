"""PPO's arithmetic, against numbers computed by hand."""

import pytest
import torch

from trainers.ppo_losses import (
    KLControl,
    generalized_advantages,
    token_rewards,
    token_totals,
    value_losses,
    whitened,
)


def test_the_score_is_paid_at_the_last_token_and_the_kl_penalty_at_every_one():
    ratios = torch.tensor([[1.0, -2.0, 9.0], [3.0, 0.0, 1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    rewards = token_rewards(torch.tensor([5.0, 7.0]), ratios, mask, kl_coefficient=0.5)
    assert rewards.tolist() == [[-0.5, 6.0, 0.0], [-1.5, 0.0, 6.5]]


def test_a_completion_whose_tokens_are_all_masked_gets_nothing():
    rewards = token_rewards(torch.tensor([5.0, 1.0]), torch.zeros(2, 2), torch.tensor([[0, 0], [1, 0]]), 0.1)
    assert rewards.tolist() == [[0.0, 0.0], [1.0, 0.0]]


def test_advantages_are_those_computed_by_hand():
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 0.4, 0.2]])
    # gamma 0.9, lambda 0.5; errors: 0 + .9 x .4 - .5 = -.14; 0 + .9 x .2 - .4 = -.22; 1 - .2 = .8
    # advantages, backwards: .8; -.22 + .45 x .8 = .14; -.14 + .45 x .14 = -.077
    advantages, returns = generalized_advantages(rewards, values, torch.ones(1, 3), gamma=0.9, lam=0.5)
    assert advantages[0].tolist() == pytest.approx([-0.077, 0.14, 0.8])
    assert returns[0].tolist() == pytest.approx([0.423, 0.54, 1.0])


def test_with_lambda_one_returns_are_the_rewards_to_go_whatever_the_values_say():
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    for values in (torch.zeros(1, 3), torch.tensor([[3.0, -1.0, 5.0]])):
        _, returns = generalized_advantages(rewards, values, torch.ones(1, 3), gamma=1.0, lam=1.0)
        assert returns[0].tolist() == pytest.approx([7.0, 6.0, 4.0])


def test_padding_changes_no_advantage_whatever_values_stand_there():
    rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
    alone, returns = generalized_advantages(rewards, values, torch.ones(1, 2), gamma=0.9, lam=0.7)
    padded, padded_returns = generalized_advantages(
        torch.tensor([[0.0, 1.0, 77.0]]), torch.tensor([[0.5, 0.25, 99.0]]), torch.tensor([[1, 1, 0]]), 0.9, 0.7
    )
    torch.testing.assert_close(padded[:, :2], alone)
    torch.testing.assert_close(padded_returns[:, :2], returns)
    assert padded[0, 2] == padded_returns[0, 2] == 0


def test_the_value_loss_takes_the_larger_of_the_plain_and_the_clipped_error():
    old, returns = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, -1.0]])
    values = torch.tensor([[0.1, 0.9, 0.9]])
    # moved by .1: plain .9 ** 2 / 2; towards the return by .9, clipped to .2: .8 ** 2 / 2; away from it: 1.9 ** 2 / 2
    assert value_losses(values, old, returns, clip=0.2)[0].tolist() == pytest.approx([0.405, 0.32, 1.805])


def test_whitening_counts_tokens_and_not_padding():
    values, mask = torch.tensor([[2.0, 4.0, 100.0], [6.0, 8.0, 10.0]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    white = whitened(values, mask, token_totals(values, mask))  # mean 6, variance 8
    assert white[0].tolist() == pytest.approx([-(2**0.5), -(0.5**0.5), 0.0])
    assert white[1].tolist() == pytest.approx([0.0, 0.5**0.5, 2**0.5])


def test_the_kl_coefficient_follows_its_target_with_clipped_steps():
    control = KLControl(0.1, target=5.0, horizon=20)
    assert control.update(kl=5.5, num_answers=10) == pytest.approx(0.1 * 1.05)  # 10 % too much, half a horizon
    assert control.update(kl=50.0, num_answers=10) == pytest.approx(0.105 * 1.1)  # 20 % at most
    assert control.update(kl=0.0, num_answers=20) == pytest.approx(0.1155 * 0.8)
    assert KLControl(0.1).update(kl=50.0, num_answers=10) == 0.1
