"""DPO with shared pictures and prompts, against TRL's own DPOTrainer on the same pairs with everything repeated."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, set_seed
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from processing.example import Example
from processing.processing_families import load_processor
from trainers.completion_logps import add_completion_head
from trainers.dpo import PreferenceCollator, QwenVLDPOTrainer
from trainers.dpo_arguments import DPOArguments
from trainers.families import find_parts
from trainers.freezing import TrainedParts
from trainers.preference_pairs import PreferencePairs

ALL_PARTS = TrainedParts(("tower", "adapter", "language_model", "embeddings"))
FAMILIES = ["qwen_vl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "clip_qwen2", "siglip_llama"]
# Together, not each: the quick suite trains by DPO in test_recipe_dpo.
pytestmark = pytest.mark.slow
PICTURES = (1, 0, 2, 1)  # of each row; the second row is text only
M_ROPE = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}
VISION = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
SETTINGS = {
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "bf16": False,
    "use_cpu": True,
    "activation_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "beta": 0.3,
    "train_sampling_strategy": "sequential",
    "dataloader_pin_memory": False,
    # Adam divides by gradients that are zero but for rounding; this keeps them zero.
    "adam_epsilon": 1e-4,
}


def preference_rows():
    """Four preference rows; answers of different lengths."""
    rows = []
    for number, pictures in enumerate(PICTURES):
        content = [
            {"type": "image", "image": Image.new("RGB", (8, 8), (50 * number + 20 * p,) * 3)} for p in range(pictures)
        ]
        content.append({"type": "text", "text": "How bright?" + "?" * number})
        rows.append(
            Example(
                [{"role": "user", "content": content}],
                kind="preference",
                chosen=[{"role": "assistant", "content": f"{number} of 255"}],
                rejected=[{"role": "assistant", "content": "dark" * (number % 2 + 1)}],
            )
        )
    return rows


@pytest.fixture
def examples():
    return preference_rows()


@pytest.fixture
def load(model_folder):
    def _load(family, noise=0.0):
        model = AutoModelForImageTextToText.from_pretrained(model_folder(family), dtype=torch.float32)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=noise)
        return model, load_processor(str(model_folder(family)))

    return _load


def repeated(collator, family, config):
    """TRL's batch of the same pairs: every picture once for chosen and once for rejected."""

    def collate(rows):
        batch = collator([{"row": row["images"]} for row in rows])
        for key in ("group_of_row", "num_pictures", "num_videos"):
            batch.pop(key, None)
        for key in VISION:
            if key in batch:
                batch[key] = torch.cat([batch[key]] * 2)
        if family in M_ROPE:
            is_video = batch["input_ids"] == config.video_token_id
            batch["mm_token_type_ids"] = (batch["input_ids"] == config.image_token_id).int() + 2 * is_video.int()
        return batch

    return collate


def stock(model, reference, processor, examples, family, folder, **settings):
    collator = PreferenceCollator(PreferencePairs(processor))
    collator.number(examples)
    return DPOTrainer(
        model,
        reference,
        DPOConfig(str(folder), remove_unused_columns=False, **SETTINGS | settings),
        repeated(collator, family, model.config),
        Dataset.from_dict({"images": list(range(len(examples)))}),
        processing_class=processor,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_weights(model, other, atol=1e-5):
    wanted = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], atol=atol, rtol=0, msg=name)


LOSSES = {
    "sigmoid": {},
    "ipo with ld_alpha": {"loss_type": ["ipo"], "ld_alpha": 0.5},
    "MPO": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
}


CASES = [
    *[
        (family, loss, layout)
        for family in ("qwen2_5_vl", "qwen_vl")
        for loss in LOSSES
        for layout in ("tree", "rows")
    ],
    *[(family, "sigmoid", "tree") for family in ("qwen2_vl", "qwen3_vl", "clip_qwen2", "siglip_llama")],
    ("qwen3_vl", "MPO", "rows"),
    ("clip_qwen2", "MPO", "rows"),
]


@pytest.mark.parametrize(("family", "loss", "layout"), CASES, ids=map("-".join, CASES))
def test_losses_and_final_weights_equal_trls(load, examples, tmp_path, family, loss, layout):
    model, processor = load(family)
    settings = LOSSES[loss]
    arguments = DPOArguments(str(tmp_path), completion_layout=layout, **SETTINGS | settings)
    ours = QwenVLDPOTrainer(model, arguments, examples, processing_class=processor, trained=ALL_PARTS)
    ours.train()
    other, _ = load(family)
    theirs = stock(other, load(family)[0], processor, examples, family, tmp_path, **settings)
    theirs.train()
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)
    assert len(set(losses(ours))) == 3
    assert_same_weights(model, other)


@pytest.mark.parametrize("family", FAMILIES[1:4])
def test_videos_in_one_batch_with_pictures_and_text_equal_trls(load, examples, tmp_path, write_video, family):
    """TRL does not collate videos; given the tensors, it trains on them."""
    for number, row in enumerate(examples[1:3]):  # the row of text, and the one with two pictures
        path = write_video(tmp_path / f"{number}.mp4", num_frames=4 + 4 * number)
        row.messages[0]["content"].insert(0, {"type": "video", "video": path})
    model, processor = load(family)
    ours = trained(model, processor, examples, tmp_path, trained=ALL_PARTS)
    batch = ours.data_collator([{"row": number} for number in range(4)])
    assert batch["num_videos"].tolist() == [0, 1, 1, 0]
    other, _ = load(family)
    theirs = stock(other, load(family)[0], processor, examples, family, tmp_path)
    theirs.train()
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)
    assert_same_weights(model, other)


SEQUENCE_LOSSES = "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft sigmoid_norm"  # noqa: E501
VARIANTS = [
    *({"loss_type": [name]} for name in SEQUENCE_LOSSES.split()),
    *({"f_divergence_type": name} for name in ("forward_kl", "js_divergence", "alpha_divergence")),
    {"loss_type": ["hinge"], "use_weighting": True},
]


@pytest.fixture(scope="module")
def two_trainers(model_folder, tmp_path_factory):
    """Ours and TRL's, for a policy that has moved away from its reference; nothing is trained."""
    folder = tmp_path_factory.mktemp("losses")
    processor = load_processor(str(model_folder("qwen_vl")))
    rows = preference_rows()

    def load(noise):
        model = AutoModelForImageTextToText.from_pretrained(model_folder("qwen_vl"), dtype=torch.float32)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=noise)
        return model

    arguments = DPOArguments(str(folder), **SETTINGS)
    ours = QwenVLDPOTrainer(
        load(0.01), arguments, rows, processing_class=processor, trained=ALL_PARTS, ref_model=load(0.0)
    )
    return ours, stock(load(0.01), load(0.0), processor, rows, "qwen_vl", folder)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: " ".join(map(str, variant.values())))
def test_every_loss_and_divergence_equals_trls_and_so_do_the_metrics(two_trainers, monkeypatch, variant):
    found = []
    for trainer in two_trainers:
        monkeypatch.setattr(trainer, "label_smoothing", 0.1)
        for name, value in variant.items():
            monkeypatch.setattr(trainer, "loss_types" if name == "loss_type" else name, value)
        if "use_weighting" in variant:  # the heads are asked for what its weights need
            for model in (trainer.model,):
                outputs = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
                head = add_completion_head if trainer is two_trainers[0] else add_fused_lm_head
                monkeypatch.setattr(model, "forward", model.forward)  # put back afterwards
                head(model, outputs=outputs)
        rows = [{"row": number, "images": number} for number in range(4)]
        trainer._metrics["train"].clear()
        loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator(rows))
        assert loss.requires_grad
        found.append({name: values[0] for name, values in trainer._metrics["train"].items()} | {"loss": loss.item()})
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    assert ours == pytest.approx(theirs, abs=2e-5)
    assert ours["rewards/margins"] != pytest.approx(0, abs=1e-4)


# The reference.


def trained(model, processor, examples, folder, callbacks=None, trained=None, resume=None, **settings):
    arguments = DPOArguments(str(folder), **SETTINGS | settings)
    trainer = QwenVLDPOTrainer(
        model, arguments, examples, processing_class=processor, trained=trained, callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def with_lora(model, fresh=True):
    set_seed(7)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=r"model\.language_model\..*\.(q|v)_proj"))
    if not fresh:
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.1)
    return wrapped


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


@pytest.mark.parametrize(
    ("family", "parts", "shared", "passes"),
    [
        ("qwen2_5_vl", ("language_model",), "features", 1),
        ("qwen3_vl", ("language_model",), "features", 1),
        ("qwen2_5_vl", ("adapter", "language_model"), "blocks", 1),
        ("qwen3_vl", ("adapter", "language_model"), "blocks", 1),
        ("qwen_vl", ("adapter",), "blocks", 1),
        ("qwen2_5_vl", ("tower", "language_model"), "nothing", 2),
        ("clip_qwen2", ("language_model",), "features", 1),
        ("siglip_llama", ("adapter", "language_model"), "blocks", 1),
        ("siglip_llama", ("tower", "language_model"), "nothing", 2),
    ],
)
def test_how_often_a_step_sends_its_pictures_through_the_tower(
    load, examples, tmp_path, family, parts, shared, passes
):
    model, processor = load(family)
    arguments = DPOArguments(str(tmp_path), **SETTINGS)
    trainer = QwenVLDPOTrainer(model, arguments, examples, processing_class=processor, trained=TrainedParts(parts))
    assert trainer.memory.shared == shared
    counted = []
    for module in (trainer.model, trainer.ref_model):
        attention = [
            m
            for m in find_parts(module).blocks[-1].modules()
            if "attn" in type(m).__name__.lower() or "Attention" in type(m).__name__
        ]
        attention[0].register_forward_hook(lambda module, args, output: counted.append(1))
    batch = trainer.data_collator([{"row": number} for number in range(4)])
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    assert len(counted) == passes
    trainer.compute_loss(trainer.model, batch)
    assert len(counted) == 2 * passes  # nothing is left over from the step before


@pytest.mark.parametrize("family", ["qwen_vl", "qwen3_vl"])
def test_a_batch_of_text_trains_nothing_where_the_adapter_alone_trains(load, examples, tmp_path, family):
    """It has nothing to go back through but a blank picture."""
    model, processor = load(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    text, batch_of_one = [examples[1]], {"per_device_train_batch_size": 1, "max_steps": 1}
    trainer = trained(model, processor, text, tmp_path, trained=TrainedParts(("adapter",)), **batch_of_one)
    assert losses(trainer) == [pytest.approx(0.6931, abs=1e-4)]
    assert any(p.requires_grad for p in model.parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("parts", [("adapter", "language_model"), ("language_model",)])
def test_shared_pictures_change_no_gradient(load, examples, tmp_path, parts):
    gradients = []
    for shares in (True, False):
        model, processor = load("qwen3_vl")
        trainer = QwenVLDPOTrainer(
            model,
            DPOArguments(str(tmp_path), **SETTINGS),
            examples,
            processing_class=processor,
            trained=TrainedParts(parts),
            ref_model=load("qwen3_vl", noise=0.01)[0] if not shares else None,
        )
        assert (trainer.memory.shared == "nothing") == (not shares)
        if not shares:
            trainer.ref_model.load_state_dict(model.state_dict())
        trainer.compute_loss(model.train(), trainer.data_collator([{"row": n} for n in range(4)])).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-5)


# The run.


def test_accumulated_micro_batches_equal_one_larger_batch(load, examples, tmp_path):
    models = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        model, processor = load("qwen_vl")
        trained(
            model,
            processor,
            examples,
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
        )
        models.append(model)
    assert_same_weights(models[0], models[1])
    assert_same_weights(models[0], models[2])


# TRL switches checkpointing off and on around the reference by its old name.
trl_says_gradient_checkpointing = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*able:FutureWarning")


@trl_says_gradient_checkpointing
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen_vl"])
def test_recomputed_activations_change_nothing(load, examples, tmp_path, family):
    models = []
    for recomputes in (False, True):
        model, processor = load(family)
        trained(model, processor, examples, tmp_path, trained=ALL_PARTS, activation_checkpointing=recomputes)
        models.append(model)
    assert_same_weights(*models)


@trl_says_gradient_checkpointing
def test_the_layers_that_recompute_stay_those_that_did(load, examples, tmp_path):
    model, processor = load("qwen2_5_vl")
    model.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    trained(model, processor, examples, tmp_path, trained=ALL_PARTS, max_steps=1)
    assert {block.gradient_checkpointing for block in find_parts(model).blocks} == {False}
    assert {layer.gradient_checkpointing for layer in model.model.language_model.layers} == {True}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen_vl"])
def test_a_resumed_run_ends_where_a_straight_one_does(load, examples, tmp_path, family):
    straight, processor = load(family)
    whole = trained(straight, processor, examples, tmp_path / "straight", max_steps=4)
    first, _ = load(family)
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trained(first, processor, examples, tmp_path / "resumed", **saving)
    resumed, _ = load(family)
    again = trained(
        resumed, processor, examples, tmp_path / "resumed", resume=tmp_path / "resumed" / "checkpoint-2", **saving
    )
    assert_same_weights(straight, resumed, atol=0)
    assert losses(again) == losses(whole)


def test_frozen_parts_stay_and_all_others_move(load, examples, tmp_path):
    model, processor = load("qwen2_5_vl")
    before = {name: p.clone() for name, p in model.named_parameters()}
    trained(model, processor, examples, tmp_path)
    part_of = find_parts(model).part_of
    moved = {part_of[name] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"adapter", "language_model", "embeddings"}


def test_evaluation_gives_a_loss_and_reward_margins_also_for_new_rows(load, examples, tmp_path):
    model, processor = load("qwen_vl")
    trainer = QwenVLDPOTrainer(
        model, DPOArguments(str(tmp_path), **SETTINGS), examples[:2], examples[2:], processing_class=processor
    )
    first, second = trainer.evaluate(), trainer.evaluate(examples[2:])
    assert first["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert first["eval_loss"] == second["eval_loss"]
    assert first["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)


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


# What is refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precompute_ref_log_probs": True}, "reference='cache'"),
        ({"reference": "cache"}, "needs a folder"),
        ({"reference_cache_dir": "x"}, "nothing else has one"),
        ({"label_smoothing_factor": 0.1}, "DPO's is label_smoothing"),
        ({"truncation_mode": "keep_end"}, "nothing is truncated"),
        ({"remove_unused_columns": True}, "leave it out"),
    ],
)
def test_settings_that_would_not_do_what_they_say_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        DPOArguments(str(tmp_path), **SETTINGS | settings)


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


def test_a_tree_is_refused_where_qwen_vl_would_stretch_by_the_rows_length(load, examples, tmp_path):
    model, processor = load("qwen_vl")
    model.config.text_config.seq_length = 116  # prompt and answer have fewer tokens, prompt and both answers more
    trainer = QwenVLDPOTrainer(model, DPOArguments(str(tmp_path), **SETTINGS), examples, processing_class=processor)
    batch = trainer.data_collator([{"row": 2}])
    assert batch["input_ids"].shape[1] < 116
    with pytest.raises(ValueError, match=r"longer than seq_length = 116.*choose the layout 'rows'"):
        trainer.compute_loss(model.train(), batch)


def test_a_mixture_of_experts_with_a_loss_for_its_routers_is_refused(load, examples, tmp_path):
    model, processor = load("clip_qwen2")
    model.config.text_config.output_router_logits, model.config.text_config.router_aux_loss_coef = False, 0.01
    with pytest.raises(ValueError, match=r"pass router_aux_loss_coef=0\.0"):
        QwenVLDPOTrainer(model, DPOArguments(str(tmp_path), **SETTINGS), examples, processing_class=processor)
    arguments = DPOArguments(str(tmp_path), router_aux_loss_coef=0.0, **SETTINGS)
    QwenVLDPOTrainer(model, arguments, examples, processing_class=processor)
