"""LoRA by part, trained parts beside it, 4 bits for the language model alone, and a reload that loses nothing."""

import pytest
import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText

from trainers.families import PARTS, embedding_modules, find_parts, unwrap
from trainers.freezing import TrainedParts, freeze
from trainers.lora import (
    add_lora,
    check_quantized,
    load_lora,
    make_room,
    quantization_config,
    target_modules,
    whole_modules,
)
from trainers.loss import supervised_loss
from trainers.recipes import (
    AdapterSection,
    EmbeddingsSection,
    HardwareSection,
    LanguageModelSection,
    LoraSection,
    ModelSection,
    OptimizerSection,
    PartsSection,
    Recipe,
    TowerSection,
)

NEW_TOKENS = (83, 89)


def lora_recipe(tower="frozen", adapter="frozen", embeddings="frozen", dtype="float32", **lora) -> Recipe:
    return Recipe(
        name="test",
        stage="sft",
        model=ModelSection(dtype=dtype, new_tokens=("<a>", "<b>") if embeddings == "new_tokens" else ()),
        parts=PartsSection(
            tower=TowerSection(train=tower),
            adapter=AdapterSection(train=adapter),
            language_model=LanguageModelSection(train="lora"),
            embeddings=EmbeddingsSection(train=embeddings),
        ),
        lora=LoraSection(rank=3, alpha=7.0, **{"dropout": 0.0, **lora}),
        optimizer=OptimizerSection(max_steps=1),
        hardware=HardwareSection(precision="float32" if dtype == "float32" else "bfloat16"),
    )


def lora_paths(model):
    return {path for path, module in unwrap(model).named_modules() if isinstance(module, LoraLayer)}


def take_steps(model, batch, steps=2):
    """A few large steps, so that every trained tensor differs clearly from where it began."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for _ in range(steps):
        loss, _ = supervised_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def logits(model, batch):
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()


def test_lora_goes_into_the_language_model_only_although_the_tower_has_layers_of_the_same_names(build):
    model = build("qwen2_5_vl")
    assert any("visual" in path and path.endswith("gate_proj") for path, _ in model.named_modules())
    paths = lora_paths(add_lora(model, lora_recipe()))
    assert len(paths) == 2 * 7  # two layers of q, k, v, o, gate, up, down
    assert all(path.startswith("model.language_model.layers.") for path in paths)


def test_each_part_can_have_lora_and_no_linear_layer_of_it_is_left_out(build, family):
    model = build(family)
    part_of = find_parts(model).part_of
    for part in ("tower", "adapter", "language_model"):
        linear = {
            path
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and part_of[f"{path}.weight"] == part
        }
        assert linear
        assert set(target_modules(model, [part])) == linear
    recipe = lora_recipe(tower="lora", adapter="lora")
    everywhere = set(target_modules(model, ["tower", "adapter", "language_model"]))
    assert lora_paths(add_lora(model, recipe)) == everywhere


def test_only_the_named_layers_get_lora(build):
    paths = lora_paths(add_lora(build("qwen2_vl"), lora_recipe(targets=("q_proj", "v_proj"))))
    assert {path.rsplit(".", 1)[1] for path in paths} == {"q_proj", "v_proj"}
    assert len(paths) == 4


def test_a_target_that_fits_nothing_is_refused_with_the_names_there_are(build):
    with pytest.raises(ValueError, match=r"c_attn fit nothing in language_model of Qwen2VL.*down_proj, gate_proj"):
        add_lora(build("qwen2_vl"), lora_recipe(targets=("q_proj", "c_attn")))


def test_a_layer_that_multihead_attention_never_calls_is_no_target():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.linear = nn.Linear(8, 8)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Tower()

    model = Model()
    parts = type("Parts", (), {"part_of": {name: "tower" for name, _ in model.named_parameters()}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainers.lora.find_parts", lambda _: parts)
        assert set(target_modules(model, ["tower"])) == {"model.linear"}


def test_a_dropout_of_zero_stays_zero_and_another_is_kept(build):
    for dropout in (0.0, 0.25):
        model = add_lora(build("qwen2_vl"), lora_recipe(dropout=dropout))
        layers = [module for module in unwrap(model).modules() if isinstance(module, LoraLayer)]
        found = {getattr(layer.lora_dropout["default"], "p", 0.0) for layer in layers}
        assert found == {dropout}


def test_lora_starts_as_the_base_and_scales_its_update_by_alpha_over_rank(build, make_rows, collate):
    batch = collate(make_rows("qwen2_vl", 2))
    model = build("qwen2_vl")
    before = logits(model, batch)
    model = add_lora(model, lora_recipe())
    torch.testing.assert_close(logits(model, batch), before)
    layer = model.get_submodule("base_model.model.model.language_model.layers.0.self_attn.q_proj")
    assert layer.scaling["default"] == pytest.approx(7 / 3)


def test_dora_trains_a_magnitude_per_output(build):
    model = add_lora(build("qwen2_vl"), lora_recipe(dora=True))
    magnitudes = [p for name, p in model.named_parameters() if "lora_magnitude_vector" in name]
    assert len(magnitudes) == 14
    assert all(p.requires_grad for p in magnitudes)


def test_what_trains_is_float32_beside_a_frozen_bfloat16_base(build):
    model = add_lora(build("qwen2_5_vl").bfloat16(), lora_recipe(adapter="full", dtype="bfloat16"))
    dtypes = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_the_stage_trainer_s_table_counts_lora_and_the_whole_adapter(build, family):
    model = build(family)
    parts = find_parts(model)
    adapter_size = sum(p.numel() for name, p in parts.parameters("adapter") if name not in parts.constants)
    wrapped = add_lora(model, lora_recipe(adapter="full"))
    decided = freeze(wrapped, TrainedParts(("adapter", "language_model")))
    assert decided.count("tower")[0] == 0
    assert decided.count("adapter")[0] == adapter_size
    sizes = [p.numel() for name, p in wrapped.named_parameters() if "lora_" in name]
    assert decided.count("language_model")[0] == sum(sizes) > 0


@pytest.mark.parametrize("embeddings", ["new_tokens", "full"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_reload_in_fresh_objects_gives_the_same_logits_with_every_trained_tensor(
    tmp_path, build, make_rows, collate, family, embeddings, tied
):
    batch = collate(make_rows(family, 2))
    batch["input_ids"][:, -1] = NEW_TOKENS[0]
    batch["labels"][:, -1] = NEW_TOKENS[0]

    def base():
        model = build(family)
        if tied:
            model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = True
            model.tie_weights()
        return model

    untrained = logits(base(), batch)
    model = add_lora(base(), lora_recipe(adapter="full", embeddings=embeddings), NEW_TOKENS)
    trained_names = {name for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    take_steps(model, batch)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    # A bias of keys cannot move: the softmax takes no notice of it. Nor do weights without input.
    assert {name.split(".")[-1] for name in trained_names - moved} <= {"bias"}
    assert moved <= trained_names
    after = logits(model, batch)
    assert (after - untrained).abs().max() > 0.1

    model.save_pretrained(tmp_path)
    again = load_lora(base(), tmp_path)
    torch.testing.assert_close(logits(again, batch), after, rtol=0, atol=0)
    in_adapter = get_peft_model_state_dict(model)
    trained = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    assert {tensor.data_ptr() for tensor in in_adapter.values()} >= trained
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == set(in_adapter)
    assert all(torch.equal(saved[name], in_adapter[name]) for name in saved)


def test_dora_is_reloaded_with_its_magnitudes_beside_a_whole_adapter_and_new_embeddings(
    tmp_path, build, make_rows, collate, family
):
    batch = collate(make_rows(family, 2))
    batch["input_ids"][:, -1] = batch["labels"][:, -1] = NEW_TOKENS[0]
    model = add_lora(build(family), lora_recipe(adapter="full", embeddings="new_tokens", dora=True), NEW_TOKENS)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    take_steps(model, batch)
    moved = {name for name, p in model.named_parameters() if name in start and not torch.equal(p, start[name])}
    for kind in ("lora_A", "lora_B", "lora_magnitude_vector", "modules_to_save", "trainable_tokens_delta"):
        assert any(kind in name for name in moved), kind
    model.save_pretrained(tmp_path)
    again = load_lora(build(family), tmp_path)
    torch.testing.assert_close(logits(again, batch), logits(model, batch), rtol=0, atol=0)
    saved, loaded = dict(model.named_parameters()), dict(again.named_parameters())
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


@pytest.mark.parametrize("tied", [False, True])
def test_whole_embeddings_are_the_table_and_the_head(build, family, tied):
    base = build(family)
    if tied:
        base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = True
        base.tie_weights()
    model = add_lora(base, lora_recipe(embeddings="full"))
    table, head = (module.modules_to_save["default"].weight for module in embedding_modules(unwrap(model)))
    assert table.requires_grad
    assert head.requires_grad
    assert (table is head) == tied


def test_float32_updates_of_a_bfloat16_base_are_reloaded_without_rounding(tmp_path, build):
    model = add_lora(build("qwen2_5_vl").bfloat16(), lora_recipe(adapter="full", dtype="bfloat16"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 1e-4 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path)
    again = load_lora(build("qwen2_5_vl").bfloat16(), tmp_path)
    saved, loaded = get_peft_model_state_dict(model), get_peft_model_state_dict(again)
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    rounded = load_lora(build("qwen2_5_vl").bfloat16(), tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}


def test_an_adapter_folder_that_lacks_a_tensor_or_has_one_too_many_is_refused(tmp_path, build):
    model = add_lora(build("qwen2_vl"), lora_recipe(adapter="full"))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = load_file(path)
    name = next(name for name in whole if "merger" in name)
    save_file({key: value for key, value in whole.items() if key != name}, path)
    with pytest.raises(ValueError, match="1 places get no tensor"):
        load_lora(build("qwen2_vl"), tmp_path)
    save_file({**whole, "base_model.model.model.visual.merger.extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="1 tensors find no place"):
        load_lora(build("qwen2_vl"), tmp_path)


@pytest.mark.parametrize("embeddings", ["new_tokens", "full"])
def test_new_tokens_beyond_the_table_find_room_again_on_reload(tmp_path, build, embeddings):
    model = build("qwen2_vl")
    rows = model.get_input_embeddings().weight.shape[0]
    make_room(model, rows + 2)
    model = add_lora(model, lora_recipe(embeddings=embeddings), (rows, rows + 1))
    model.save_pretrained(tmp_path)
    again = load_lora(build("qwen2_vl"), tmp_path)
    assert again.get_input_embeddings().weight.shape[0] == rows + 2


# 4 bits


@pytest.fixture
def load_quantized(tmp_path, build, family):
    build(family).save_pretrained(tmp_path / "base")

    def load():
        return AutoModelForImageTextToText.from_pretrained(
            tmp_path / "base",
            dtype=torch.float32,
            quantization_config=quantization_config(tmp_path / "base", torch.float32),
            device_map={"": "cpu"},
        )

    return load


@pytest.fixture
def quantized(load_quantized):
    return load_quantized()


def test_four_bits_reach_every_linear_layer_of_the_language_model_and_no_other(quantized):
    from bitsandbytes.nn import Linear4bit

    part_of = find_parts(quantized).part_of
    four_bit = {path for path, module in quantized.named_modules() if isinstance(module, Linear4bit)}
    assert len(four_bit) == 14
    assert {part_of[f"{path}.weight"] for path in four_bit} == {"language_model"}
    for part in ("tower", "adapter", "embeddings"):
        assert {p.dtype for _, p in find_parts(quantized).parameters(part)} == {torch.float32}
    check_quantized(quantized)


def test_a_head_that_is_tied_to_the_embeddings_stays_whole(tmp_path, build, family):
    model = build(family)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    config = quantization_config(tmp_path, torch.float32)
    assert "lm_head" in config.llm_int8_skip_modules
    loaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )
    check_quantized(loaded)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_a_skip_list_that_misses_the_tower_is_noticed(tmp_path, build):
    model = build("qwen2_5_vl")
    model.save_pretrained(tmp_path / "base")
    config = quantization_config(tmp_path / "base", torch.float32)
    config.llm_int8_skip_modules = ["visual", "lm_head"]
    wrong = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "base", dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )
    with pytest.raises(ValueError, match=r"model\.visual\.blocks\.0\.attn\.qkv is Linear4bit, but only"):
        check_quantized(wrong)


def test_qlora_learns_on_the_cpu_and_leaves_frozen_dtypes_alone(tmp_path, quantized, make_rows, collate, family):
    batch = collate(make_rows(family, 2))
    before = {name: p.dtype for name, p in quantized.named_parameters()}
    torch.manual_seed(0)
    model = add_lora(quantized, lora_recipe(adapter="full"))
    after = {name: p.dtype for name, p in unwrap(model).named_parameters() if "lora_" not in name}
    assert all(before[name.replace(".base_layer", "").replace(".original_module", "")] == dtype
               for name, dtype in after.items() if "modules_to_save" not in name)  # fmt: skip
    first, _ = supervised_loss(model, batch)
    take_steps(model, batch, steps=9)
    last, _ = supervised_loss(model, batch)
    assert last < first - 0.1
    model.save_pretrained(tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert not any("quant" in name for name in file.keys())  # noqa: SIM118 -- not a dict


@pytest.mark.parametrize("embeddings", ["new_tokens", "full"])
def test_qlora_is_reloaded_onto_four_bits_with_every_trained_tensor(
    tmp_path, load_quantized, make_rows, collate, family, embeddings
):
    batch = collate(make_rows(family, 2))
    batch["input_ids"][:, -1] = batch["labels"][:, -1] = NEW_TOKENS[0]
    model = add_lora(load_quantized(), lora_recipe(adapter="full", embeddings=embeddings), NEW_TOKENS)
    untrained, _ = supervised_loss(model, batch)
    take_steps(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    again = load_lora(load_quantized(), tmp_path / "adapter")
    trained, loaded = get_peft_model_state_dict(model), get_peft_model_state_dict(again)
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(trained[name], loaded[name]) for name in trained)
    # In training mode: bitsandbytes' CPU kernel for evaluation wants layers of at least 64.
    after, _ = supervised_loss(model.train(), batch)
    reloaded, _ = supervised_loss(again.train(), batch)
    assert reloaded == after
    assert abs(after - untrained) > 0.01


def test_an_evaluation_leaves_a_model_in_four_bits_as_it_was(quantized, make_rows, collate, family):
    # On CPUs with AVX512-BF16, bitsandbytes would pack its layers for inference, for good.
    batch = collate(make_rows(family, 2))
    model = add_lora(quantized, lora_recipe(adapter="full"))
    decided = freeze(model, TrainedParts(PARTS))
    model.train()
    decided.set_modes()
    before, _ = supervised_loss(model, batch)
    model.eval()
    with torch.no_grad():
        supervised_loss(model, batch)
    model.train()
    decided.set_modes()
    after, _ = supervised_loss(model, batch)
    after.backward()
    assert after == before
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


def test_whole_modules_names_members_of_lists_because_peft_cannot_copy_a_list(build):
    assert whole_modules(build("qwen3_vl"), ["adapter"]) == [
        "model.visual.merger",
        "model.visual.deepstack_merger_list.0",
        "model.visual.deepstack_merger_list.1",
    ]
