"""What `freeze` sets, shows, checks, and what a frozen part costs."""

from collections import Counter
from io import StringIO

import pytest
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from trainers.families import PARTS, find_parts
from trainers.freezing import TrainedParts, freeze, tower_depths
from trainers.loss import supervised_loss
from trainers.stages import MULTITASK, PRETRAIN, SFT


def trained_names(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("stage", [PRETRAIN, MULTITASK, SFT], ids=lambda stage: stage.name)
def test_a_stage_trains_its_parts_and_nothing_else(family, build, stage):
    model = build(family)
    freeze(model, TrainedParts(stage.parts))
    parts = find_parts(model)
    expected = {name for part in stage.parts for name, _ in parts.parameters(part)} - parts.constants
    assert trained_names(model) == expected


def test_the_stages_train_what_the_paper_says():
    assert set(PRETRAIN.parts) == {"tower", "adapter"}
    assert set(MULTITASK.parts) == set(PARTS)
    assert set(SFT.parts) == set(PARTS) - {"tower"}
    assert [stage.resolution for stage in (PRETRAIN, MULTITASK, SFT)] == [224, 448, 448]


def test_a_later_stage_thaws_what_an_earlier_one_froze(build):
    model = build("qwen_vl")
    freeze(model, TrainedParts(PRETRAIN.parts))
    freeze(model, TrainedParts(MULTITASK.parts))
    assert len(trained_names(model)) == len(list(model.parameters())) - 1  # the sincos table


def test_the_last_blocks_of_the_tower_train_with_what_follows_them(build):
    model = build("llava")
    freeze(model, TrainedParts(("tower",), last_tower_blocks=1))
    trained = trained_names(model)
    assert all(".layers.2." in name or "post_layernorm" in name for name in trained)
    assert len(trained) == 16 + 2  # a CLIP block has 4 projections, 2 norms and 2 layers, with biases; the norm after


def test_the_last_of_all_blocks_is_not_the_stem(build):
    model = build("llava")
    freeze(model, TrainedParts(("tower",), last_tower_blocks=3))
    assert "model.vision_tower.embeddings.class_embedding" not in trained_names(model)
    assert "model.vision_tower.encoder.layers.0.layer_norm1.weight" in trained_names(model)


@pytest.mark.parametrize("count", [0, 4])
def test_more_blocks_than_there_are_is_refused(build, count):
    with pytest.raises(ValueError, match=f"last_tower_blocks={count}, but the tower has 3 blocks: give 1 to 3"):
        freeze(build("qwen_vl"), TrainedParts(("tower",), last_tower_blocks=count))


def test_last_blocks_of_a_tower_that_does_not_train_are_refused():
    with pytest.raises(ValueError, match="last_tower_blocks=2, but the tower is not among"):
        TrainedParts(("adapter",), last_tower_blocks=2)


def test_a_pattern_freezes_what_it_finds(build):
    model = build("qwen2_5_vl")
    freeze(model, TrainedParts(("language_model",), frozen_patterns=(r"layers\.0\.",)))
    assert not any("layers.0." in name for name in trained_names(model))
    assert any("layers.1." in name for name in trained_names(model))


@pytest.mark.parametrize("pattern", ["laiers", "visual"])
def test_a_pattern_that_freezes_nothing_more_is_refused(build, pattern):
    with pytest.raises(ValueError, match=f"The freeze pattern '{pattern}' finds no parameter that would train"):
        freeze(build("qwen2_5_vl"), TrainedParts(("language_model",), frozen_patterns=(pattern,)))


@pytest.mark.parametrize("parts", [(), ("merger",)])
def test_unknown_parts_and_none_at_all_are_refused(parts):
    with pytest.raises(ValueError, match="give at least one of tower, adapter, language_model, embeddings"):
        TrainedParts(parts)


def test_of_a_peft_model_only_what_peft_trains_can_train(build):
    model = get_peft_model(build("qwen2_5_vl"), LoraConfig(r=2, target_modules=["q_proj", "gate_proj"]))
    frozen = freeze(model, TrainedParts(SFT.parts))
    assert all("lora" in name for name in trained_names(model))
    # gate_proj is in the tower's blocks too, which stage 3 keeps frozen.
    assert not any("visual" in name for name in trained_names(model))
    assert frozen.count("adapter")[0] == frozen.count("tower")[0] == 0 < frozen.count("language_model")[0]


def test_a_peft_model_without_weights_in_the_stages_parts_is_refused(build):
    model = get_peft_model(build("qwen2_5_vl"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"Nothing of Qwen2_5_VL.* is left to train"):
        freeze(model, TrainedParts(PRETRAIN.parts))


def test_the_table_counts_trained_and_frozen_parameters(build):
    model = build("qwen_vl")
    console = Console(file=StringIO(), width=100)
    console.print(freeze(model, TrainedParts(PRETRAIN.parts)).table("what trains"))
    lines = {line.split()[1]: line for line in console.file.getvalue().splitlines() if line.startswith("│")}
    total = sum(p.numel() for p in model.parameters())
    assert f"{total:,}" in lines["all"]
    embeddings = 2 * 97 * 32
    assert [cell.strip() for cell in lines["embeddings"].split("│")[2:5]] == [
        f"{embeddings:,}",
        "0",
        f"{embeddings:,}",
    ]
    # The sincos table of 4 queries x 32 stays frozen in an adapter that trains.
    assert lines["adapter"].split("│")[4].strip() == str(4 * 32)


# Depths of the tower


def test_depth_counts_from_the_stem_through_the_blocks_to_the_final_norm(build):
    depths = tower_depths(find_parts(build("llava")))
    assert depths["model.vision_tower.embeddings.position_embedding.weight"] == 0
    assert depths["model.vision_tower.pre_layrnorm.bias"] == 0
    assert depths["model.vision_tower.encoder.layers.0.layer_norm1.weight"] == 1
    assert depths["model.vision_tower.encoder.layers.2.layer_norm1.weight"] == 3
    assert depths["model.vision_tower.post_layernorm.weight"] == 4


def test_the_stem_of_qwen_vl_has_depth_zero(build):
    depths = tower_depths(find_parts(build("qwen_vl")))
    assert {name for name, depth in depths.items() if depth == 0} == {
        "model.visual.position_embedding",
        "model.visual.patch_embedding.weight",
        "model.visual.pre_norm.weight",
        "model.visual.pre_norm.bias",
    }
    assert max(depths.values()) == 3  # no norm after the last block


# The check after the first step


def backward(model, batch) -> None:
    model.zero_grad()
    supervised_loss(model, batch)[0].backward()


def test_the_check_passes_when_the_right_parts_got_gradients(family, build, make_rows, collate):
    model = build(family)
    frozen = freeze(model, TrainedParts(PRETRAIN.parts))
    backward(model, collate(make_rows(family, 2)))
    assert frozen.check_gradients(saw_pictures=True)


def test_a_trained_part_without_gradient_is_an_error(build, make_rows, collate):
    model = build("qwen2_5_vl")
    frozen = freeze(model, TrainedParts(MULTITASK.parts))
    backward(model, collate(make_rows("qwen2_5_vl", 2, pictures=0)))
    with pytest.raises(RuntimeError, match=r"The tower should train .* not connected to the loss"):
        frozen.check_gradients(saw_pictures=True)


def test_a_gradient_of_zero_is_no_gradient(build, make_rows, collate):
    model = build("qwen2_5_vl")
    frozen = freeze(model, TrainedParts(("adapter",)))
    backward(model, collate(make_rows("qwen2_5_vl", 2)))
    for p in model.parameters():
        if p.grad is not None:
            p.grad.zero_()
    with pytest.raises(RuntimeError, match="The adapter should train"):
        frozen.check_gradients(saw_pictures=True)


def test_tower_and_adapter_wait_for_the_first_step_with_pictures(build, make_rows, collate):
    model = build("qwen2_5_vl")
    frozen = freeze(model, TrainedParts(MULTITASK.parts))
    backward(model, collate(make_rows("qwen2_5_vl", 2, pictures=0)))
    assert not frozen.check_gradients(saw_pictures=False)
    backward(model, collate(make_rows("qwen2_5_vl", 2)))
    assert frozen.check_gradients(saw_pictures=True)


def test_the_language_model_does_not_wait_for_pictures(build):
    model = build("qwen2_5_vl")
    frozen = freeze(model, TrainedParts(("adapter", "language_model")))
    model.zero_grad()  # no backward pass at all
    with pytest.raises(RuntimeError, match="The language_model should train"):
        frozen.check_gradients(saw_pictures=False)


def test_a_frozen_parameter_that_somebody_thawed_is_an_error(build, make_rows, collate):
    model = build("qwen2_5_vl")
    frozen = freeze(model, TrainedParts(SFT.parts))
    model.model.visual.blocks[0].norm1.weight.requires_grad_(True)
    backward(model, collate(make_rows("qwen2_5_vl", 2)))
    with pytest.raises(RuntimeError, match=r"visual.blocks.0.norm1.weight is frozen but has a gradient"):
        frozen.check_gradients(saw_pictures=True)


# What a frozen part costs


class BlockCalls:
    """Counts forward calls of layers and remembers whether their outputs had a graph."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self.calls: Counter[int] = Counter()
        self.graphs: set[bool] = set()
        for index, layer in enumerate(layers):
            # Hooks would not run again in the backward pass: checkpointing replays `forward` only.
            first = next(module for module in layer.modules() if isinstance(module, nn.Linear))
            first.register_forward_hook(self.counting(index))

    def counting(self, index: int):
        def count(module, args, output):
            self.calls[index] += 1
            self.graphs.add(output.requires_grad)

        return count


def decoder_layers(model) -> list[nn.Module]:
    modules = find_parts(model).modules("language_model")[0].modules()
    return [module for module in modules if isinstance(module, GradientCheckpointingLayer)]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_frozen_tower_runs_once_without_graph_and_in_eval_mode(family, build, make_rows, collate, checkpointing):
    model = build(family)
    frozen = freeze(model, TrainedParts(SFT.parts))
    if checkpointing:
        model.activation_checkpointing_enable()
    blocks = BlockCalls(list(frozen.parts.blocks))
    model.train()
    frozen.set_modes()
    with frozen.tower_without_graph():
        backward(model, collate(make_rows(family, 2)))
    assert blocks.calls == {0: 1, 1: 1, 2: 1}
    assert blocks.graphs == {False}
    assert not any(block.training for block in frozen.parts.blocks)
    assert frozen.check_gradients(saw_pictures=True)  # the adapter, inside the tower's module or not, still learns


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "llava"])
def test_without_the_context_transformers_builds_a_graph_in_the_frozen_tower(family, build, make_rows, collate):
    """The fault that `tower_without_graph` is for; when this fails, transformers has mended it."""
    model = build(family)
    frozen = freeze(model, TrainedParts(SFT.parts))
    model.activation_checkpointing_enable()
    blocks = BlockCalls(list(frozen.parts.blocks))
    model.train()
    backward(model, collate(make_rows(family, 2)))
    assert blocks.calls[0] == 2
    assert blocks.graphs == {True}


def test_only_the_last_blocks_that_train_have_a_graph(family, build, make_rows, collate):
    model = build(family)
    frozen = freeze(model, TrainedParts(("tower",), last_tower_blocks=1))
    model.activation_checkpointing_enable()
    first, last = BlockCalls(list(frozen.parts.blocks[:2])), BlockCalls([frozen.parts.blocks[2]])
    model.train()
    frozen.set_modes()
    with frozen.tower_without_graph():
        backward(model, collate(make_rows(family, 2)))
    assert first.calls == {0: 1, 1: 1}
    assert first.graphs == {False}
    assert last.calls == {0: 2}  # once more in the backward pass: it is checkpointed
    assert frozen.check_gradients(saw_pictures=True)


def test_a_tower_that_trains_is_left_alone(family, build, make_rows, collate):
    model = build(family)
    frozen = freeze(model, TrainedParts(PRETRAIN.parts))
    model.train()
    frozen.set_modes()
    with frozen.tower_without_graph():
        backward(model, collate(make_rows(family, 2)))
    stem = [name for name, depth in tower_depths(frozen.parts).items() if depth == 0]
    assert all(model.get_parameter(name).grad is not None for name in stem)


def test_a_stem_that_trains_in_front_of_a_frozen_block_still_gets_its_gradient(build, make_rows, collate):
    model = build("qwen2_5_vl")
    frozen = freeze(model, TrainedParts(("tower",), frozen_patterns=(r"blocks\.0\.",)))
    with frozen.tower_without_graph():
        backward(model, collate(make_rows("qwen2_5_vl", 2)))
    assert model.model.visual.patch_embed.proj.weight.grad is not None


def test_the_hook_is_gone_after_the_context(build):
    model = build("qwen2_5_vl")
    frozen = freeze(model, TrainedParts(SFT.parts))
    with frozen.tower_without_graph():
        assert len(model.model.visual.blocks[0]._forward_pre_hooks) == 1
    assert len(model.model.visual.blocks[0]._forward_pre_hooks) == 0


def test_a_frozen_language_model_is_in_eval_mode_yet_checkpointed_where_gradients_pass(
    family, build, make_rows, collate
):
    model = build(family)
    frozen = freeze(model, TrainedParts(PRETRAIN.parts))
    model.activation_checkpointing_enable()
    layers = decoder_layers(model)
    calls = BlockCalls(layers)
    model.train()
    frozen.set_modes()
    with frozen.tower_without_graph():
        backward(model, collate(make_rows(family, 2)))
    assert calls.calls == {0: 2, 1: 2}
    assert all(layer.training for layer in layers)
    assert not any(child.training for layer in layers for child in layer.children())


def test_without_checkpointing_a_frozen_language_model_is_in_eval_mode_altogether(build):
    model = build("qwen2_5_vl").train()
    freeze(model, TrainedParts(PRETRAIN.parts)).set_modes()
    assert not any(module.training for module in model.model.language_model.modules())
    assert model.model.visual.blocks[0].training
    assert model.training
