"""The table of families finds every parameter's part, bare or inside PEFT."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trainers.families import FAMILIES, PARTS, find_parts

# One parameter of every part, per family.
EXAMPLES = {
    "qwen_vl": {
        "model.visual.position_embedding": "tower",
        "model.visual.layers.2.mlp.fc2.bias": "tower",
        "model.adapter.query": "adapter",
        "model.adapter.ln_post.weight": "adapter",
        "model.adapter.proj.weight": "adapter",
        "model.language_model.norm.weight": "language_model",
    },
    "qwen2_vl": {
        "model.visual.patch_embed.proj.weight": "tower",
        "model.visual.merger.ln_q.bias": "adapter",
        "model.language_model.layers.1.mlp.up_proj.weight": "language_model",
    },
    "qwen2_5_vl": {
        "model.visual.blocks.0.norm1.weight": "tower",
        "model.visual.merger.mlp.2.weight": "adapter",
        "model.language_model.norm.weight": "language_model",
    },
    "qwen3_vl": {
        "model.visual.pos_embed.weight": "tower",
        "model.visual.merger.linear_fc2.weight": "adapter",
        "model.visual.deepstack_merger_list.1.norm.bias": "adapter",
        "model.language_model.layers.0.self_attn.q_norm.weight": "language_model",
    },
    "llava": {
        "model.vision_tower.post_layernorm.weight": "tower",
        "model.multi_modal_projector.linear_2.bias": "adapter",
        "model.language_model.layers.0.mlp.gate_proj.weight": "language_model",
    },
}


def test_each_parameter_is_in_the_part_it_belongs_to(family, build):
    parts = find_parts(build(family))
    expected = EXAMPLES[family] | {
        "model.language_model.embed_tokens.weight": "embeddings",
        "lm_head.weight": "embeddings",
    }
    assert {name: parts.part_of[name] for name in expected} == expected


def test_the_parts_have_all_parameters_between_them_and_none_twice(family, build):
    model = build(family)
    parts = find_parts(model)
    names = [name for part in PARTS for name, _ in parts.parameters(part)]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_the_towers_blocks_are_found_by_type(family, build):
    parts = find_parts(build(family))
    assert len(parts.blocks) == 3
    assert parts.block_of(f"{parts.blocks_path}.2.anything.weight") == 2
    assert parts.block_of("lm_head.weight") is None


def test_lora_layers_belong_to_the_part_they_sit_in(family, build):
    model = get_peft_model(build(family), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    parts = find_parts(model)
    assert parts.base is model.get_base_model()
    added = {name: part for name, part in parts.part_of.items() if "lora" in name or "modules_to_save" in name}
    expected = {"language_model", "embeddings"}
    # CLIP's and Qwen-VL's own projections are called q_proj as well: the trap that targets by part avoid.
    expected |= {"llava": {"tower"}, "qwen_vl": {"adapter"}}.get(family, set())
    assert set(added.values()) == expected


def test_a_tied_head_is_one_parameter_of_the_embeddings(build):
    model = build("qwen2_5_vl")
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    names = [name for name, _ in find_parts(model).parameters("embeddings")]
    assert names == ["model.language_model.embed_tokens.weight"]


def test_a_subclass_is_of_its_parents_family(build):
    model = build("qwen2_5_vl")
    model.__class__ = type("MyModel", (type(model),), {})
    assert find_parts(model).family is FAMILIES["Qwen2_5_VLForConditionalGeneration"]


def test_an_unknown_class_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"Linear is not in the table of families. Known: QwenVLFor.*Qwen3VLFor"):
        find_parts(torch.nn.Linear(2, 3))


def test_a_parameter_outside_every_part_is_refused_by_name(build):
    model = build("qwen2_5_vl")
    model.temperature = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"The parameter temperature of Qwen2_5_VL.* lies outside"):
        find_parts(model)


def test_the_modules_of_a_part_hold_its_parameters(family, build):
    parts = find_parts(build(family))
    for part in PARTS:
        held = {id(p) for module in parts.modules(part) for p in module.parameters()}
        assert {id(p) for _, p in parts.parameters(part)} <= held


def test_only_the_sincos_table_of_qwen_vl_is_a_constant(family, build):
    expected = {"model.adapter.positions.table"} if family == "qwen_vl" else set()
    assert find_parts(build(family)).constants == expected
