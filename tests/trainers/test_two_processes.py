"""Two processes over gloo equal one with the same global batch: every stage under DDP, stages 2 and 3 under FSDP2.

Half of the rows have no picture and the rows keep their order, so that process 0 never sees one. A launch runs all its
cases, since importing torch is what takes time.
"""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, set_seed

from tests.trainers.two_process_runs import FAMILIES, SETTINGS, launch
from trainers.arguments import StageArguments
from trainers.lora import load_lora, whole_modules
from trainers.multitask import QwenVLMultiTaskTrainer
from trainers.pretrain import QwenVLPretrainTrainer
from trainers.sft import QwenVLSFTTrainer

TRAINERS = {
    "pretrain": QwenVLPretrainTrainer,
    "multitask": QwenVLMultiTaskTrainer,
    "sft": QwenVLSFTTrainer,
}
DDP = [(family, stage) for family in FAMILIES for stage in TRAINERS]
FSDP = [(family, stage) for family in FAMILIES for stage in ("multitask", "sft")]

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
    arguments = StageArguments(output_dir=str(output), per_device_train_batch_size=batch, **SETTINGS | settings)
    return TRAINERS[stage](model, arguments, train_dataset=rows, data_collator=collate)


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


# Two steps with SGD, to compare with one process; four with AdamW; and the last two of these from a checkpoint.
RESUME_SCRIPT = """
import json, sys
tests, folder, cases = sys.argv[1:]
sys.path.insert(0, tests)
import conftest, torch
import test_two_processes as here

def make(name, family, kind, **settings):
    build = {family: here.BUILD[kind](conftest.BUILDERS[family])}
    return here.make_trainer(build, conftest._row, conftest._collate, family, "sft", f"{folder}/{name}", batch=1,
                             fsdp=True, **settings)

for family, kind in json.loads(cases):
    case = f"{family}-{kind}"
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
    results = []
    for settings, checkpoint in (({}, None), (steps, None), (steps, f"{folder}/{case}/checkpoint-2")):
        trainer = make(case, family, kind, **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((losses, state, {type(p).__name__ for p in trainer.model.parameters()}))
    trainer.save_model(f"{folder}/{case}/final")
    if trainer.is_world_process_zero():
        torch.save(results, f"{folder}/{case}.pt")
"""


def with_lora_and_adapter(model):
    set_seed(7)
    layers = r"model\.language_model\..*\.(q|v)_proj"
    return get_peft_model(
        model, LoraConfig(r=2, target_modules=layers, modules_to_save=whole_modules(model, ["adapter"]))
    )


BUILD = {
    "full": lambda build: build,
    "lora": lambda build: lambda: with_lora_and_adapter(build()),
}
RESUMED = [("qwen_vl", "full"), ("qwen2_5_vl", "full"), ("qwen2_5_vl", "lora")]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    (folder / "script.py").write_text(RESUME_SCRIPT)
    launch(folder / "script.py", str(Path(__file__).parent), folder, json.dumps(RESUMED))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED, ids="-".join)
def test_a_sharded_run_goes_on_from_its_checkpoint_bit_for_bit(resumed, case):
    _, (losses, whole, _), (losses_again, again, shards) = torch.load(resumed / f"{'-'.join(case)}.pt")
    assert shards == {"DTensor"}
    assert losses_again == losses
    assert len(set(losses)) == 4
    assert whole.keys() == again.keys()
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())


@pytest.mark.slow
def test_lora_beside_a_whole_adapter_under_fsdp2_equals_one_process_and_reloads(
    resumed, build, row_of, collate, tmp_path
):
    (losses, weights, _), _, (_, last, _) = torch.load(resumed / "qwen2_5_vl-lora.pt")
    builders = {"qwen2_5_vl": lambda: with_lora_and_adapter(build("qwen2_5_vl"))}
    alone = make_trainer(builders, row_of, collate, "qwen2_5_vl", "sft", tmp_path, batch=2)
    before = {name: weight.clone() for name, weight in alone.model.state_dict().items()}
    alone.train()
    assert losses == pytest.approx([e["loss"] for e in alone.state.log_history if "loss" in e], abs=1e-4)
    moved = 0
    for name, weight in alone.model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-4, msg=name)
        moved = max(moved, (before[name] - weight).abs().max())
    assert moved > 1e-2
    reloaded = load_lora(build("qwen2_5_vl"), resumed / "qwen2_5_vl-lora" / "final").state_dict()
    assert reloaded.keys() == last.keys()
    assert all(torch.equal(reloaded[name], weight) for name, weight in last.items())


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
