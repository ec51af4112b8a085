"""Optimizer groups: who learns how fast, and whose weights decay."""

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model

from trainers.families import find_parts
from trainers.freezing import TrainedParts, freeze
from trainers.optimizer import LearningRates, decaying_parameters, keep_embeddings_in_32_bits, parameter_groups
from trainers.stages import MULTITASK, PRETRAIN, SFT


def settings_by_name(model, rates: LearningRates) -> dict[str, tuple[float, float]]:
    """Parameter name -> (learning rate, weight decay)."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, rates, weight_decay=0.05)
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


@pytest.mark.parametrize("stage", [PRETRAIN, MULTITASK, SFT], ids=lambda stage: stage.name)
def test_every_trainable_parameter_is_in_exactly_one_group(family, build, stage):
    model = build(family)
    freeze(model, TrainedParts(stage.parts))
    grouped = [id(p) for group in parameter_groups(model, LearningRates(1.0), 0.05) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_each_part_learns_at_its_own_rate(family, build):
    model = build(family)
    freeze(model, TrainedParts(MULTITASK.parts))
    rates = LearningRates(base=7.0, tower=2.0, adapter=3.0, embeddings=5.0, tower_layer_decay=1.0)
    found = settings_by_name(model, rates)
    part_of = find_parts(model).part_of
    expected = {"tower": 2.0, "adapter": 3.0, "embeddings": 5.0, "language_model": 7.0}
    assert {name: lr for name, (lr, _) in found.items()} == {name: expected[part_of[name]] for name in found}


def test_a_part_without_a_rate_has_the_language_models(build):
    model = build("qwen_vl")
    freeze(model, TrainedParts(MULTITASK.parts))
    assert {lr for lr, _ in settings_by_name(model, LearningRates(base=7.0, tower_layer_decay=1.0)).values()} == {7.0}


def test_a_rate_of_zero_is_a_rate():
    assert LearningRates(base=7.0, adapter=0.0).of_part("adapter") == 0.0


def test_each_block_of_the_tower_learns_half_as_fast_as_the_next(build):
    model = build("llava")
    freeze(model, TrainedParts(PRETRAIN.parts))
    found = settings_by_name(model, LearningRates(base=8.0, tower_layer_decay=0.5))
    tower = "model.vision_tower"
    assert [found[f"{tower}.encoder.layers.{i}.mlp.fc1.weight"][0] for i in range(3)] == [2.0, 4.0, 8.0]
    assert found[f"{tower}.post_layernorm.weight"][0] == 8.0
    assert found[f"{tower}.embeddings.patch_embedding.weight"][0] == 1.0
    assert found[f"{tower}.pre_layrnorm.weight"][0] == 1.0
    assert found["model.multi_modal_projector.linear_1.weight"][0] == 8.0


def test_the_stem_can_learn_as_fast_as_the_first_block(build):
    model = build("qwen_vl")
    freeze(model, TrainedParts(PRETRAIN.parts))
    found = settings_by_name(model, LearningRates(base=8.0, tower_layer_decay=0.5, stem_extra_step=False))
    assert found["model.visual.position_embedding"][0] == found["model.visual.layers.0.norm1.weight"][0] == 2.0


def test_merger_layers_inside_the_towers_module_do_not_decay_with_its_depth(build):
    model = build("qwen3_vl")
    freeze(model, TrainedParts(PRETRAIN.parts))
    found = settings_by_name(model, LearningRates(base=8.0, tower_layer_decay=0.5))
    assert found["model.visual.deepstack_merger_list.0.linear_fc1.weight"][0] == 8.0
    assert found["model.visual.merger.linear_fc1.weight"][0] == 8.0


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen_vl", "model.adapter.query"),
        ("qwen_vl", "model.adapter.ln_q.weight"),
        ("qwen_vl", "model.adapter.out_proj.bias"),
        ("qwen_vl", "model.visual.position_embedding"),
        ("qwen_vl", "model.visual.pre_norm.weight"),
        ("qwen_vl", "model.language_model.layers.0.input_layernorm.weight"),  # RMSNorm, no nn.LayerNorm
        ("qwen2_5_vl", "model.visual.merger.ln_q.weight"),  # RMSNorm under a name that transformers' rule misses
        ("qwen3_vl", "model.visual.pos_embed.weight"),  # a position table that is an nn.Embedding
        ("llava", "model.vision_tower.embeddings.position_embedding.weight"),
        ("llava", "model.vision_tower.embeddings.class_embedding"),
    ],
)
def test_these_do_not_decay(family, name, build):
    model = build(family)
    freeze(model, TrainedParts(MULTITASK.parts))
    assert settings_by_name(model, LearningRates(1.0))[name][1] == 0.0


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen_vl", "model.adapter.proj.weight"),
        ("qwen_vl", "model.adapter.kv_proj.weight"),
        ("qwen_vl", "model.visual.patch_embedding.weight"),  # convolution in 2 dimensions
        ("qwen2_5_vl", "model.visual.patch_embed.proj.weight"),  # and in 3
        ("qwen2_5_vl", "model.visual.blocks.0.attn.qkv.weight"),
        ("qwen2_5_vl", "model.language_model.embed_tokens.weight"),
        ("qwen2_5_vl", "lm_head.weight"),
        ("llava", "model.vision_tower.encoder.layers.1.mlp.fc2.weight"),
    ],
)
def test_these_decay(family, name, build):
    model = build(family)
    freeze(model, TrainedParts(MULTITASK.parts))
    assert settings_by_name(model, LearningRates(1.0))[name][1] == 0.05


def test_a_linear_layer_called_norm_decays_and_a_norm_called_linear_does_not(build):
    """By type: names decide nothing."""
    model = build("llava")
    projector = model.model.multi_modal_projector
    projector.norm = torch.nn.Linear(3, 5)
    projector.linear = type("HouseMadeRMSNorm", (torch.nn.RMSNorm,), {})(7)
    projector.attention = torch.nn.MultiheadAttention(6, 2)
    decaying = {name for name in decaying_parameters(find_parts(model)) if "multi_modal_projector" in name}
    prefix = "model.multi_modal_projector"
    assert decaying == {
        f"{prefix}.linear_1.weight",
        f"{prefix}.linear_2.weight",
        f"{prefix}.norm.weight",
        f"{prefix}.attention.in_proj_weight",
        f"{prefix}.attention.out_proj.weight",
    }


def test_lora_matrices_decay_and_nothing_frozen_is_grouped(build):
    model = get_peft_model(build("qwen2_5_vl"), LoraConfig(r=2, target_modules=["q_proj"]))
    freeze(model, TrainedParts(SFT.parts))
    groups = parameter_groups(model, LearningRates(1.0), weight_decay=0.05)
    assert [(group["name"], group["weight_decay"], len(group["params"])) for group in groups] == [
        ("language_model, decay", 0.05, 4)  # A and B in each of 2 layers
    ]


def test_an_embedding_that_peft_trains_whole_decays_like_any_other(build):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = get_peft_model(build("qwen2_5_vl"), config)
    freeze(model, TrainedParts(("embeddings",)))
    assert [group["name"] for group in parameter_groups(model, LearningRates(1.0), 0.05)] == ["embeddings, decay"]


@pytest.mark.parametrize("part", ["tower", "adapter", "embeddings"])
def test_a_rate_for_a_part_that_does_not_train_is_refused(build, part):
    model = build("qwen_vl")
    freeze(model, TrainedParts(("language_model",)))
    with pytest.raises(ValueError, match=f"A learning rate is given for the {part} \\(0.5\\), but nothing of it"):
        parameter_groups(model, LearningRates(1.0, **{part: 0.5}), weight_decay=0.0)


def test_groups_have_names_that_say_what_they_hold(build):
    model = build("qwen_vl")
    freeze(model, TrainedParts(("tower", "embeddings"), last_tower_blocks=1))
    assert [group["name"] for group in parameter_groups(model, LearningRates(1.0), 0.05)] == [
        "tower 3, no decay",
        "tower 3, decay",
        "embeddings, decay",
    ]


def test_the_examples_in_the_docstrings_are_true(build):
    rates = LearningRates(base=1.0, tower_layer_decay=0.5)
    assert [rates.of_depth(depth, num_blocks=3) for depth in range(5)] == [0.125, 0.25, 0.5, 1.0, 1.0]
    model = build("llava")
    freeze(model, TrainedParts(("adapter",)))
    names = [group["name"] for group in parameter_groups(model, LearningRates(1e-5), weight_decay=0.05)]
    assert names == ["adapter, decay", "adapter, no decay"]


def test_eight_bit_optimizers_keep_the_states_of_embeddings_in_32_bits(build):
    model = build("qwen3_vl")
    keep_embeddings_in_32_bits(model)
    overridden = bitsandbytes.optim.GlobalOptimManager.get_instance().module_weight_config_triple
    embeddings = {model.model.language_model.embed_tokens, model.model.visual.pos_embed}
    assert {module for module, *_ in overridden} >= embeddings
    assert all(config == {"optim_bits": 32} for _, _, config in overridden)
