"""The explanation of a loss adds up to it and says what stands where."""

import math
from io import StringIO

import pytest
import torch
from rich.console import Console

from trainers.explain_loss import explain_loss
from trainers.loss import supervised_loss


class Letters:
    """Token id -> one character."""

    def decode(self, ids: torch.Tensor) -> str:
        return "".join(chr(33 + i) for i in ids.reshape(-1).tolist())


@pytest.fixture
def explained(build, make_rows, collate):
    model, batch = build("qwen2_5_vl"), collate(make_rows("qwen2_5_vl", 2))
    return model, batch, explain_loss(model, batch, Letters())


def test_the_shares_add_up_to_the_loss(explained):
    model, batch, explanation = explained
    assert math.fsum(token.share for token in explanation.tokens) == pytest.approx(explanation.loss, abs=1e-6)
    assert explanation.loss == pytest.approx(supervised_loss(model, batch)[0].item(), abs=1e-6)


def test_with_weights_the_shares_still_add_up(build, make_rows, collate):
    model, batch = build("qwen2_5_vl"), collate(make_rows("qwen2_5_vl", 2))
    batch["loss_weights"] = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(0))
    explanation = explain_loss(model, batch, Letters())
    assert math.fsum(token.share for token in explanation.tokens) == pytest.approx(explanation.loss, abs=1e-6)


def test_every_row_names_its_target_and_the_text_before_it(explained):
    _, batch, explanation = explained
    assert len(explanation.tokens) == (batch["labels"] != -100).sum()
    for token in explanation.tokens:
        label = batch["labels"][token.row, token.position]
        assert token.target == chr(33 + label)
        before = Letters().decode(batch["input_ids"][token.row, : token.position])
        assert len(token.context) == min(24, token.position)
        assert before.endswith(token.context)
        assert token.probability == pytest.approx(math.exp(-token.loss))
        assert token.top_probability >= token.probability


def test_the_model_is_left_in_train_mode_if_it_was(build, make_rows, collate):
    model, batch = build("qwen2_5_vl").train(), collate(make_rows("qwen2_5_vl", 1))
    explain_loss(model, batch, Letters())
    assert model.training


def test_the_table_shows_line_breaks_and_markup_as_they_are(explained):
    _, _, explanation = explained
    first = explanation.tokens[0]
    odd = type(first)(**{**first.__dict__, "target": "[/b]\n"})
    console = Console(file=StringIO(), width=200)
    console.print(type(explanation)([odd], explanation.loss).table())
    assert "[/b]\\n" in console.file.getvalue()
    assert f"{first.loss:.4f}" in console.file.getvalue()


def test_a_batch_without_supervised_tokens_is_refused(build, make_rows, collate):
    model, batch = build("qwen2_5_vl"), collate(make_rows("qwen2_5_vl", 2))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(ValueError, match=r"no supervised token in its 2 row\(s\)"):
        explain_loss(model, batch, Letters())
