"""DPO's reference: a copy, the adapter switched off or copied, or a cache; which is taken, shared and refused."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from tests.trainers.preference_runs import (
    FAMILIES,
    SETTINGS,
    assert_same_weights,
    losses,
    preference_rows,
    stock,
    trained,
    with_lora,
)
from trainers.dpo import QwenVLDPOTrainer
from trainers.dpo_arguments import DPOArguments

# Together, not each: the quick suite trains by DPO in test_recipe_dpo.
pytestmark = pytest.mark.slow


@pytest.fixture
def examples():
    return preference_rows()


def test_a_copy_as_reference_equals_its_cache_which_is_read_the_second_time(load, examples, tmp_path, monkeypatch):
    model, processor = load("qwen_vl")
    by_copy = trained(model, processor, examples, tmp_path)
    for attempt in range(2):
        other, _ = load("qwen_vl")
        if attempt:
            monkeypatch.setattr(QwenVLDPOTrainer, "_reference_of", None)  # would be called to compute them again
        by_cache = trained(
            other, processor, examples, tmp_path, reference="cache", reference_cache_dir=str(tmp_path / "cache")
        )
        assert by_cache.ref_model is None
        assert losses(by_cache) == pytest.approx(losses(by_copy), abs=1e-5)
        assert_same_weights(other, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_equals_trls_with_the_adapter_switched_off_as_reference(load, examples, tmp_path, family):
    base, processor = load(family)
    model, other = with_lora(base), with_lora(load(family)[0])
    ours = trained(model, processor, examples, tmp_path)
    theirs = stock(other, None, processor, examples, family, tmp_path)
    theirs.train()
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)
    assert len(set(losses(ours))) == 3
    adapter = {name for name, p in model.named_parameters() if p.requires_grad}
    assert adapter
    assert all("lora_" in name for name in adapter)
    assert_same_weights(model, other)


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh adapter", "adapter from before"])
def test_the_adapter_switched_off_or_copied_equals_its_cache(load, examples, tmp_path, fresh):
    references = ["cache", "adapter_copy", *(["adapter_off"] if fresh else [])]
    runs, weights = {}, {}
    for reference in references:
        base, processor = load("qwen2_5_vl")
        cache = {"reference_cache_dir": str(tmp_path / "cache")} if reference == "cache" else {}
        model = with_lora(base, fresh)
        runs[reference] = trained(model, processor, examples, tmp_path, reference=reference, **cache)
        weights[reference] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert all(".default." in name for name in weights[reference])
    for reference in references[1:]:
        assert losses(runs[reference]) == pytest.approx(losses(runs["cache"]), abs=1e-5)
        assert weights[reference].keys() == weights["cache"].keys()
        for name, weight in weights[reference].items():
            torch.testing.assert_close(weight, weights["cache"][name], atol=1e-5, rtol=0)
    # At the first step policy and reference are the same, adapter included: ln 2.
    assert losses(runs["cache"])[0] == pytest.approx(0.6931, abs=1e-3)


def test_which_reference_is_taken_when_none_is_named(load, examples, tmp_path):
    for wrap, wanted in (
        (lambda model: model, "copy"),
        (with_lora, "adapter_off"),
        (lambda model: with_lora(model, fresh=False), "adapter_copy"),
    ):
        model, processor = load("qwen_vl")
        trainer = QwenVLDPOTrainer(
            wrap(model), DPOArguments(str(tmp_path), **SETTINGS), examples, processing_class=processor
        )
        assert trainer.reference == wanted
        assert ("ref" in getattr(trainer.model, "peft_config", {})) == (wanted == "adapter_copy")


def test_a_copy_shares_what_is_frozen_and_nothing_else(load, examples, tmp_path):
    model, processor = load("qwen2_5_vl")
    trainer = QwenVLDPOTrainer(model, DPOArguments(str(tmp_path), **SETTINGS), examples, processing_class=processor)
    reference = dict(trainer.ref_model.named_parameters())
    for name, parameter in model.named_parameters():
        assert (reference[name] is parameter) == (not parameter.requires_grad), name
    assert not any(p.requires_grad for p in reference.values())
    assert reference["model.visual.patch_embed.proj.weight"] is model.model.visual.patch_embed.proj.weight


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen_vl", "clip_qwen2"])
def test_lora_on_a_4_bit_model_trains_only_the_adapter_in_its_own_dtype(
    load, model_folder, examples, tmp_path, family
):
    skipped = ["model.visual", "model.adapter", "lm_head"]
    model = AutoModelForImageTextToText.from_pretrained(
        model_folder(family),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=skipped
        ),
        device_map="cpu",
    )
    wrapped = with_lora(model)
    before = {name: p.clone() for name, p in wrapped.named_parameters()}
    trainer = trained(wrapped, load(family)[1], examples, tmp_path)
    changed = {name for name, p in wrapped.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in changed)
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)


def test_references_that_the_model_cannot_give_are_refused(load, examples, tmp_path):
    model, processor = load("qwen_vl")
    sharded = {"reference": "cache", "reference_cache_dir": str(tmp_path), "fsdp": True}
    with pytest.raises(ValueError, match=r"under FSDP, without LoRA: .* Say reference='copy'"):
        QwenVLDPOTrainer(model, DPOArguments(str(tmp_path), **SETTINGS | sharded), examples, None, processor)
    for wrapped, reference, message in (
        (model, "adapter_off", "needs a PeftModel"),
        (with_lora(load("qwen_vl")[0]), "copy", "would hold the base twice"),
    ):
        arguments = DPOArguments(str(tmp_path), reference=reference, **SETTINGS)
        with pytest.raises(ValueError, match=message):
            QwenVLDPOTrainer(wrapped, arguments, examples, processing_class=processor)
