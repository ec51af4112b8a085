"""A recipe on two processes: its cache, its held-out questions and the model that it writes are those of one."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.trainers.two_process_runs import launch
from trainers.recipe_reading import load_recipe
from trainers.train import train

RECIPE_SCRIPT = """
import sys
from trainers.recipe_reading import load_recipe
from trainers.train import train
print(train(load_recipe("cpu_demo", sys.argv[1:])))
"""


@pytest.fixture
def recipe(model_folder, rows_file, tmp_path):
    def _recipe(name, *more):
        return [
            f"model.path={model_folder('qwen2_5_vl')}", f"data.train=[{{path: {rows_file}}}]",
            f"data.validation=[{{path: {rows_file}}}]", "data.picture_side=8", f"run.output_dir={tmp_path / name}",
            "optimizer.max_steps=4", "optimizer.global_batch_size=4", "run.evaluate_every=4", "run.answers=5",
            "run.save_every=2", *more,
        ]  # fmt: skip

    return _recipe


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(RECIPE_SCRIPT)
    return tmp_path / "script.py"


@pytest.mark.slow
def test_the_feature_cache_and_held_out_questions_work_on_two_processes(recipe, script, tmp_path):
    """The processes write one cache, and each asks its share: the answers stand in the file once, in their order."""
    cache = f"run.feature_cache_dir={tmp_path / 'features'}"
    launch(script, *recipe("two", "hardware.devices=2", "hardware.per_device_batch_size=1", cache))
    train(load_recipe("cpu_demo", recipe("one", "hardware.per_device_batch_size=2")))
    answers = {
        name: list(map(json.loads, (tmp_path / name / "answers" / "step-000004.jsonl").read_text().splitlines()))
        for name in ("one", "two")
    }
    assert [row["where"] for row in answers["two"]] == [row["where"] for row in answers["one"]]
    assert len(answers["two"]) == 5
    assert [row["answer"] for row in answers["two"]] == [row["answer"] for row in answers["one"]]
    assert len(list((tmp_path / "features").rglob("*.safetensors"))) == 12  # one file per picture
    assert not list((tmp_path / "features").rglob("*.tmp"))


@pytest.mark.slow
def test_a_recipe_with_full_sharding_saves_evaluates_and_writes_a_model_for_one_process(recipe, script, tmp_path):
    sharded = ["hardware.devices=2", "hardware.per_device_batch_size=1", "hardware.sharding=full"]
    launch(script, *recipe("sharded", *sharded))
    copied = train(load_recipe("cpu_demo", recipe("one", "hardware.per_device_batch_size=2")))
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "sharded" / "final").state_dict()
    theirs = AutoModelForImageTextToText.from_pretrained(copied).state_dict()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-4, msg=name)
