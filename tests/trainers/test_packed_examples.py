"""Packing through the trainers: the same loss, gradients and checkpoints as padded rows, and early refusals."""

import logging

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from processing.example import Example, Source
from processing.mixing import Mixture
from processing.processing_families import load_processor
from trainers.arguments import StageArguments
from trainers.multitask import QwenVLMultiTaskTrainer
from trainers.sft import QwenVLSFTTrainer

CAPACITY = 71


def example(number: int, answer: str, pictures: int = 1, task: str | None = None) -> Example:
    picture = {"type": "image", "image": Image.new("RGB", (8, 8), (20 * number, 90, 255 - 20 * number))}
    content = [*[picture] * pictures, {"type": "text", "text": f"Row {number}?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return Example(messages, task=task, source=Source("rows.jsonl", number + 1))


@pytest.fixture(scope="module")
def rows():
    """Eight rows: long and short answers, one picture, two, and none."""
    return [example(n, "y" * (3 + 7 * (n % 5)) + str(n), pictures=n % 3) for n in range(8)]


@pytest.fixture
def make_trainer(model_folder, tmp_path, rows):
    def make(name="run", family="qwen2_5_vl", trainer_class=QwenVLMultiTaskTrainer, **changed):
        folder = model_folder(family)
        settings = {
            "per_device_train_batch_size": 1,
            "max_steps": 1,
            "optim": "sgd",
            "learning_rate": 0.1,
            "max_grad_norm": 0.0,
            "tower_layer_decay": 1.0,
            "lr_scheduler_type": "constant",
            "max_length": CAPACITY,
            "packing": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
        }
        others = {
            key: changed.pop(key) for key in ("train_dataset", "eval_dataset", "data_collator") if key in changed
        }
        return trainer_class(
            changed.pop("model", None) or AutoModelForImageTextToText.from_pretrained(folder),
            StageArguments(str(tmp_path / name), **(settings | changed)),
            **{"train_dataset": rows, "processing_class": load_processor(folder)} | others,
        )

    return make


def losses_and_weights(trainer):
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


@pytest.mark.parametrize("family", ["qwen_vl", "qwen2_5_vl"])
def test_packed_rows_give_the_loss_and_the_gradients_of_padded_ones(family, make_trainer, rows):
    """One step over all rows, in which SGD moves each weight by a tenth of its gradient: padded in one batch, packed
    in one batch, and packed in one row per micro-batch."""
    padded = make_trainer("padded", family, packing=False, per_device_train_batch_size=len(rows))
    start = {name: tensor.clone() for name, tensor in padded.model.state_dict().items()}
    loss, weights = losses_and_weights(padded)
    assert max((weights[name] - start[name]).abs().max() for name in start) > 1e-3

    one_by_one = make_trainer("one_by_one", family)
    num_rows = len(one_by_one.train_dataset)
    assert 2 < num_rows < len(rows)
    one_by_one.args.gradient_accumulation_steps = num_rows
    together = make_trainer("together", family, per_device_train_batch_size=num_rows)
    for packed in (one_by_one, together):
        packed_loss, packed_weights = losses_and_weights(packed)
        assert packed_loss == pytest.approx(loss, abs=1e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(packed_weights[name], tensor, rtol=0, atol=2e-6, msg=name)


def test_every_example_is_in_one_row_and_no_row_is_longer_than_max_length(make_trainer, rows):
    trainer = make_trainer()
    packed = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    lines = [one.source.line for row in packed for one in row]
    assert sorted(lines) == [1, 2, 3, 4, 5, 6, 7, 8]
    batch = trainer.data_collator(packed[:2])
    assert batch["input_ids"].shape == (1, sum(one.length for row in packed[:2] for one in row))
    assert max(sum(one.length for one in row) for row in packed) <= CAPACITY
    assert "attention_mask" not in batch


def test_stage_two_packs_rows_of_one_task_and_stage_three_any(make_trainer):
    mixed = [example(n, "y", task=("ocr", "vqa")[n % 2]) for n in range(6)]

    def tasks(trainer_class):
        made = make_trainer(trainer_class=trainer_class, train_dataset=mixed).train_dataset
        return [{one.task for one in made[i]} for i in range(len(made))]

    assert all(len(row) == 1 for row in tasks(QwenVLMultiTaskTrainer))
    assert {"ocr", "vqa"} in tasks(QwenVLSFTTrainer)


def test_evaluation_is_padded_and_the_same_without_packing(make_trainer, rows):
    packed = make_trainer(eval_dataset=rows[:3], per_device_eval_batch_size=3)
    padded = make_trainer(eval_dataset=rows[:3], per_device_eval_batch_size=3, packing=False)
    assert packed.evaluate()["eval_loss"] == padded.evaluate()["eval_loss"]
    assert packed.data_collator(rows[:3])["input_ids"].shape[0] == 3


def test_a_packed_run_stopped_in_the_middle_goes_on_to_the_same_weights(make_trainer, train_until_step_three):
    steps = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
    losses, whole = losses_and_weights(make_trainer("whole", **steps))
    assert len(set(losses)) == 5

    train_until_step_three(make_trainer("stopped", **steps))
    resumed = make_trainer("stopped", **steps)
    resumed.train(resume_from_checkpoint="auto")
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == losses
    weights = resumed.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole.items())


def test_another_seed_packs_other_rows_together(make_trainer):
    def sharing(seed):
        return sorted(sorted(row) for row in make_trainer(seed=seed).train_dataset.rows)

    assert sharing(1) == sharing(1)
    assert make_trainer(seed=1).train_dataset.rows != make_trainer(seed=2).train_dataset.rows


def test_how_full_the_rows_are_is_said(make_trainer, caplog):
    caplog.set_level(logging.INFO)
    made = make_trainer().train_dataset
    tokens = sum(one.length for i in range(len(made)) for one in made[i])
    share = round(100 * tokens / (len(made) * CAPACITY))
    assert f"8 examples packed into {len(made)} rows of 71 tokens, {share}% full." in caplog.text


def test_rows_that_are_too_long_are_counted_and_named_before_training(make_trainer, rows):
    long = [*rows[:3], *(example(n, "y" * 200) for n in range(10, 15))]
    message = (
        r"(?s)5 of 8 rows do not go into packed rows of 71 tokens:\nrows\.jsonl:11: 2\d\d tokens .*max_length is 71 .*"
        r"\nrows\.jsonl:13: [^\n]*\n\.\.\. and 2 more$"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(train_dataset=long)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_length": None}, "packing=True fills rows up to max_length tokens: set max_length"),
        ({"train_dataset": []}, "The dataset has no rows to pack"),
        ({"train_dataset": [{"messages": []}]}, "The dataset holds a dict: without a data_collator it must hold Ex"),
        ({"data_collator": list}, "resolution=None, max_length=71 and packing=True say how Examples become batches"),
    ],
)
def test_what_cannot_be_packed_is_refused(make_trainer, changed, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**changed)


def test_a_stream_is_refused_since_its_lengths_are_not_known(make_trainer, rows):
    stream = Mixture({"one": rows}, {"one": 1.0}, stop="once")
    with pytest.raises(
        ValueError, match="packing needs all lengths before training, and a Mixture is read on the way"
    ):
        make_trainer(train_dataset=stream)


def test_an_attention_that_sees_no_boundaries_is_refused(make_trainer, model_folder):
    model = AutoModelForImageTextToText.from_pretrained(model_folder("qwen2_5_vl"))
    model.config.text_config._attn_implementation = "my_kernel"
    with pytest.raises(
        ValueError, match="packing with attention 'my_kernel' would let the examples of a row see each"
    ):
        make_trainer(model=model)


def test_a_packed_run_reads_a_frozen_towers_features_from_the_cache(make_trainer, tmp_path):
    cached = {"trainer_class": QwenVLSFTTrainer, "max_length": 211, "num_train_epochs": 2, "max_steps": -1}
    cached["feature_cache_dir"] = str(tmp_path / "features")
    trainer = make_trainer("cached", **cached)
    losses, weights = losses_and_weights(trainer)
    assert trainer.feature_cache.hits == trainer.feature_cache.misses == 0 + 1 + 2 + 0 + 1 + 2 + 0 + 1
    plain_losses, plain = losses_and_weights(make_trainer("plain", **cached | {"feature_cache_dir": None}))
    assert losses == pytest.approx(plain_losses, abs=1e-6)
    for name, tensor in plain.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6, msg=name)
