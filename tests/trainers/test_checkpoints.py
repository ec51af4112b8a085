"""A checkpoint is whole or not there, and a resumed run is the run that was never stopped."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from trainers.arguments import StageArguments
from trainers.checkpoints import (
    FILE_LIST,
    find_last_checkpoint,
    finish,
    load_weights,
    unfinished_run_dir,
    what_is_missing,
)
from trainers.multitask import QwenVLMultiTaskTrainer


@pytest.fixture
def make_trainer(build, make_rows, collate):
    def make(output_dir, family="qwen2_5_vl", model=None, seed=0, processing_class=None, **settings):
        defaults = {
            "output_dir": str(output_dir),
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 2,
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
        }
        return QwenVLMultiTaskTrainer(
            model if model is not None else build(family, seed),
            StageArguments(**(defaults | settings)),
            train_dataset=make_rows(family, 6),  # 3 batches: the run goes on into a second epoch
            eval_dataset=make_rows(family, 2, seed=100),
            data_collator=collate,
            processing_class=processing_class,
        )

    return make


def losses_of(trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def assert_equal_weights(first, second) -> None:
    for (name, tensor), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


# Resuming


@pytest.mark.parametrize("family", ["qwen_vl", "qwen2_5_vl", "llava"])
def test_a_resumed_run_equals_one_that_was_never_stopped_bit_for_bit(family, make_trainer, tmp_path):
    straight = make_trainer(tmp_path / "straight", family)
    straight.train()
    # The model that resumes begins with other weights: all of them must come from the checkpoint.
    resumed = make_trainer(tmp_path / "resumed", family, seed=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert losses_of(resumed) == losses_of(straight)
    assert_equal_weights(resumed.model, straight.model)


def test_stock_trainer_resumes_qwen2_5_vl_from_its_initial_weights(build, make_rows, collate, tmp_path):
    """The fault that `_load_from_checkpoint` is for; when this fails, transformers has mended it."""
    args = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, use_cpu=True, disable_tqdm=True, remove_unused_columns=False
    )
    Trainer(build("qwen2_5_vl"), args, data_collator=collate, train_dataset=make_rows("qwen2_5_vl", 6)).train()
    fresh = build("qwen2_5_vl", 1)
    initial = fresh.model.visual.patch_embed.proj.weight.clone()
    again = Trainer(fresh, args, data_collator=collate, train_dataset=make_rows("qwen2_5_vl", 6))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(fresh.model.visual.patch_embed.proj.weight, initial)


def test_a_resumed_lora_run_equals_one_that_was_never_stopped(make_trainer, build, tmp_path):
    def lora(seed):
        # The base is the same; the adapter's own initial weights are not.
        base = build("qwen2_5_vl")
        torch.manual_seed(seed)
        return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["merger"]))

    straight = make_trainer(tmp_path / "straight", model=lora(0))
    straight.train()
    resumed = make_trainer(tmp_path / "resumed", model=lora(1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert losses_of(resumed) == losses_of(straight)
    assert_equal_weights(resumed.model, straight.model)


def test_losses_logged_less_often_than_saved_are_the_same_after_resuming(make_trainer, tmp_path):
    straight = make_trainer(tmp_path / "straight", logging_steps=3, save_steps=2)
    straight.train()
    resumed = make_trainer(tmp_path / "resumed", logging_steps=3, save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert losses_of(straight).keys() == {2, 3, 4}
    assert losses_of(resumed) == losses_of(straight)


def test_auto_starts_afresh_and_then_goes_on(make_trainer, tmp_path):
    first = make_trainer(tmp_path, max_steps=2)
    first.train(resume_from_checkpoint="auto")
    assert first.state.global_step == 2
    second = make_trainer(tmp_path, max_steps=4)
    steps = []
    second.add_callback(
        type("Steps", (TrainerCallback,), {"on_step_end": lambda self, a, s, c, **_: steps.append(s.global_step)})
    )
    second.train(resume_from_checkpoint="auto")
    assert steps == [3, 4]


def test_resuming_where_there_is_nothing_is_refused(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="has no whole checkpoint to resume from: pass 'auto'"):
        make_trainer(tmp_path / "empty").train(resume_from_checkpoint=True)


@pytest.mark.parametrize("family", ["qwen_vl", "qwen2_5_vl"])
def test_the_best_model_is_the_one_that_is_loaded_at_the_end(family, make_trainer, tmp_path):
    trainer = make_trainer(
        tmp_path,
        family,
        learning_rate=1.0,  # so high that the last model is not the best
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    weights = {}

    class Remember(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights[state.global_step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    trainer.add_callback(Remember())
    trainer.train()
    eval_losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(eval_losses, key=eval_losses.__getitem__)
    assert best < 4
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, weights[best][name]), name


def test_the_state_on_the_disk_names_the_best_checkpoint_where_it_lies(make_trainer, tmp_path):
    make_trainer(tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, max_steps=2).train()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")


# What is in a checkpoint


@pytest.fixture
def tokenizer():
    words = {f"w{i}": i for i in range(97)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0")


def test_every_checkpoint_holds_the_processor_and_can_be_loaded(make_trainer, tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, processing_class=tokenizer, max_steps=2, save_steps=1)
    trainer.train()
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        assert PreTrainedTokenizerFast.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    assert_equal_weights(type(trainer.model).from_pretrained(folder), trainer.model)


def test_save_model_exports_under_the_published_names(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "run", save_strategy="no", max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "export"))
    with safe_open(tmp_path / "export" / "model.safetensors", "pt") as file:
        assert "visual.patch_embed.proj.weight" in file.keys()  # noqa: SIM118 (not a dict)
    assert_equal_weights(type(trainer.model).from_pretrained(tmp_path / "export"), trainer.model)


def test_old_checkpoints_are_deleted_beyond_the_limit(make_trainer, tmp_path):
    make_trainer(tmp_path, save_steps=1, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]


def test_a_checkpoint_is_pushed_once_it_has_its_name(make_trainer, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self: None)
    monkeypatch.setattr(
        Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append((folder, what_is_missing(Path(folder))))
    )
    monkeypatch.setattr(Trainer, "_finish_current_push", lambda self: None)
    make_trainer(tmp_path, push_to_hub=True, max_steps=2).train()
    assert pushed == [(str(tmp_path / "checkpoint-2"), [])]


def test_weights_in_several_files_are_loaded_whole(build, tmp_path):
    model, other = build("qwen2_5_vl"), build("qwen2_5_vl", 1)
    model.save_pretrained(tmp_path, save_original_format=False, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    load_weights(other, tmp_path)
    assert_equal_weights(model, other)


def test_a_tied_head_need_not_be_in_the_file(build, tmp_path):
    def tied(seed):
        model = build("qwen_vl", seed)
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
        model.tie_weights()
        return model

    model, other = tied(0), tied(1)
    model.save_pretrained(tmp_path)
    load_weights(other, tmp_path)
    assert_equal_weights(model, other)


def test_each_tensor_keeps_its_own_dtype(build, tmp_path):
    model, other = build("qwen2_5_vl"), build("qwen2_5_vl", 1)
    for either in (model, other):
        either.model.visual.bfloat16()
    model.save_pretrained(tmp_path, save_original_format=False)
    load_weights(other, tmp_path)
    assert other.model.visual.dtype == torch.bfloat16
    assert other.lm_head.weight.dtype == torch.float32
    assert_equal_weights(model, other)


def test_weights_that_do_not_fit_are_refused_with_both_numbers(build, tmp_path):
    build("qwen2_5_vl").save_pretrained(tmp_path)  # under the published names
    with pytest.raises(
        ValueError, match=r"68 of its 69 tensors are not in the checkpoint .* and 68 of the checkpoint's"
    ):
        load_weights(build("qwen2_5_vl"), tmp_path)


# Checkpoints that are not whole


@pytest.fixture
def two_checkpoints(make_trainer, tmp_path):
    make_trainer(tmp_path).train()
    return tmp_path


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors"])
def test_a_checkpoint_that_lacks_a_file_is_ignored_and_reported(two_checkpoints, name, caplog):
    (two_checkpoints / "checkpoint-4" / name).unlink()
    with caplog.at_level(logging.WARNING, logger="trainers.checkpoints"):
        assert find_last_checkpoint(two_checkpoints) == two_checkpoints / "checkpoint-2"
    assert f"checkpoint-4: {name} is missing" in caplog.text


def test_a_file_that_was_cut_off_is_noticed(two_checkpoints):
    path = two_checkpoints / "checkpoint-4" / "optimizer.pt"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    assert what_is_missing(path.parent) == [f"optimizer.pt has {size - 1} bytes instead of {size}"]


def test_resuming_from_weights_under_other_names_is_refused(two_checkpoints, make_trainer):
    """What transformers' Trainer accepts with a warning, going on from the initial weights."""
    checkpoint = two_checkpoints / "checkpoint-4"
    trainer = make_trainer(two_checkpoints)
    trainer.model.save_pretrained(checkpoint)  # the published names
    sizes = json.loads((checkpoint / FILE_LIST).read_text())
    sizes["model.safetensors"] = (checkpoint / "model.safetensors").stat().st_size
    sizes["config.json"] = (checkpoint / "config.json").stat().st_size
    (checkpoint / FILE_LIST).write_text(json.dumps(sizes))
    with pytest.raises(ValueError, match="checkpoint-4 does not fit Qwen2_5_VLForConditionalGeneration"):
        trainer.train(resume_from_checkpoint=True)


def test_a_folder_without_its_file_list_is_no_checkpoint(two_checkpoints, make_trainer):
    (two_checkpoints / "checkpoint-4" / FILE_LIST).unlink()
    with pytest.raises(ValueError, match=f"checkpoint-4 is not a whole checkpoint .* {FILE_LIST} is missing"):
        make_trainer(two_checkpoints).train(resume_from_checkpoint=str(two_checkpoints / "checkpoint-4"))


def test_what_was_being_written_is_reported_and_removed_by_the_next_save(two_checkpoints, make_trainer, caplog):
    unfinished = unfinished_run_dir(two_checkpoints) / "checkpoint-6"
    shutil.copytree(two_checkpoints / "checkpoint-4", unfinished)
    with caplog.at_level(logging.WARNING, logger="trainers.checkpoints"):
        assert find_last_checkpoint(two_checkpoints) == two_checkpoints / "checkpoint-4"
    assert "stopped while writing it" in caplog.text
    make_trainer(two_checkpoints, max_steps=6).train(resume_from_checkpoint=True)
    assert sorted(path.name for path in two_checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_checkpoint_replaces_the_one_that_had_its_name(tmp_path):
    for content in ("first", "second"):
        folder = unfinished_run_dir(tmp_path) / "checkpoint-2"
        folder.mkdir(parents=True)
        (folder / "weights").write_text(content)
        finish(tmp_path, "checkpoint-2")
    assert (tmp_path / "checkpoint-2" / "weights").read_text() == "second"
    assert what_is_missing(tmp_path / "checkpoint-2") == []
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
