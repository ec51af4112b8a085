"""The commands: what they print, how they refuse, and their exit codes."""

import json

import pytest
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from trainers.cli import app
from trainers.lora import add_lora
from trainers.recipe_reading import load_recipe


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def small(model_folder, rows_file, tmp_path):
    """--set words for one step of cpu_demo on the tiny model."""
    settings = [
        f"model.path={model_folder('qwen2_5_vl')}",
        f"data.train=[{{path: {rows_file}}}]",
        "data.picture_side=8",
        f"run.output_dir={tmp_path / 'run'}",
        "optimizer.max_steps=1",
        "optimizer.global_batch_size=2",
        "hardware.per_device_batch_size=2",
    ]
    return [word for setting in settings for word in ("--set", setting)]


def test_train_writes_the_weights_and_says_where(run, small, tmp_path):
    result = run("train", "cpu_demo", *small)
    assert result.exit_code == 0, result.output
    assert f"Weights: {tmp_path / 'run' / 'final'}" in result.output
    AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "final")
    again = run("train", "cpu_demo", *small)
    assert again.exit_code == 2
    assert "holds checkpoints already: pass --resume" in again.stderr
    assert run("train", "cpu_demo", *small, "--resume").exit_code == 0


@pytest.mark.parametrize("command", ["train", "estimate"])
def test_a_wrong_key_is_one_line_and_exit_code_two(run, command):
    result = run(command, "cpu_demo", "--set", "optimizer.learning_rte=1")
    assert result.exit_code == 2
    assert result.stderr == (
        "cpu_demo: optimizer.learning_rte is not a key of a recipe. Nearest: optimizer.learning_rate.\n"
    )


def test_estimate_says_part_by_part_what_is_needed_and_whether_it_fits(run, small):
    result = run("estimate", "cpu_demo", *small)
    assert result.exit_code == 0, result.output
    for part in ("tower", "adapter", "language_model", "embeddings", "head and loss", "all tensors"):
        assert part in result.output
    assert "Fits 8 GiB: 1.0 GiB needed." in result.output
    assert "Fits: T4, RTX 3090, RTX 4090" in result.output
    assert "Fits T4 (15 GiB)" in run("estimate", "cpu_demo", *small, "--gpu", "T4").output


def test_estimate_exits_with_one_where_it_does_not_fit(run, small):
    result = run("estimate", "cpu_demo", *small, "--set", "hardware.memory_gib=0.5")
    assert result.exit_code == 1
    assert "Does not fit 0.5 GiB" in result.output


def test_an_unknown_gpu_is_refused_with_those_there_are(run, small):
    result = run("estimate", "cpu_demo", *small, "--gpu", "Voodoo 2")
    assert result.exit_code == 2
    assert "Voodoo 2 is not in the table of GPUs: T4, RTX 3090" in result.stderr


def test_merge_says_what_became_of_each_tensor(run, model_folder, tmp_path):
    base = model_folder("qwen2_5_vl")
    recipe = load_recipe("cpu_demo", ["parts.language_model.train=lora", "parts.embeddings.train=frozen",
                                      "lora={rank: 2}"])  # fmt: skip
    add_lora(AutoModelForImageTextToText.from_pretrained(base), recipe).save_pretrained(tmp_path / "adapter")
    result = run("merge", tmp_path / "adapter", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    assert "69 tensors: 50 copied, 14 merged, 5 replaced" in result.output
    assert json.loads((tmp_path / "merged" / "processor_config.json").read_text())["processor_class"]
    again = run("merge", tmp_path / "adapter", tmp_path / "merged")
    assert (again.exit_code, again.stderr) == (2, f"{tmp_path / 'merged'} is not empty: give another folder.\n")


def test_help_is_quick_because_heavy_imports_wait():
    import subprocess
    import sys

    code = "import sys, trainers.cli; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
