"""Merging: the same logits in one ordinary folder, and no tensor unaccounted for."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from trainers.lora import add_lora, check_quantized, load_lora, quantization_config
from trainers.loss import supervised_loss
from trainers.merge import merge
from trainers.recipe_reading import load_recipe

NEW_TOKENS = (83, 89)


def recipe(embeddings="frozen", **lora):
    return load_recipe(
        "cpu_demo",
        [
            f"parts={{tower: {{train: lora}}, language_model: {{train: lora}}, embeddings: {{train: {embeddings}}}}}",
            "model.new_tokens=" + ("[a, b]" if embeddings == "new_tokens" else "[]"),
            f"lora={json.dumps({'rank': 3, 'alpha': 7.0, 'dropout': 0.0, **lora})}",
        ],
    )


def train_a_little(model, batch):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        supervised_loss(model, batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits


@pytest.fixture
def trained(tmp_path, build, make_rows, collate):
    """trained(family, ...) -> base folder and adapter folder in tmp_path, the batch, and the logits after training."""

    def _trained(family, dtype=torch.float32, tied=False, quantized=False, **settings):
        batch = collate(make_rows(family, 2))
        model = build(family).to(dtype)
        if tied:
            model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = True
            model.tie_weights()
        model.save_pretrained(tmp_path / "base")
        (tmp_path / "base" / "processor_config.json").write_text('{"from": "base"}')
        quantization = {"quantization_config": quantization_config(tmp_path / "base", dtype)} if quantized else {}
        model = AutoModelForImageTextToText.from_pretrained(
            tmp_path / "base", dtype="auto", device_map={"": "cpu"}, **quantization
        )
        if quantized:
            check_quantized(model)
        model = add_lora(model, recipe(**settings), NEW_TOKENS)
        batch["input_ids"][:, -1] = NEW_TOKENS[0]
        with torch.autocast("cpu", enabled=dtype == torch.bfloat16):
            train_a_little(model, batch)
            # bitsandbytes' CPU kernel for inference wants rows of at least 64.
            after = None if quantized else logits(model, batch)
        model.save_pretrained(tmp_path / "adapter")
        return batch, after

    return _trained


@pytest.mark.parametrize("embeddings", ["frozen", "new_tokens", "full"])
def test_the_merged_model_gives_the_same_logits_without_peft(tmp_path, trained, family, embeddings):
    batch, after = trained(family, embeddings=embeddings)
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, batch), after, rtol=1e-5, atol=2e-5)
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    assert (logits(base, batch) - after).abs().max() > 0.05


@pytest.mark.parametrize("embeddings", ["new_tokens", "full"])
def test_tied_embeddings_stay_tied(tmp_path, trained, embeddings):
    batch, after = trained("qwen2_5_vl", tied=True, embeddings=embeddings)
    report = merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert merged.lm_head.weight.data_ptr() == merged.get_input_embeddings().weight.data_ptr()
    torch.testing.assert_close(logits(merged, batch), after, rtol=1e-5, atol=2e-5)
    assert report.fate["lm_head.weight"] == {"new_tokens": "rows", "full": "replaced"}[embeddings]


def test_dora_merges_too(tmp_path, trained):
    batch, after = trained("qwen2_vl", dora=True)
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, batch), after, rtol=1e-5, atol=2e-5)


def test_every_tensor_has_one_fate_and_untrained_ones_are_bit_identical(tmp_path, trained):
    trained("qwen2_5_vl", embeddings="new_tokens")
    report = merge(tmp_path / "adapter", tmp_path / "merged")
    before = AutoModelForImageTextToText.from_pretrained(tmp_path / "base").state_dict()
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()
    assert report.fate.keys() == before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name, kind in report.fate.items() if kind != "copied"}
    # LoRA in 2 decoder layers of 7 and 3 tower blocks of 5 linear layers; the merger's norm and two layers with bias;
    # embedding and head.
    assert str(report) == "69 tensors: 33 copied, 29 merged, 5 replaced, 2 rows"
    embedding = "model.language_model.embed_tokens.weight"
    rows = (before[embedding] != after[embedding]).any(1).nonzero().flatten().tolist()
    assert set(rows) <= set(NEW_TOKENS)


def test_a_whole_adapter_comes_along(tmp_path, build):
    model = build("qwen3_vl")
    model.save_pretrained(tmp_path / "base")
    settings = load_recipe(
        "cpu_demo", ["parts={adapter: {train: full}, language_model: {train: lora}, embeddings: {train: frozen}}",
                     "lora={rank: 2}"])  # fmt: skip
    model = add_lora(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.25
    model.save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path / "adapter", tmp_path / "merged")
    before = AutoModelForImageTextToText.from_pretrained(tmp_path / "base").state_dict()
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()
    replaced = [name for name, kind in report.fate.items() if kind == "replaced"]
    assert len(replaced) == 3 * 6  # three mergers of a norm and two linear layers, weight and bias each
    for name in replaced:
        torch.testing.assert_close(after[name], before[name] + 0.25)


def test_what_qlora_learned_goes_onto_the_unquantised_base(tmp_path, trained):
    batch, _ = trained("qwen2_5_vl", quantized=True)
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    unmerged = load_lora(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(merged, batch), logits(unmerged, batch), rtol=1e-5, atol=2e-5)


def test_a_bfloat16_base_is_stored_in_bfloat16_with_one_rounding(tmp_path, trained):
    trained("qwen2_5_vl", dtype=torch.bfloat16)
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype="auto").state_dict()
    lora = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.language_model.layers.1.mlp.up_proj"
    a, b = (lora[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
    assert a.dtype == torch.float32
    exact = base[f"{name}.weight"].double() + 7 / 3 * b.double() @ a.double()
    # Half a unit in the last of bfloat16's 8 bits; and the nearest number, but where float32 stands between two.
    assert ((merged[f"{name}.weight"].double() - exact).abs() <= exact.abs() * 2**-8).all()
    assert (merged[f"{name}.weight"] != exact.bfloat16()).sum() <= 2
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


def test_dora_on_a_bfloat16_base_is_rounded_once_too(tmp_path, trained):
    trained("qwen2_5_vl", dtype=torch.bfloat16, dora=True)
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype="auto").state_dict()
    lora = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.language_model.layers.1.mlp.up_proj"
    a, b = (lora[f"base_model.model.{name}.lora_{letter}.weight"].double() for letter in "AB")
    moved = base[f"{name}.weight"].double() + 7 / 3 * b @ a
    magnitude = lora[f"base_model.model.{name}.lora_magnitude_vector"].double()
    exact = magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True)
    assert (merged[f"{name}.weight"] != exact.bfloat16()).sum() <= 4  # of 1536; where float32 stands between two


def test_a_quantised_base_is_refused(tmp_path, trained):
    trained("qwen2_5_vl")
    path = tmp_path / "base" / "config.json"
    settings = json.loads(path.read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"is quantised.*Pass the unquantised model.*--base"):
        merge(tmp_path / "adapter", tmp_path / "merged")


def test_an_adapter_of_another_model_is_refused(tmp_path, trained, build):
    trained("qwen2_5_vl")
    build("llava").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"\d+ tensors of .*adapter belong to no tensor of LlavaForConditionalGen"):
        merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "other")


def test_a_tensor_that_peft_would_not_merge_is_not_forgotten(tmp_path, trained):
    trained("qwen2_5_vl")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.model.visual.blocks.0.norm1.weight": torch.ones(24)}, path)
    with pytest.raises(
        ValueError, match=r"1 tensors find no place \(base_model\.model\.model\.visual\.blocks\.0\.norm1"
    ):
        merge(tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.visual.patch_embed.proj.weight", "patch_embed.proj.weight changed, though nothing was trained there"),
        ("model.visual.merger.mlp.0.weight", "merger.mlp.0.weight is not what was trained"),
    ],
)
def test_a_merge_that_changes_one_number_too_many_is_refused(tmp_path, trained, monkeypatch, name, message):
    trained("qwen2_5_vl")

    def load_wrongly(base, folder):
        model = load_lora(base, folder)
        whole = model.merge_and_unload

        def merge_wrongly():
            merged = whole()
            merged.get_parameter(name).data.view(-1)[-1] += 1e-3
            return merged

        monkeypatch.setattr(model, "merge_and_unload", merge_wrongly, raising=False)
        return model

    monkeypatch.setattr("trainers.merge.load_lora", load_wrongly)
    with pytest.raises(ValueError, match=f"1 tensors came out wrong: .*{message}"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_is_not_finite_is_refused(tmp_path, trained):
    trained("qwen2_5_vl")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.language_model.layers.1.mlp.up_proj.lora_A.weight"][2, 3] = torch.nan
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"1 tensors came out wrong: .*layers\.1\.mlp\.up_proj\.weight is not finite"):
        merge(tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("in_adapter", [True, False])
def test_the_processor_is_the_one_that_was_trained_with(tmp_path, trained, in_adapter):
    trained("qwen2_vl")
    if in_adapter:
        (tmp_path / "adapter" / "processor_config.json").write_text('{"from": "adapter"}')
        (tmp_path / "adapter" / "chat_template.jinja").write_text("template")
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "processor_config.json").read_text()) == {
        "from": "adapter" if in_adapter else "base"
    }
    assert (tmp_path / "merged" / "chat_template.jinja").is_file() == in_adapter


def test_a_whole_tower_comes_along(tmp_path, build):
    """Trained beside LoRA by another program: recipes train the tower whole or the language model with LoRA."""
    build("qwen2_5_vl").save_pretrained(tmp_path / "base")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=r"model\.language_model\..*\.q_proj", modules_to_save=["model.visual"])
    model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.25
    model.save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path / "adapter", tmp_path / "merged")
    before = AutoModelForImageTextToText.from_pretrained(tmp_path / "base").state_dict()
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()
    tower = {name for name in before if ".visual." in name}
    assert {name for name, kind in report.fate.items() if kind == "replaced"} == tower
    for name in tower:
        torch.testing.assert_close(after[name], before[name] + 0.25)
