"""The tower's patches, the position tables and the resampler: one fact per test, on numbers checked by hand."""

import math

import pytest
import torch
from torch import nn

from modeling_qwenvl import QwenVLForConditionalGeneration, QwenVLVisionConfig, QwenVLVisionModel
from modeling_qwenvl.adapter_qwenvl import QwenVLResampler
from modeling_qwenvl.position_tables import resize_table, sincos_table
from modeling_qwenvl.vision_qwenvl import patch_grid


def test_the_table_holds_column_before_row_and_sines_before_cosines():
    table = sincos_table(3, 8).view(3, 3, 8)  # frequencies 1 and 0.01
    assert table[0, 0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    column_2 = [math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)]
    assert table[0, 2].tolist() == pytest.approx([*column_2, 0, 0, 1, 1])
    assert table[2, 0].tolist() == pytest.approx([0, 0, 1, 1, *column_2])


def test_resizing_keeps_rows_and_columns_apart():
    columns_grow = torch.arange(4.0).repeat(4)[:, None]
    resized = resize_table(columns_grow, (2, 8)).view(2, 8)
    assert torch.equal(resized[0], resized[1])
    assert (resized[0].diff() > 0).all()
    assert resize_table(columns_grow, (4, 4)) is columns_grow


def test_a_table_is_resized_in_float32_and_keeps_its_dtype():
    table = torch.randn(16, 3).bfloat16()
    resized = resize_table(table, (3, 5))
    assert (resized.shape, resized.dtype) == ((15, 3), torch.bfloat16)
    assert torch.equal(resized, resize_table(table.float(), (3, 5)).bfloat16())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 28, 28), r"3 dimensions, shape \(3, 28, 28\)"),
        ((1, 1, 3, 28, 28), "5 dimensions"),
        ((1, 3, 30, 28), "30 x 28 pixels cannot be cut into patches of 14 x 14"),
        ((1, 3, 28, 0), "28 x 0 pixels"),
    ],
)
def test_pictures_that_cannot_be_cut_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        patch_grid(torch.zeros(shape), 14)


@pytest.fixture
def tower() -> QwenVLVisionModel:
    torch.manual_seed(0)
    config = QwenVLVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        patch_size=5,
        image_size=20,
        position_grid=4,
    )
    return QwenVLVisionModel(config).eval()


@torch.no_grad()
def test_patches_are_row_major_and_see_only_their_own_pixels_before_attention(tower):
    tower.layers = nn.ModuleList()
    pixel_values = torch.zeros(1, 3, 10, 15)
    changed = pixel_values.clone()
    changed[..., 5:, 5:10] = 1.0  # second row of patches, second column
    difference = (tower(changed).last_hidden_state - tower(pixel_values).last_hidden_state).abs().amax(-1)
    assert difference.nonzero().tolist() == [[0, 4]]


@torch.no_grad()
def test_a_picture_that_is_not_square_gets_positions_by_row_and_column(tower):
    tower.layers, tower.pre_norm = nn.ModuleList(), nn.Identity()
    tower.patch_embedding.weight.zero_()
    assert patch_grid(torch.zeros(1, 3, 10, 15), 5) == (2, 3)
    positions = tower(torch.zeros(1, 3, 10, 15)).last_hidden_state[0]
    assert torch.equal(positions, resize_table(tower.position_embedding, (2, 3)))


@torch.no_grad()
def test_a_picture_does_not_depend_on_the_pictures_beside_it(tower):
    pictures = torch.randn(3, 3, 20, 20)
    together = tower(pictures).last_hidden_state
    torch.testing.assert_close(tower(pictures[1:2]).last_hidden_state, together[1:2], rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_tower_gives_its_hidden_states_and_attentions(tower):
    tower.set_attn_implementation("eager")
    outputs = tower(torch.randn(2, 3, 20, 15), output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(2, 12, 24)] * 3
    assert [tuple(a.shape) for a in outputs.attentions] == [(2, 3, 12, 12)] * 2
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)


@pytest.fixture
def resampler(tiny_model):
    """A factory of fresh resamplers, from patches of width 32 to 64."""

    def build(**fields) -> QwenVLResampler:
        return tiny_model(**fields).model.adapter

    return build


def randomised(resampler: QwenVLResampler) -> QwenVLResampler:
    """With every trainable tensor drawn at random, so that no fact holds by a zero bias."""
    generator = torch.Generator().manual_seed(5)
    for parameter in resampler.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return resampler


@torch.no_grad()
def test_identical_patches_give_identical_tokens_because_values_carry_no_position(resampler):
    tokens = randomised(resampler())(torch.ones(1, 16, 32) * torch.randn(32), (4, 4))
    torch.testing.assert_close(tokens, tokens[:, :1].expand_as(tokens), rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_order_of_patches_matters_because_keys_carry_positions(resampler):
    patches = torch.randn(1, 16, 32)
    adapter = randomised(resampler())
    assert (adapter(patches, (4, 4)) - adapter(patches.flip(1), (4, 4))).abs().max() > 1e-2


@torch.no_grad()
def test_equal_queries_still_differ_because_they_carry_positions(resampler):
    adapter = randomised(resampler())
    adapter.query.zero_()
    tokens = adapter(torch.randn(1, 16, 32), (4, 4))
    assert (tokens[:, 0] - tokens[:, 1]).abs().max() > 1e-2


@torch.no_grad()
def test_the_scale_of_patches_and_queries_does_not_matter_because_both_are_normed(resampler):
    adapter, patches = randomised(resampler()), torch.randn(1, 16, 32)
    tokens = adapter(patches, (4, 4))
    adapter.query.mul_(100)
    torch.testing.assert_close(adapter(100 * patches, (4, 4)), tokens, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_resampler_is_torchs_multi_head_attention_between_norms(resampler):
    """Written from the description with torch's own attention, for two heads."""
    adapter, patches = randomised(resampler()).double(), torch.randn(3, 16, 32, dtype=torch.float64)
    attention = nn.MultiheadAttention(64, 2, batch_first=True, dtype=torch.float64)
    projections = (adapter.q_proj, adapter.k_proj, adapter.v_proj)
    attention.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
    attention.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
    attention.out_proj.load_state_dict(adapter.out_proj.state_dict())
    values = adapter.ln_kv(adapter.kv_proj(patches))
    keys = values + resize_table(sincos_table(2, 64), (4, 4))
    queries = (adapter.ln_q(adapter.query) + sincos_table(2, 64)).expand(3, -1, -1)
    expected = adapter.proj(adapter.ln_post(attention(queries, keys, values)[0]))
    torch.testing.assert_close(adapter(patches, (4, 4)), expected)


def test_without_a_change_of_width_there_is_no_projection(resampler):
    adapter = resampler(vision_config={"hidden_size": 64})
    assert isinstance(adapter.kv_proj, nn.Identity)
    assert "kv_proj.weight" not in adapter.state_dict()


def attention_of(adapter: QwenVLResampler, grid: tuple[int, int], num_pictures: int = 1) -> torch.Tensor:
    """Attention of pictures of random patches, (B, K, Q, N)."""
    patches = torch.randn(num_pictures, grid[0] * grid[1], 32, generator=torch.Generator().manual_seed(1))
    query, key, _ = adapter.queries_keys_values(patches, grid)
    return (query @ key.transpose(2, 3) * adapter.scaling).softmax(-1)


@torch.no_grad()
@pytest.mark.parametrize(("num_queries", "width", "heads"), [(16, 64, 2), (64, 128, 4), (256, 128, 2)])
def test_local_initialisation_lets_every_query_look_at_its_own_place(resampler, num_queries, width, heads):
    text = {"hidden_size": width}
    fields = {"num_queries": num_queries, "adapter_num_heads": heads, "text_config": text}
    side = math.isqrt(num_queries)
    local = attention_of(resampler(adapter_init="local", **fields), (side, side), num_pictures=2)
    own = torch.arange(num_queries)
    assert torch.equal(local.argmax(-1), own.expand(2, heads, -1))
    assert local[..., own, own].min() > 0.25
    original = attention_of(resampler(**fields), (side, side))
    assert original[..., own, own].max() < 5 / num_queries


@torch.no_grad()
def test_local_initialisation_on_twice_the_grid_looks_at_the_four_patches_of_its_place(resampler):
    local = attention_of(resampler(num_queries=16, adapter_init="local"), (8, 8)).mean(1)[0]
    row, column = 1, 2
    own = {(2 * row + i) * 8 + 2 * column + j for i in (0, 1) for j in (0, 1)}
    assert set(local[row * 4 + column].topk(4).indices.tolist()) == own


def test_a_locally_initialised_resampler_trains_everywhere(resampler):
    adapter = resampler(num_queries=16, adapter_init="local").train()
    adapter(torch.randn(2, 16, 32), (4, 4)).square().sum().backward()
    without = [name for name, p in adapter.named_parameters() if p.requires_grad and p.grad.abs().sum() == 0]
    assert without == []


def test_local_initialisation_needs_wide_enough_heads(resampler):
    with pytest.raises(ValueError, match="needs 12 channels per head for a grid of 4 x 4 queries, but a head has 8"):
        resampler(num_queries=16, adapter_init="local", adapter_num_heads=8)


def test_local_initialisation_leaves_loaded_weights_alone(tiny_model, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = QwenVLForConditionalGeneration.from_pretrained(tmp_path, adapter_init="local")
    assert loaded.config.adapter_init == "local"
    assert all(torch.equal(p, loaded.state_dict()[name]) for name, p in model.state_dict().items())


def test_the_fixed_table_is_never_trained(tiny_model, tiny_inputs, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = QwenVLForConditionalGeneration.from_pretrained(tmp_path).train()
    table = model.model.adapter.positions.table
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.adapter.positions.table"]
    model.requires_grad_(True)  # even so
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(**tiny_inputs, labels=tiny_inputs["input_ids"]).loss.backward()
    optimizer.step()
    assert torch.equal(table, sincos_table(2, 64))


def test_a_loaded_table_is_kept_and_not_recomputed(tiny_model, tmp_path):
    model = tiny_model()
    rounded = model.model.adapter.positions.table.bfloat16().float()
    model.model.adapter.positions.table.data = rounded
    model.save_pretrained(tmp_path)
    loaded = QwenVLForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.adapter.positions.table, rounded)
    assert not torch.equal(rounded, sincos_table(2, 64))
