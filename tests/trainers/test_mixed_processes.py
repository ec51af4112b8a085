"""Rows of text, pictures and video on two processes, one of which never has a picture: no hang, and the same weights.

The recipes run as `torchrun -m trainers.train` runs them, but with the rows in their order: process 0 gets text alone,
process 1 pictures and videos. One launch runs several cases, since importing torch is what takes time.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from trainers.blank_pictures import tower_in_every_forward
from trainers.families import find_parts
from trainers.recipe_reading import load_recipe
from trainers.train import build_trainer

FAMILY = "qwen2_5_vl"
CHECKPOINTED = "language_model: {train: full, checkpointing: true}"
# Name -> overrides of the recipe cpu_demo.
CASES = {
    "frozen tower": [],
    "frozen tower, LoRA": [
        "parts={adapter: {train: full}, language_model: {train: lora, checkpointing: true},"
        " embeddings: {train: frozen}}",
        "lora={rank: 2, dropout: 0.0}",
    ],
    "trained tower": ["parts.tower.train=full"],
    "trained tower, recomputed": [
        f"parts={{tower: {{train: full, checkpointing: true}}, adapter: {{train: full}}, {CHECKPOINTED}}}"
    ],
}
SHARDED = ["parts.tower.train=full", "hardware.sharding=full"]
PACKED = ["parts.tower.train=full", "data.packing=true", "data.max_length=200"]

SCRIPT = """
import json, sys, torch
from trainers.recipe_reading import load_recipe
from trainers.train import build_trainer

for name, settings in json.load(open(sys.argv[1])):
    trainer = build_trainer(load_recipe("cpu_demo", settings))
    trainer.args.train_sampling_strategy = "sequential"
    trainer.args.disable_tqdm = True
    seen = []
    inner = trainer.compute_loss
    def compute_loss(model, inputs, **kwargs):
        seen.append(sorted({"pixel_values", "pixel_values_videos"} & set(inputs)))
        return inner(model, inputs, **kwargs)
    trainer.compute_loss = compute_loss
    trainer.train()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # under FSDP whole, on process 0 alone
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    torch.save((seen, weights), f"{sys.argv[2]}/{name}-{trainer.args.process_index}.pt")
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Text, picture, text, video, ...: 12 rows."""
    folder = tmp_path_factory.mktemp("mixed")
    lines = []
    for number in range(6):
        lines.append({"prefix": f"{number} + 1?", "suffix": f"It is {number + 1}."})
        frames = []
        for frame in range(4):
            frames.append(f"{number}-{frame}.png")
            Image.new("RGB", (8, 8), (40 * number, 60 * frame, 9)).save(folder / frames[-1])
        shown = {"image": frames[0]} if number % 2 == 0 else {"video": frames}
        lines.append({**shown, "prefix": "What is it?", "suffix": "A colour."})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def settings(rows, model_folder, tmp_path_factory):
    def _settings(overrides, devices):
        return [
            f"model.path={model_folder(FAMILY)}",
            f"data.train=[{{path: {rows}}}]",
            "data.picture_side=8",
            f"run.output_dir={tmp_path_factory.mktemp('run')}",
            "optimizer.max_steps=3",
            "optimizer.global_batch_size=4",
            "optimizer.learning_rate=1e-3",
            f"hardware.per_device_batch_size={2 // devices}",
            f"hardware.devices={devices}",
            *overrides,
        ]

    return _settings


def launch(cases, folder):
    (folder / "script.py").write_text(SCRIPT)
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               str(folder / "script.py"), str(folder / "cases.json"), str(folder)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def on_two_processes(settings, tmp_path_factory):
    """Case -> [(pictures seen at each forward, weights) of each process]."""
    folder = tmp_path_factory.mktemp("two")
    cases = {name: settings(overrides, 2) for name, overrides in {**CASES, "packed": PACKED}.items()}
    launch(list(cases.items()), folder)
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)] for name in cases}


def assert_like_one_process(weights, settings, overrides):
    trainer = build_trainer(load_recipe("cpu_demo", settings(overrides, 1)))
    trainer.args.train_sampling_strategy = "sequential"
    trainer.train()
    alone = trainer.model.state_dict()
    assert alone.keys() == weights.keys()
    for name, weight in alone.items():
        torch.testing.assert_close(weights[name], weight, atol=5e-5, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_weights_of_one_though_one_has_no_pictures(on_two_processes, settings, case):
    (seen_0, weights_0), (seen_1, weights_1) = on_two_processes[case]
    assert seen_0 == [[]] * 6
    assert seen_1 == [["pixel_values"], ["pixel_values_videos"]] * 3
    assert all(torch.equal(weights_0[name], weights_1[name]) for name in weights_0)
    assert_like_one_process(weights_0, settings, CASES[case])


@pytest.mark.slow
def test_sharded_weights_come_out_as_those_of_one_process_too(settings, tmp_path):
    """If the tower did not run on process 0, it would gather the language model's weights while process 1 gathers the
    tower's."""
    launch([("sharded", settings(SHARDED, 2))], tmp_path)
    (seen_0, weights), (seen_1, _) = (torch.load(tmp_path / f"sharded-{rank}.pt") for rank in (0, 1))
    assert seen_0 == [[]] * 6
    assert seen_1 == [["pixel_values"], ["pixel_values_videos"]] * 3
    assert_like_one_process(weights, settings, ["parts.tower.train=full"])


@pytest.mark.slow
def test_packed_rows_train_on_two_processes(on_two_processes):
    (seen_0, weights_0), (seen_1, weights_1) = on_two_processes["packed"]
    assert len(seen_0) == len(seen_1) == 6
    assert all(torch.equal(weights_0[name], weights_1[name]) for name in weights_0)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_batch_of_text_reaches_every_weight_of_the_vision_parts_with_a_gradient_of_zero(build, family):
    """A weight without any gradient on one process would be left out of what the others add up (Qwen3-VL's further
    mergers)."""
    model = build(family)
    parts = find_parts(model)
    ids = torch.tensor([[3, 4, 5, 6]])
    with tower_in_every_forward(parts, is_sharded=True):
        model(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids), labels=ids).loss.backward()
    for part in ("tower", "adapter"):
        for name, weight in parts.parameters(part):
            assert weight.grad is not None, name
            assert not weight.grad.any(), name
