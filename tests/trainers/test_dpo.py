"""DPO with shared pictures and prompts, against TRL's own DPOTrainer on the same pairs with everything repeated."""

import pytest
import torch
from transformers import AutoModelForImageTextToText
from trl.trainer.utils import add_fused_lm_head

from processing.processing_families import load_processor
from tests.trainers.preference_runs import (
    ALL_PARTS,
    FAMILIES,
    SETTINGS,
    assert_same_weights,
    losses,
    preference_rows,
    stock,
    trained,
)
from trainers.completion_logps import add_completion_head
from trainers.dpo import QwenVLDPOTrainer
from trainers.dpo_arguments import DPOArguments
from trainers.families import find_parts
from trainers.freezing import TrainedParts

# Together, not each: the quick suite trains by DPO in test_recipe_dpo.
pytestmark = pytest.mark.slow


@pytest.fixture
def examples():
    return preference_rows()


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
