"""A recipe, run: the same weights by every way of starting it, and refusals before anything is trained."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, set_seed

from processing.mixing import Mixture
from processing.processing_families import load_processor
from processing.rows import read_rows
from trainers import recipe_rollouts
from trainers.families import find_parts, unwrap
from trainers.recipe_arguments import ARGUMENT_OF, SCHEDULERS, stage_arguments
from trainers.recipe_reading import load_recipe
from trainers.sft import QwenVLSFTTrainer
from trainers.train import build_trainer, train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings(model_folder, rows_file, tmp_path):
    """settings("qwen2_5_vl", ...) -> overrides of cpu_demo for three small steps on the folder and the rows."""

    def _settings(family="qwen2_5_vl", *more):
        return [
            f"model.path={model_folder(family)}",
            f"data.train=[{{path: {rows_file}}}]",
            "data.picture_side=8",
            f"run.output_dir={tmp_path / 'run'}",
            "optimizer.max_steps=3",
            "optimizer.global_batch_size=4",
            "hardware.per_device_batch_size=2",
            *more,
        ]

    return _settings


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("family", ["qwen_vl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_recipe_trains_what_it_says_and_writes_a_folder_that_loads(settings, family, model_folder, tmp_path):
    final = train(load_recipe("cpu_demo", settings(family)))
    before = AutoModelForImageTextToText.from_pretrained(model_folder(family))
    after = AutoModelForImageTextToText.from_pretrained(final)
    part_of = find_parts(before).part_of
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert {part_of[name] for name in changed} == {"adapter", "language_model", "embeddings"}
    assert load_processor(final).model_size(100, 100) == (8, 8)
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == load_recipe("cpu_demo", settings(family))


def test_python_without_a_recipe_gives_the_same_weights(settings, tmp_path):
    """The ten lines of docs/recipes.md."""
    final = train(load_recipe("cpu_demo", settings()))

    recipe = load_recipe("cpu_demo", settings("qwen2_5_vl", f"run.output_dir={tmp_path / 'by_hand'}"))
    set_seed(0)
    trainer = QwenVLSFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(recipe.model.path, dtype=torch.float32),
        args=stage_arguments(recipe),
        train_dataset=list(read_rows(recipe.data.train[0].path)),
        processing_class=load_processor(recipe.model.path),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "by_hand" / "final"))

    theirs, ours = weights(tmp_path / "by_hand" / "final"), weights(final)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_the_command_the_module_and_python_give_the_same_weights(settings, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: cpu_demo\noptimizer: {learning_rate: 3e-3}\n")
    folders = {}
    commands = {
        "module": [sys.executable, "-m", "trainers.train", str(path)],
        "command": [sys.executable, "-c", "from trainers.cli import app; app()", "train", str(path)],
    }
    for name, command in commands.items():
        folders[name] = tmp_path / name / "final"
        overrides = settings("qwen2_5_vl", f"run.output_dir={tmp_path / name}")
        if name == "command":
            overrides = [word for override in overrides for word in ("--set", override)]
        subprocess.run([*command, *overrides], cwd=ROOT, check=True, capture_output=True)
    folders["python"] = train(load_recipe(path, settings("qwen2_5_vl", f"run.output_dir={tmp_path / 'python'}")))
    reference = weights(folders["python"])
    for folder in folders.values():
        assert all(torch.equal(tensor, reference[name]) for name, tensor in weights(folder).items())


def test_lora_beside_a_whole_adapter_is_trained_and_saved_as_an_adapter_folder(settings, model_folder):
    parts = "parts={adapter: {train: full}, language_model: {train: lora}, embeddings: {train: new_tokens}}"
    recipe = load_recipe("cpu_demo", settings("qwen2_5_vl", parts, "lora={rank: 2}", "model.new_tokens=['<cell>']"))
    final = train(recipe)
    settings_saved = json.loads((final / "adapter_config.json").read_text())
    processor = load_processor(final)
    assert set(settings_saved["trainable_token_indices"]) == {"model.language_model.embed_tokens", "lm_head"}
    assert settings_saved["trainable_token_indices"]["lm_head"] == [
        processor.tokenizer.convert_tokens_to_ids("<cell>")
    ]
    assert settings_saved["base_model_name_or_path"] == str(model_folder("qwen2_5_vl"))


def test_qlora_runs_from_a_recipe(settings):
    parts = ["parts.language_model={train: lora, checkpointing: true}", "parts.embeddings.train=frozen"]
    recipe = load_recipe("cpu_demo", settings("qwen2_5_vl", *parts, "lora={rank: 2}", "model.quantization=nf4"))
    trainer = build_trainer(recipe)
    assert isinstance(trainer.model, PeftModel)
    losses = trainer.train().training_loss
    assert 0 < losses < 10


def test_checkpointing_is_switched_on_in_the_parts_that_ask_for_it_only(settings):
    more = ["parts.language_model.checkpointing=true", "parts.tower={train: full}"]
    base = unwrap(build_trainer(load_recipe("cpu_demo", settings("qwen2_5_vl", *more))).model)
    assert base.model.language_model.is_activation_checkpointing
    assert not base.model.visual.is_activation_checkpointing


def test_what_learns_is_held_in_another_dtype_than_what_is_frozen(settings):
    more = ["model.dtype=bfloat16", "hardware.precision=bfloat16"]
    trainer = build_trainer(load_recipe("cpu_demo", settings("qwen2_5_vl", *more)))
    dtypes = {(p.requires_grad, p.dtype) for p in trainer.model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert trainer.train().training_loss > 0


def test_packed_rows_fill_sequences_and_train(settings):
    more = ["stage=multitask", "data.packing=true", "data.max_length=120", "parts.tower={train: full}",
            "optimizer.global_batch_size=2"]  # fmt: skip
    trainer = build_trainer(load_recipe("cpu_demo", settings("qwen2_5_vl", *more)))
    sequences = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    assert sum(map(len, sequences)) == 12
    assert len(sequences) < 12
    lengths = [sum(example.length for example in sequence) for sequence in sequences]
    assert max(lengths) <= 120
    assert trainer.data_collator(sequences[:2])["input_ids"].shape == (1, lengths[0] + lengths[1])
    assert trainer.train().training_loss > 0


def test_files_of_different_weight_become_a_mixture(settings, rows_file):
    mixed = f"data.train=[{{path: {rows_file}, weight: 3}}, {{path: {rows_file}}}]"
    assert isinstance(build_trainer(load_recipe("cpu_demo", settings("qwen2_5_vl", mixed))).train_dataset, Mixture)
    alike = f"data.train=[{{path: {rows_file}}}, {{path: {rows_file}}}]"
    dataset = build_trainer(load_recipe("cpu_demo", settings("qwen2_5_vl", alike))).train_dataset
    assert len(dataset) == 24


def test_rows_that_are_too_long_are_refused_or_left_out_as_the_recipe_says(settings, rows_file, tmp_path):
    with rows_file.open("a") as file:
        turns = [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]
        file.write(json.dumps({"messages": turns}) + "\n")
    dropped = build_trainer(load_recipe("cpu_demo", settings("qwen2_5_vl", "data.too_long=drop")))
    assert len(dropped.train_dataset) == 12
    refused = build_trainer(load_recipe("cpu_demo", settings()))
    with pytest.raises(ValueError, match=r"rows\.jsonl:13: 3\d\d tokens .*max_length is 256"):
        refused.data_collator([refused.train_dataset[12]])


def test_held_out_rows_are_evaluated(settings, rows_file):
    more = [f"data.validation=[{{path: {rows_file}}}]", "run.evaluate_every=2", "run.answers=3"]
    trainer = build_trainer(load_recipe("cpu_demo", settings("qwen2_5_vl", *more)))
    assert len(trainer.generation.examples) == 3
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 3]
    assert any("exact_match" in name for entry in trainer.state.log_history for name in entry)


def test_a_frozen_tower_s_features_are_kept_where_the_recipe_says(settings, tmp_path):
    trainer = build_trainer(
        load_recipe("cpu_demo", settings("qwen2_5_vl", f"run.feature_cache_dir={tmp_path / 'features'}"))
    )
    trainer.train()
    assert trainer.feature_cache.misses > 0
    assert list((tmp_path / "features").rglob("*"))


def test_stages_one_and_two_train_on_plain_text_without_roles(settings):
    for stage, marker in [("pretrain", 0), ("sft", 2)]:
        parts = "parts={tower: {train: full}, adapter: {train: full}}"
        trainer = build_trainer(load_recipe("cpu_demo", settings("qwen2_5_vl", f"stage={stage}", parts)))
        ids = trainer.data_collator([trainer.train_dataset[0]])["input_ids"]
        start = trainer.processing_class.tokenizer.convert_tokens_to_ids("<|im_start|>")
        assert (ids == start).sum() == marker


@pytest.mark.slow
def test_a_run_stopped_in_the_middle_goes_on_to_the_same_weights(settings, tmp_path, train_until_step_three):
    steps = ["optimizer.max_steps=4", "run.save_every=2"]
    whole = train(load_recipe("cpu_demo", settings("qwen2_5_vl", *steps)))

    recipe = load_recipe("cpu_demo", settings("qwen2_5_vl", *steps, f"run.output_dir={tmp_path / 'stopped'}"))
    train_until_step_three(build_trainer(recipe))
    with pytest.raises(ValueError, match="holds checkpoints already: pass --resume"):
        train(recipe)
    ours, theirs = weights(train(recipe, resume=True)), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.path=''"], "names no model: set model.path"),
        (["data.train=[]"], "names no rows: set data.train"),
        (["hardware.devices=2"], r"is for 2 device\(s\), this run has 1: start it with `torchrun --nproc-per-node 2"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused(settings, more, message):
    with pytest.raises(ValueError, match=message):
        train(load_recipe("cpu_demo", settings("qwen2_5_vl", *more)))


# Recipe -> TrainingArguments


def test_the_paper_s_numbers_reach_the_trainer(tmp_path):
    recipe = load_recipe("paper_pretrain", ["hardware.per_device_batch_size=20", f"run.output_dir={tmp_path}"])
    arguments = stage_arguments(recipe)
    assert (arguments.learning_rate, arguments.warmup_steps, arguments.max_steps) == (2e-4, 500, 50_000)
    assert arguments.lr_scheduler_kwargs == {"min_lr_rate": pytest.approx(1e-6 / 2e-4)}
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon) == (0.9, 0.98, 1e-6)
    assert (arguments.weight_decay, arguments.max_grad_norm, arguments.tower_layer_decay) == (0.05, 1.0, 0.95)
    assert arguments.train_batch_size * arguments.gradient_accumulation_steps == 30_720
    assert arguments.bf16


@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_the_schedule_ends_where_the_recipe_says(schedule, settings):
    lowest = 1e-4 if schedule == "cosine" else 0.0
    more = [f"optimizer={{learning_rate: 1e-3, min_learning_rate: {lowest}, schedule: {schedule}, warmup_steps: 4, "
            "max_steps: 20}"]  # fmt: skip
    trainer = build_trainer(load_recipe("cpu_demo", settings("qwen2_5_vl", *more)))
    trainer.create_optimizer_and_scheduler(20)
    rates = []
    for _ in range(21):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[:5] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3])
    end = {"cosine": 1e-4, "linear": 0.0, "constant": 1e-3}[schedule]
    assert rates[20] == pytest.approx(end, abs=1e-12)
    if schedule == "cosine":
        assert rates[12] == pytest.approx((1e-3 + 1e-4) / 2)  # half way between 4 and 20


def test_no_key_of_a_recipe_is_read_by_nobody():
    from trainers.recipe_reading import _keys
    from trainers.recipes import Recipe

    sources = "".join(
        path.read_text()
        for path in (ROOT / "trainers").glob("*.py")
        if path.name not in ("recipes.py", "contradictions.py", "recipe_reading.py", "recipe_arguments.py")
    ) + (ROOT / "trainers" / "recipe_arguments.py").read_text().replace('"', " ")
    read = {"data.train", "data.validation", *ARGUMENT_OF}
    read |= {f"sampling.{name}" for name in recipe_rollouts.ARGUMENT_OF}
    read |= {f"sampling.values.{name}" for name in recipe_rollouts.VALUE_ARGUMENT_OF}
    for key in _keys(Recipe):
        name = key.rsplit(".", 1)[-1]
        assert key in read or f".{name}" in sources, key
