"""The loss at supervised positions equals the plain one."""

import pytest
import torch
from torch.nn import functional

from trainers.loss import find_targets, supervised_loss, weight_of


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def plain_loss(model, batch) -> torch.Tensor:
    """All logits of all positions, shifted by hand."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "loss_weights")}
    logits = model(**inputs, use_cache=False).logits.float()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)


def test_the_loss_and_all_its_gradients_equal_those_of_all_logits(family, build, make_rows, collate):
    model, batch = build(family), collate(make_rows(family, 3))
    expected = plain_loss(model, batch)
    expected.backward()
    expected_gradients = gradients(model)

    loss, outputs = supervised_loss(model, batch)
    loss.backward()

    assert len(outputs.logits) == (batch["labels"] != -100).sum()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    found = gradients(model)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-6, msg=name)


def test_a_supervised_first_token_is_no_target_because_nothing_predicts_it():
    targets = find_targets(torch.tensor([[5, 6], [-100, 7]]))
    assert targets.predicts_BL.tolist() == [[True, False], [True, False]]
    assert targets.tokens_S.tolist() == [6, 7]


def test_weights_belong_to_the_token_that_is_predicted_not_to_the_one_that_predicts():
    targets = find_targets(torch.tensor([[-100, 5, 6, 7]]), torch.tensor([[9.0, 0.5, 0.0, 2.0]]))
    assert targets.predicts_BL.tolist() == [[True, False, True, False]]
    assert targets.tokens_S.tolist() == [5, 7]
    assert targets.weights_S.tolist() == [0.5, 2.0]


def test_label_smoothing_acts_on_shifted_targets(build, make_rows, collate):
    model, batch = build("qwen2_5_vl"), collate(make_rows("qwen2_5_vl", 2))
    smoothed, outputs = supervised_loss(model, batch, label_smoothing=0.2)
    log_p = outputs.logits.log_softmax(-1)
    targets = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
    expected = -(0.8 * log_p.gather(1, targets[:, None])[:, 0] + 0.2 * log_p.mean(-1)).mean()
    torch.testing.assert_close(smoothed, expected, rtol=0, atol=1e-6)


def test_the_weighted_loss_is_the_weighted_mean(build, make_rows, collate):
    model, rows = build("qwen2_5_vl"), make_rows("qwen2_5_vl", 2)
    for row in rows:
        row["loss_weights"] = torch.arange(len(row["labels"])) % 3 / 2  # 0, 0.5, 1, 0, 0.5, 1, ...
    batch = collate(rows)
    loss, _ = supervised_loss(model, batch)

    inputs = {key: value for key, value in batch.items() if key not in ("labels", "loss_weights")}
    log_p = model(**inputs, use_cache=False).logits.log_softmax(-1)
    total = weight = 0.0
    for row, labels in enumerate(batch["labels"].tolist()):
        for position, label in enumerate(labels):
            if label != -100 and position > 0:
                factor = batch["loss_weights"][row, position].item()
                total -= factor * log_p[row, position - 1, label].item()
                weight += factor
    assert loss.item() == pytest.approx(total / weight, abs=1e-6)
    assert weight_of([batch]).item() == pytest.approx(weight)


def test_weights_of_two_everywhere_change_nothing(build, make_rows, collate):
    model, batch = build("qwen2_5_vl"), collate(make_rows("qwen2_5_vl", 2))
    weighted = {**batch, "loss_weights": torch.full(batch["labels"].shape, 2.0)}
    assert supervised_loss(model, weighted)[0].item() == pytest.approx(supervised_loss(model, batch)[0].item())


def test_shares_of_micro_batches_add_up_to_the_mean_over_all_tokens(build, make_rows, collate):
    model, rows = build("qwen2_5_vl"), make_rows("qwen2_5_vl", 4)
    parts = [collate(rows[:1]), collate(rows[1:])]
    together = collate(rows)
    assert weight_of(parts) == weight_of([together]) == (together["labels"] != -100).sum()
    shares = sum(supervised_loss(model, part, total_weight=weight_of(parts))[0] for part in parts)
    torch.testing.assert_close(shares, supervised_loss(model, together)[0], rtol=0, atol=1e-6)


def test_a_batch_without_targets_gives_a_zero_that_can_be_differentiated(build, make_rows, collate):
    model, batch = build("qwen2_5_vl"), collate(make_rows("qwen2_5_vl", 1))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss, _ = supervised_loss(model, batch, total_weight=torch.tensor(7.0))
    loss.backward()
    assert loss.item() == 0.0
    assert not any(gradient.any() for gradient in gradients(model).values())


def test_the_callers_batch_is_left_as_it_was(build, make_rows, collate):
    model, batch = build("qwen_vl"), collate(make_rows("qwen_vl", 1))
    keys = set(batch)
    supervised_loss(model, batch)
    assert set(batch) == keys


def test_a_collator_that_switches_the_cache_off_itself_is_fine(build, make_rows, collate):
    model, batch = build("qwen_vl"), collate(make_rows("qwen_vl", 1))
    assert supervised_loss(model, {**batch, "use_cache": False})[0] == supervised_loss(model, batch)[0]
