"""A tree under each attention that takes its mask, and the models that would misread one."""

import pytest
import torch
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from modeling_qwenvl.modeling_qwenvl import QwenVLForConditionalGeneration
from trainers.completion_layout import tree_layout
from trainers.completion_logps import add_completion_head
from trainers.tree_attention import BLOCKS, tree_mask

IMAGE_ID, START_ID, END_ID = 90, 91, 92
TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TEXTS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TEXT, head_dim=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**TEXT, sliding_window=23)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=23, layer_types=["sliding_attention", "full_attention"])
    ),
    "mpt": lambda: MptForCausalLM(MptConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4)),
    "minimax": lambda: MiniMaxForCausalLM(
        MiniMaxConfig(**TEXT, head_dim=8, num_local_experts=2, layer_types=["linear_attention", "full_attention"])
    ),
}


def composed(text):
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = QwenVLForConditionalGeneration.from_vision_text_pretrained(
        CLIPVisionModel(vision), TEXTS[text](), adapter="linear"
    )
    model.config.image_token_id, model.config.image_start_token_id, model.config.image_end_token_id = 90, 91, 92
    return model


def batch_of(family):
    """Two prompts of 13 and 7 tokens, the first with a picture, and two answers each, of 5, 4, 2 and 6 tokens."""
    generator = torch.Generator().manual_seed(3)

    def text(length):
        return torch.randint(3, IMAGE_ID, (length,), generator=generator)

    picture = torch.tensor([START_ID, *[IMAGE_ID] * 4, END_ID])
    prompts = [torch.cat([text(4), picture, text(3)]), text(7)]
    rows = [torch.cat([prompts[group], text(length)]) for group, length in ((0, 5), (0, 4), (1, 2), (1, 6))]
    labels = [row.clone() for row in rows]
    for row, group in zip(labels, (0, 0, 1, 1), strict=True):
        row[: len(prompts[group])] = -100
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": pad(rows, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
        "group_of_row": torch.tensor([0, 0, 1, 1]),
        "num_pictures": torch.tensor([1, 0]),
    }
    if family == "qwen2_5_vl":
        grid = torch.tensor([[1, 4, 4]])
        return batch | {"pixel_values": torch.randn(16, 24, generator=generator), "image_grid_thw": grid}
    return batch | {"pixel_values": torch.randn(1, 3, 8, 8, generator=generator)}


def logps_of(model, batch, layout):
    add_completion_head(model, layout)
    return model(**batch, fused_lm_head=True).log_probs


@pytest.fixture
def flex_on_a_cpu(monkeypatch):
    """Flex attention as its mathematics say, uncompiled, with the backward pass that torch has for debugging.

    On CPUs torch refuses to learn (its kernels there have no backward pass); without that check, uncompiled, it can.
    """
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    with torch.compiler.set_stance("force_eager"):
        yield


# torch advises against what the fixture does.
uncompiled = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


@uncompiled
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen_vl", "flex_attention"),
        ("clip_qwen2", "flex_attention"),
        ("qwen2_5_vl", BLOCKS),
        ("qwen3_vl", BLOCKS),
    ],
)
def test_under_flex_attention_log_probabilities_and_gradients_are_those_of_the_dense_mask(
    build, flex_on_a_cpu, monkeypatch, family, name
):
    batch = batch_of("qwen2_5_vl" if family == "qwen3_vl" else family)
    calls = []
    forward = flex_attention.flex_attention_hop
    monkeypatch.setattr(flex_attention, "flex_attention_hop", lambda *args: calls.append(1) or forward(*args))
    found = []
    for attention in ("sdpa", name):
        model = build(family)
        model.set_attn_implementation({"text_config": attention})
        logps = logps_of(model, batch, "tree")
        (logps * torch.linspace(-1, 2, logps.shape[1])).sum().backward()
        found.append((logps, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        assert len(calls) == (2 if attention == name else 0)  # one for each layer
    (dense, dense_gradients), (flex, flex_gradients) = found
    torch.testing.assert_close(flex, dense, atol=1e-5, rtol=0)
    assert flex_gradients.keys() == dense_gradients.keys()
    assert any("visual" in name for name in flex_gradients)
    for parameter, gradient in dense_gradients.items():
        torch.testing.assert_close(flex_gradients[parameter], gradient, atol=1e-5, rtol=1e-5, msg=parameter)


def test_a_block_mask_leaves_out_the_blocks_that_nobody_sees(build):
    """Of 5 x 5 blocks of 128 tokens: a prompt of one block, and two answers of two."""
    model = build("qwen_vl")
    model.set_attn_implementation({"text_config": "flex_attention"})
    ids = torch.full((2, 128 + 257), 7)
    labels = ids.clone()
    labels[:, :128] = -100
    mask = tree_mask(model, tree_layout(ids, torch.ones_like(ids), labels, torch.tensor([0, 0])))
    assert isinstance(mask, BlockMask)
    assert mask.shape == (1, 1, 640, 640)
    seen = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]
    assert mask.to_dense()[0, 0].tolist() == seen


@pytest.mark.parametrize("text", ["gpt2", "qwen3"])
def test_a_tree_equals_rows_where_the_language_model_takes_positions_and_masks(text):
    model, batch = composed(text), batch_of(text)
    torch.testing.assert_close(logps_of(model, batch, "tree"), logps_of(model, batch, "rows"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("text", ["mistral", "gemma3"])
def test_a_window_takes_trees_that_fit_into_it_and_refuses_longer_ones(text):
    """The longer tree has 13 + 4 + 3 = 20 tokens."""
    model, batch = composed(text), batch_of(text)
    expected = logps_of(model, batch, "rows")
    torch.testing.assert_close(logps_of(model, batch, "tree"), expected, atol=1e-5, rtol=0)
    model.config.text_config.sliding_window = 19
    with pytest.raises(ValueError, match=r"20 tokens is longer than sliding_window = 19.*choose the layout 'rows'"):
        logps_of(model, batch, "tree")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mpt", "MptModel has an attention of its own"),
        ("minimax", r"MiniMaxModel has layers that are no attention over the whole row \(linear_attention\)"),
    ],
)
def test_models_that_count_places_in_the_row_are_refused_as_trees_before_anything_runs(text, message):
    with pytest.raises(ValueError, match=message):
        add_completion_head(composed(text), "tree")
    add_completion_head(composed(text), "rows")
