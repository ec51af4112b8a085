"""Two processes over gloo equal one with the same global batch: every stage under DDP, stages 2 and 3 under FSDP2.

Half of the rows have no picture and the rows keep their order, so that process 0 never sees one. A launch runs all its
cases, since importing torch is what takes time.
"""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, set_seed
from trl import GRPOConfig

from processing.example import Example, Source
from processing.processing_families import load_processor
from trainers.arguments import StageArguments
from trainers.dpo import QwenVLDPOTrainer
from trainers.dpo_arguments import DPOArguments
from trainers.grpo import QwenVLGRPOTrainer
from trainers.multitask import QwenVLMultiTaskTrainer
from trainers.pretrain import QwenVLPretrainTrainer
from trainers.recipe_reading import load_recipe
from trainers.rewards import RewardTerm
from trainers.sft import QwenVLSFTTrainer
from trainers.train import train

TRAINERS = {
    "pretrain": QwenVLPretrainTrainer,
    "multitask": QwenVLMultiTaskTrainer,
    "sft": QwenVLSFTTrainer,
}
FAMILIES = ("qwen_vl", "qwen2_5_vl")
DDP = [(family, stage) for family in FAMILIES for stage in TRAINERS]
FSDP = [(family, stage) for family in FAMILIES for stage in ("multitask", "sft")]
SETTINGS = {
    "max_steps": 2, "gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 0.1, "logging_steps": 1,
    "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "report_to": "none", "tower_layer_decay": 1.0,
    "train_sampling_strategy": "sequential", "dataloader_pin_memory": False,
}  # fmt: skip
PREFERENCE_SETTINGS = {name: value for name, value in SETTINGS.items() if name != "tower_layer_decay"} | {
    "learning_rate": 1.0,
    "activation_checkpointing": False,
}

# argv: folder, "ddp" or "fsdp", the cases.
SCRIPT = """
import json, sys
tests, folder, engine, cases, settings = sys.argv[1:]
sys.path.insert(0, tests)
import conftest, torch
import test_two_processes as here
from trainers.arguments import StageArguments

for family, stage in json.loads(cases):
    output = f"{folder}/{family}-{stage}"
    trainer = here.make_trainer(conftest.BUILDERS, conftest._row, conftest._collate, family, stage, output, batch=1,
                                **json.loads(settings))
    trainer.train()
    state = trainer.accelerator.get_state_dict(trainer.model)
    shards = [type(p).__name__ for p in trainer.model.parameters()]
    trainer.save_model(output)
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        torch.save((losses, state, shards), output + "/result.pt")
"""


def make_trainer(builders, make_row, collate, family, stage, output, batch, **settings):
    set_seed(0)
    model = builders[family]()
    rows = [make_row(family, seed, 5 + 3 * (seed % 4), pictures=seed % 2) for seed in range(8)]
    arguments = StageArguments(output_dir=str(output), per_device_train_batch_size=batch, **SETTINGS, **settings)
    return TRAINERS[stage](model, arguments, train_dataset=rows, data_collator=collate)


def launch(script, *arguments, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone", script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def run_cases(folder, engine, cases, **settings):
    (folder / "script.py").write_text(SCRIPT)
    tests = str(Path(__file__).parent)
    launch(folder / "script.py", tests, folder, engine, json.dumps(cases), json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return run_cases(tmp_path_factory.mktemp("ddp"), "ddp", DDP)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    return run_cases(tmp_path_factory.mktemp("fsdp"), "fsdp", FSDP, fsdp=True)


@pytest.fixture
def alone(build, row_of, collate, tmp_path):
    """alone(family, stage) -> losses and weights of one process that takes both processes' rows at once."""

    def _alone(family, stage):
        trainer = make_trainer({family: lambda: build(family)}, row_of, collate, family, stage, tmp_path, batch=2)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, trainer.model.state_dict()

    return _alone


def assert_same(folder, case, alone):
    losses, weights, shards = torch.load(folder / "-".join(case) / "result.pt")
    expected_losses, expected = alone(*case)
    assert losses == pytest.approx(expected_losses, abs=1e-4)
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-4, msg=name)
    return weights, shards


@pytest.mark.slow
@pytest.mark.parametrize("case", DDP, ids="-".join)
def test_a_stage_under_ddp_equals_one_process_with_the_same_global_batch(ddp, case, alone):
    _, shards = assert_same(ddp, case, alone)
    assert set(shards) == {"Parameter"}


@pytest.mark.slow
@pytest.mark.parametrize("case", FSDP, ids="-".join)
def test_a_stage_under_fsdp2_equals_one_process_and_its_save_reloads_in_one(fsdp, case, alone):
    weights, shards = assert_same(fsdp, case, alone)
    assert set(shards) == {"DTensor"}  # it was sharded, and not copied
    loaded = AutoModelForImageTextToText.from_pretrained(fsdp / "-".join(case))
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in weights.items())


PREFERENCE_SCRIPT = """
import sys
tests, folder, *models = sys.argv[1:]
sys.path.insert(0, tests)
import torch
import test_two_processes as here

for number, model in enumerate(models):
    trainer = here.make_dpo_trainer(model, f"{folder}/{number}", batch=1)
    trainer.train()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        torch.save((losses, trainer.accelerator.unwrap_model(trainer.model).state_dict()), f"{folder}/{number}.pt")
"""


def make_dpo_trainer(folder, output, batch):
    rows = []
    for number in range(8):
        picture = [{"type": "image", "image": Image.new("RGB", (8, 8), (30 * number,) * 3)}] * (number % 2)
        content = [*picture, {"type": "text", "text": "How bright?" + "?" * number}]
        rows.append(
            Example(
                [{"role": "user", "content": content}],
                kind="preference",
                chosen=[{"role": "assistant", "content": f"{number} of 255"}],
                rejected=[{"role": "assistant", "content": "dark" * (number % 3 + 1)}],
            )
        )
    set_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    arguments = DPOArguments(str(output), per_device_train_batch_size=batch, bf16=False, **PREFERENCE_SETTINGS)
    return QwenVLDPOTrainer(model, arguments, rows, processing_class=load_processor(folder))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dpo", "grpo"])
def test_preference_training_under_ddp_equals_one_process_with_the_same_global_batch(
    model_folder, tmp_path, algorithm
):
    make_trainer = {"dpo": make_dpo_trainer, "grpo": make_grpo_trainer}[algorithm]
    (tmp_path / "script.py").write_text(PREFERENCE_SCRIPT.replace("make_dpo_trainer", make_trainer.__name__))
    folders = [str(model_folder(family)) for family in FAMILIES]
    launch(tmp_path / "script.py", str(Path(__file__).parent), tmp_path, *folders)
    for number, folder in enumerate(folders):
        losses, weights = torch.load(tmp_path / f"{number}.pt")
        trainer = make_trainer(folder, tmp_path / "alone", batch=2)
        before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
        trainer.train()
        assert losses == pytest.approx([e["loss"] for e in trainer.state.log_history if "loss" in e], abs=1e-4)
        for name, weight in trainer.model.state_dict().items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-4, msg=name)
        assert max((weights[name] - weight).abs().max() for name, weight in before.items()) > 1e-2


G = 3  # completions per prompt


class InjectedGRPO(QwenVLGRPOTrainer):
    """GRPO on completions that the prompt and the place in its group decide, whichever process writes them."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        end = self._tokenizer.convert_tokens_to_ids("<|im_end|>")
        seeds = [zlib.crc32(f"{len(ids)} {place % G}".encode()) for place, ids in enumerate(prompt_ids)]
        made = [[65 + (seed >> shift) % 23 for shift in range(1 + seed % 7)] + [end] for seed in seeds]
        return made, None


def spread(completion_ids, **_):
    """A reward that every completion gets another value of."""
    return [sum(ids) % 17 / 17 + len(ids) / 10 for ids in completion_ids]


def make_grpo_trainer(folder, output, batch):
    rows = []
    for number in range(8):
        picture = [{"type": "image", "image": Image.new("RGB", (8, 8), (30 * number,) * 3)}] * (number % 2)
        content = [*picture, {"type": "text", "text": "How bright" + "?" * number}]
        source = Source("rows.jsonl", number + 1)
        rows.append(Example([{"role": "user", "content": content}], kind="reward", solution="1", source=source))
    set_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    arguments = GRPOConfig(
        str(output), per_device_train_batch_size=batch * G, num_generations=G, max_completion_length=9, bf16=False,
        **{name: value for name, value in PREFERENCE_SETTINGS.items() if name != "train_sampling_strategy"},
    )  # fmt: skip
    return InjectedGRPO(model, [RewardTerm("spread", function=spread)], arguments, rows, load_processor(folder))


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


def test_sharding_on_one_process_is_refused(build, collate, make_rows, tmp_path):
    with pytest.raises(ValueError, match=r"did not turn it on for 1 cpu process\(es\): every"):
        make_trainer(
            {"qwen_vl": lambda: build("qwen_vl")},
            lambda *_, **__: {},
            collate,
            "qwen_vl",
            "sft",
            tmp_path,
            1,
            fsdp=True,
        )
