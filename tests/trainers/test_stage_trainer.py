"""Trainers by equivalence: settings that must not matter do not, and each stage moves what it should."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from trainers.arguments import StageArguments
from trainers.families import find_parts
from trainers.freezing import TrainedParts
from trainers.loss import supervised_loss
from trainers.multitask import QwenVLMultiTaskTrainer
from trainers.pretrain import QwenVLPretrainTrainer
from trainers.sft import QwenVLSFTTrainer

STAGES = [QwenVLPretrainTrainer, QwenVLMultiTaskTrainer, QwenVLSFTTrainer]


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def make_trainer(tmp_path, build, make_rows, collate):
    def make(trainer_class=QwenVLSFTTrainer, family="qwen2_5_vl", rows=None, model=None, trained=None, **settings):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "tower_layer_decay": 1.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
        }
        return trainer_class(
            model if model is not None else build(family),
            StageArguments(**(defaults | settings)),
            train_dataset=make_rows(family, 8) if rows is None else rows,
            eval_dataset=make_rows(family, 3, seed=100),
            data_collator=collate,
            trained=trained,
        )

    return make


def run(trainer) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Loss of every step, and the weights at the end."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], weights_of(trainer.model)


def assert_same_run(first, second, atol=1e-6) -> None:
    assert first[0] == pytest.approx(second[0], abs=atol)
    for name, tensor in first[1].items():
        torch.testing.assert_close(tensor, second[1][name], rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize(
    ("family", "trainer_class"),
    [(family, trainer_class) for family in ("qwen_vl", "qwen2_5_vl") for trainer_class in STAGES]
    + [("qwen2_vl", QwenVLSFTTrainer), ("qwen3_vl", QwenVLPretrainTrainer), ("llava", QwenVLSFTTrainer)],
)
def test_a_stage_moves_its_parts_and_leaves_the_others_bit_identical(family, make_trainer, trainer_class):
    trainer = make_trainer(trainer_class, family)
    before = weights_of(trainer.model)
    _, after = run(trainer)
    parts = find_parts(trainer.model)
    moved = dict.fromkeys(trainer.stage.parts, False)
    for name, part in parts.part_of.items():
        if part in trainer.stage.parts and name not in parts.constants:
            moved[part] = moved[part] or not torch.equal(before[name], after[name])
        else:
            assert torch.equal(before[name], after[name]), name
    assert all(moved.values())


@pytest.mark.parametrize("trainer_class", STAGES, ids=lambda c: c.stage.name)
@pytest.mark.parametrize("family", ["qwen_vl", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_checkpointing_changes_nothing(family, make_trainer, trainer_class):
    on = run(make_trainer(trainer_class, family, activation_checkpointing=True))
    off = run(make_trainer(trainer_class, family))
    assert_same_run(on, off)


# AdamW divides by the gradient's size, so that rounding in the smallest gradients would move weights visibly.
SGD = {"optim": "sgd", "learning_rate": 0.1}


@pytest.mark.parametrize("family", ["qwen_vl", "qwen2_5_vl"])
def test_accumulating_over_rows_of_unequal_length_equals_one_larger_batch(family, make_trainer):
    together = run(make_trainer(family=family, per_device_train_batch_size=4, max_steps=2, **SGD))
    one_by_one = run(
        make_trainer(family=family, per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=2, **SGD)
    )
    assert_same_run(together, one_by_one)


def test_the_reported_loss_is_the_mean_over_the_steps_tokens(make_trainer, make_rows, collate, build):
    rows = make_rows("qwen2_5_vl", 4)
    losses, _ = run(make_trainer(rows=rows, per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=1))
    assert losses == [pytest.approx(supervised_loss(build("qwen2_5_vl"), collate(rows))[0].item(), abs=1e-6)]


def test_weights_smoothing_and_z_loss_of_the_settings_reach_the_loss(make_trainer, make_rows, collate, build):
    rows = make_rows("qwen2_5_vl", 2)
    for row in rows:
        row["loss_weights"] = torch.linspace(0.1, 2.0, len(row["labels"]))
    losses, _ = run(make_trainer(rows=rows, max_steps=1, label_smoothing_factor=0.1, z_loss=1e-2))
    expected = supervised_loss(build("qwen2_5_vl"), collate(rows), label_smoothing=0.1, z_loss=1e-2)[0].item()
    plain = supervised_loss(build("qwen2_5_vl"), collate(rows))[0].item()
    assert losses == [pytest.approx(expected, abs=1e-6)]
    assert abs(expected - plain) > 0.01


def test_evaluation_reports_the_plain_mean_over_a_batchs_tokens(make_trainer, make_rows, collate, build):
    trainer = make_trainer(per_device_eval_batch_size=3, label_smoothing_factor=0.1, z_loss=0.1)
    expected = supervised_loss(build("qwen2_5_vl").eval(), collate(make_rows("qwen2_5_vl", 3, seed=100)))[0].item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-6)


def test_the_optimizer_has_the_settings_of_the_arguments(make_trainer):
    trainer = make_trainer(
        QwenVLMultiTaskTrainer,
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        weight_decay=0.05,
        tower_learning_rate=1e-3,
        adapter_learning_rate=2e-3,
        embeddings_learning_rate=3e-3,
        tower_layer_decay=0.5,
    )
    groups = {group["name"]: group for group in trainer.create_optimizer().param_groups}
    assert groups["tower 1, decay"]["betas"] == (0.9, 0.98)
    assert groups["tower 1, decay"]["eps"] == 1e-6
    assert groups["tower 1, decay"]["lr"] == 1e-3 * 0.5**2
    assert groups["adapter, no decay"]["lr"] == 2e-3
    assert groups["adapter, no decay"]["weight_decay"] == 0.0
    assert groups["embeddings, decay"]["lr"] == 3e-3
    assert groups["language_model, decay"]["lr"] == 1e-2
    assert groups["language_model, decay"]["weight_decay"] == 0.05


def test_lora_trains_and_the_rest_of_the_model_stays(make_trainer, build):
    base = build("qwen2_5_vl")
    before = weights_of(base)
    trainer = make_trainer(model=get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])))
    _, after = run(trainer)
    assert any(after[name].any() for name in after if "lora_B" in name)  # they begin at zero
    for name, tensor in before.items():
        found = f"base_model.model.{name}".replace("q_proj.", "q_proj.base_layer.")
        found = found if found in after else f"base_model.model.{name}"
        assert torch.equal(after[found], tensor), name


def test_what_trains_can_be_chosen(make_trainer):
    trainer = make_trainer(trained=TrainedParts(("adapter",)))
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == {
        name for name, part in find_parts(trainer.model).part_of.items() if part == "adapter"
    }


def test_settings_narrow_what_trains(make_trainer):
    trainer = make_trainer(QwenVLPretrainTrainer, last_tower_blocks=1, freeze_patterns=["merger"])
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("blocks.2." in name for name in trained)


def test_a_part_that_is_cut_off_from_the_loss_stops_the_run_after_its_first_step(make_trainer, build):
    model = build("qwen2_5_vl")
    merger_forward = model.model.visual.merger.forward
    model.model.visual.merger.forward = lambda x: merger_forward(x).detach()
    with pytest.raises(RuntimeError, match=r"The tower should train .* not connected to the loss"):
        make_trainer(QwenVLMultiTaskTrainer, model=model).train()


def test_text_before_the_first_picture_does_not_stop_a_run_that_trains_the_tower(make_trainer, make_rows):
    rows = make_rows("qwen2_5_vl", 4, pictures=0) + make_rows("qwen2_5_vl", 2, seed=50)
    trainer = make_trainer(QwenVLMultiTaskTrainer, rows=rows, train_sampling_strategy="sequential")
    losses, _ = run(trainer)
    assert len(losses) == 3


def test_a_step_without_supervised_tokens_is_refused(make_trainer, make_rows):
    rows = make_rows("qwen2_5_vl", 4)
    for row in rows:
        row["labels"] = torch.full_like(row["labels"], -100)
    with pytest.raises(ValueError, match="Step 1 has no supervised token in any of its 2 rows"):
        make_trainer(rows=rows).train()


def test_the_table_of_parts_is_printed_at_the_start(make_trainer, capsys):
    make_trainer(QwenVLPretrainTrainer, max_steps=1).train()
    printed = capsys.readouterr().out
    assert "stage pretrain: what trains" in printed
    assert "language_model" in printed


def test_a_frozen_tower_costs_one_forward_pass_per_batch_while_training(make_trainer):
    trainer = make_trainer(max_steps=3, activation_checkpointing=True)
    block = trainer.model.model.visual.blocks[0]
    seen = []
    # Inside the block, where the replay of checkpointing would come by again.
    block.attn.qkv.register_forward_hook(lambda m, args, output: seen.append((output.requires_grad, block.training)))
    trainer.train()
    assert seen == [(False, False)] * 3


def test_the_hook_on_a_frozen_tower_is_gone_after_training(make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert not trainer.model.model.visual.blocks[0]._forward_pre_hooks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"remove_unused_columns": True}, "would drop pictures"),
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant=True gives no gradient"),
        ({"average_tokens_across_devices": False}, "weighs tokens by the device"),
        ({"z_loss": -0.1}, "z_loss=-0.1 must not be negative"),
        ({"tower_layer_decay": 1.1}, "tower_layer_decay=1.1 must lie in"),
    ],
)
def test_settings_that_could_not_be_kept_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        StageArguments(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_plain_training_arguments_are_refused(tmp_path, build):
    with pytest.raises(ValueError, match=r"args is a TrainingArguments: use trainers.arguments.StageArguments"):
        QwenVLSFTTrainer(build("qwen2_5_vl"), TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_data_parallel_in_one_process_is_refused(make_trainer, monkeypatch):
    monkeypatch.setattr(StageArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"nn.DataParallel over 2 devices .* one process per device"):
        make_trainer()


def test_a_forward_without_logits_to_keep_is_refused(make_trainer, build):
    model = build("qwen2_5_vl")
    model.forward = lambda input_ids: None
    with pytest.raises(ValueError, match="has no logits_to_keep"):
        make_trainer(model=model)


def test_an_optimizer_that_makes_its_own_groups_is_refused(make_trainer, monkeypatch):
    monkeypatch.setattr(
        QwenVLSFTTrainer, "get_optimizer_cls_and_kwargs", lambda *_: (torch.optim.AdamW, {"params": []})
    )
    with pytest.raises(ValueError, match="makes its own parameter groups"):
        make_trainer().create_optimizer()


def test_the_stages_say_their_difference_in_one_line_each():
    for trainer_class in STAGES:
        body = inspect.getsource(trainer_class).split('"""')[2].split()
        assert body == ["stage", "=", trainer_class.stage.name.upper()]


TWO_PROCESSES = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import conftest, torch
from trainers.arguments import StageArguments
from trainers.multitask import QwenVLMultiTaskTrainer
from transformers import set_seed

set_seed(0)
model = conftest.BUILDERS["qwen2_5_vl"]()
rows = [conftest._row("qwen2_5_vl", seed, 5 + 3 * (seed % 4), pictures=seed % 2) for seed in range(8)]
args = StageArguments(
    output_dir={output!r}, max_steps=2, per_device_train_batch_size={batch_size}, gradient_accumulation_steps=2,
    optim="sgd", learning_rate=0.1, logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True,
    report_to="none", train_sampling_strategy="sequential", dataloader_pin_memory=False,
)
trainer = QwenVLMultiTaskTrainer(model, args, train_dataset=rows, data_collator=conftest._collate)
trainer.train()
if trainer.is_world_process_zero():
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.save((losses, model.state_dict()), {output!r} + "/result.pt")
"""


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    """Rows of unequal length, half of them without a picture, so that one process' batch has none."""
    results = []
    for processes, batch_size in ((1, 2), (2, 1)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        script = folder / "train.py"
        tests = Path(__file__).parent
        script.write_text(
            TWO_PROCESSES.format(
                root=str(tests.parents[1]), tests=str(tests), output=str(folder), batch_size=batch_size
            )
        )
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([*launch, str(script)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results.append(torch.load(folder / "result.pt"))
    assert_same_run(*results)
