"""Dynamic NTK and log-n: when they begin, whose they are; a cache may be continued by any number of tokens."""

import copy
import math

import pytest
import torch
from transformers import Qwen2Config, Qwen2Model

from modeling_qwenvl import QwenVLTextConfig, QwenVLTextModel
from modeling_qwenvl.text_qwenvl import logn_scale, ntk_alpha

SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}


@pytest.fixture
def model() -> QwenVLTextModel:
    """Trained on 16 tokens."""
    torch.manual_seed(1)
    return QwenVLTextModel(QwenVLTextConfig(**SIZES, seq_length=16, initializer_range=0.3)).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 53, (2, 70), generator=torch.Generator().manual_seed(2))


def test_alpha_is_one_up_to_the_training_length_and_then_jumps():
    lengths = [1, 16, 17, 32, 33, 64, 65, 128, 129]
    assert [ntk_alpha(length, 16) for length in lengths] == [1, 1, 3, 3, 7, 7, 15, 15, 31]


def test_logn_is_one_up_to_the_training_length_and_then_the_ratio_of_logarithms():
    assert logn_scale(0, 16, 16).tolist() == [1.0] * 16
    assert logn_scale(255, 1, 16).item() == pytest.approx(math.log(256) / math.log(16))
    assert logn_scale(0, 20, 16)[17:].tolist() == logn_scale(17, 3, 16).tolist()


@torch.no_grad()
def test_within_the_training_length_it_is_qwen2(model, ids):
    config = Qwen2Config(**SIZES, num_key_value_heads=3, max_position_embeddings=8192)
    qwen2 = Qwen2Model(config).eval()
    qwen2.load_state_dict(model.state_dict())
    short = ids[:, :16]
    torch.testing.assert_close(model(short).last_hidden_state, qwen2(short).last_hidden_state, rtol=0, atol=2e-6)
    long_difference = (model(ids).last_hidden_state - qwen2(ids).last_hidden_state).abs().max()
    assert long_difference > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("switch", ["use_dynamic_ntk", "use_logn_attn"])
def test_each_of_the_two_changes_long_rows_on_its_own(model, ids, switch):
    both = model(ids).last_hidden_state
    setattr(model.config, switch, False)
    one = model(ids).last_hidden_state
    setattr(model.config, switch, True)
    assert (both - one).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("pieces", [(10, 60), (10, 1, 1, 30, 28), (40, 30), (40, 1, 29)])
def test_a_cache_continued_in_pieces_keeps_the_stretch_of_its_first_piece(model, ids, pieces, implementation):
    model.set_attn_implementation(implementation)
    cache, outputs, start = None, [], 0
    for count in pieces:
        step = model(ids[:, start : start + count], past_key_values=cache, use_cache=True)
        cache, start = step.past_key_values, start + count
        outputs.append(step.last_hidden_state)
    # The same row in one piece with that stretch.
    expected = whole_row_with_alpha(model, ids, ntk_alpha(pieces[0], 16))
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=0, atol=1e-5)


def whole_row_with_alpha(model: QwenVLTextModel, ids: torch.Tensor, alpha: float) -> torch.Tensor:
    model._stretch = lambda *_: alpha
    try:
        return model(ids).last_hidden_state
    finally:
        del model._stretch


@torch.no_grad()
def test_two_caches_used_in_turns_do_not_disturb_each_other(model, ids):
    def start(length):
        return model(ids[:, :length], use_cache=True).past_key_values

    def step(cache, place):
        return model(ids[:, place : place + 1], past_key_values=cache, use_cache=True).last_hidden_state

    alone = [step(start(10), 10), step(start(40), 40)]
    short, long = start(10), start(40)
    assert torch.equal(step(short, 10), alone[0])
    assert torch.equal(step(long, 40), alone[1])


@torch.no_grad()
def test_a_copied_cache_keeps_its_stretch(model, ids):
    cache = model(ids[:, :40], use_cache=True).past_key_values
    twin = copy.deepcopy(cache)
    model(ids[:, :5])
    ours = model(ids[:, 40:42], past_key_values=twin, use_cache=True).last_hidden_state
    assert torch.equal(ours, model(ids[:, 40:42], past_key_values=cache, use_cache=True).last_hidden_state)


@torch.no_grad()
def test_a_long_cache_of_unknown_stretch_is_refused(model, ids):
    cache = model(ids[:, :40], use_cache=True).past_key_values
    del cache.qwenvl_ntk_alpha
    with pytest.raises(ValueError, match="holds 40 tokens, more than seq_length = 16"):
        model(ids[:, 40:41], past_key_values=cache)


@torch.no_grad()
def test_training_does_not_see_the_stretch_of_the_evaluation_before_it(model, ids):
    fresh = model.train()(ids).last_hidden_state
    model.eval()(ids)
    assert torch.equal(model.train()(ids).last_hidden_state, fresh)
    plain = copy.deepcopy(model).eval()
    plain.config.use_dynamic_ntk = plain.config.use_logn_attn = False
    assert torch.equal(plain(ids).last_hidden_state, fresh)


@torch.no_grad()
def test_left_padding_counts_towards_the_length_of_a_row_as_in_the_original(model, ids):
    row = ids[:1, :14]
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), row], 1)
    mask = torch.tensor([[0] * 2 + [1] * 14])
    alone = model(row).last_hidden_state
    # 16 places: still within the training length, so padding changes nothing.
    torch.testing.assert_close(model(padded, mask).last_hidden_state[:, 2:], alone, rtol=0, atol=1e-5)
    padded, mask = torch.cat([padded[:, :1], padded], 1), torch.tensor([[0] * 3 + [1] * 14])
    # 17 places: stretched by 3, and the last query scaled as the 17th.
    model.config.use_logn_attn = False
    out = model(padded, mask).last_hidden_state[:, 3:]
    torch.testing.assert_close(out, whole_row_with_alpha(model, row, 3.0), rtol=0, atol=1e-5)
    model.config.use_logn_attn = True
    scaled = model(padded, mask).last_hidden_state[:, 3:]
    torch.testing.assert_close(scaled[:, :-1], out[:, :-1], rtol=0, atol=1e-6)
    assert (scaled[:, -1] - out[:, -1]).abs().max() > 1e-4


@torch.no_grad()
def test_positions_that_start_again_are_obeyed_by_the_rotation(model, ids):
    """Packed rows restart their positions; within a block-diagonal mask each sample is as if alone."""
    samples = [ids[:1, :5], ids[:1, 5:12]]
    packed = torch.cat(samples, 1)
    positions = torch.tensor([[*range(5), *range(7)]])
    sample_of = torch.tensor([0] * 5 + [1] * 7)
    causal = torch.ones(12, 12, dtype=torch.bool).tril() & (sample_of[:, None] == sample_of)
    out = model(packed, causal[None, None], position_ids=positions, use_cache=False).last_hidden_state
    alone = torch.cat([model(sample).last_hidden_state for sample in samples], 1)
    torch.testing.assert_close(out, alone, rtol=0, atol=1e-5)
