"""Two processes over gloo equal one with the same global batch: every stage under DDP, stages 2 and 3 under FSDP2.

Half of the rows have no picture and the rows keep their order, so that process 0 never sees one. A launch runs all its
cases, since importing torch is what takes time.
"""

import json
import os
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, set_seed
from trl import GRPOConfig

from processing.example import Example, Source
from processing.processing_families import load_processor
from trainers.arguments import StageArguments
from trainers.dpo import QwenVLDPOTrainer
from trainers.dpo_arguments import DPOArguments
from trainers.families import unwrap
from trainers.grpo import QwenVLGRPOTrainer
from trainers.lora import load_lora, whole_modules
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
    arguments = StageArguments(output_dir=str(output), per_device_train_batch_size=batch, **SETTINGS | settings)
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


PREFERENCE_SCRIPT = """
import sys
tests, algorithm, folder, cases = sys.argv[1:]
sys.path.insert(0, tests)
import json, torch
import test_two_processes as here

for name, (model, settings) in json.loads(cases).items():
    trainer = here.PREFERENCES[algorithm](model, f"{folder}/{name}", batch=1, **settings)
    trainer.train()
    state = trainer.accelerator.get_state_dict(trainer.model)
    shards = [type(p).__name__ for p in trainer.model.parameters()]
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        torch.save((losses, state, shards), f"{folder}/{name}.pt")
"""


def with_lora(model):
    set_seed(7)
    return get_peft_model(model, LoraConfig(r=2, target_modules=r"model\.language_model\..*\.(q|v)_proj"))


def make_dpo_trainer(folder, output, batch, lora=False, **settings):
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
    arguments = DPOArguments(
        str(output), per_device_train_batch_size=batch, bf16=False, **PREFERENCE_SETTINGS | settings
    )
    return QwenVLDPOTrainer(
        with_lora(model) if lora else model, arguments, rows, processing_class=load_processor(folder)
    )


def assert_preferences_equal_one_process(model_folder, tmp_path, algorithm, cases, sharded=None):
    """cases: name -> (family, settings of one process); `sharded`: what two processes have besides."""
    (tmp_path / "script.py").write_text(PREFERENCE_SCRIPT)
    launched = {
        name: (str(model_folder(family)), settings | (sharded or {})) for name, (family, settings) in cases.items()
    }
    launch(tmp_path / "script.py", str(Path(__file__).parent), algorithm, tmp_path, json.dumps(launched))
    for name, (family, settings) in cases.items():
        losses, weights, shards = torch.load(tmp_path / f"{name}.pt")
        trainer = PREFERENCES[algorithm](model_folder(family), tmp_path / "alone", batch=2, **settings)
        before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
        trainer.train()
        assert losses == pytest.approx([e["loss"] for e in trainer.state.log_history if "loss" in e], abs=1e-4)
        for key, weight in trainer.model.state_dict().items():
            torch.testing.assert_close(weights[key], weight, rtol=0, atol=1e-4, msg=f"{name}: {key}")
        assert max((weights[key] - weight).abs().max() for key, weight in before.items()) > 1e-2
        assert set(shards) == ({"DTensor"} if sharded else {"Parameter"})


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dpo", "grpo"])
def test_preference_training_under_ddp_equals_one_process_with_the_same_global_batch(
    model_folder, tmp_path, algorithm
):
    cases = {family: (family, {}) for family in FAMILIES}
    assert_preferences_equal_one_process(model_folder, tmp_path, algorithm, cases)


@pytest.mark.slow
def test_dpo_under_fsdp2_equals_one_process_with_the_same_global_batch(model_folder, tmp_path):
    """With the reference as a copy, and with LoRA switched off: process 0 has text alone, and no picture to share."""
    cases = {family: (family, {}) for family in FAMILIES} | {"lora": ("qwen2_5_vl", {"lora": True})}
    assert_preferences_equal_one_process(model_folder, tmp_path, "dpo", cases, {"fsdp": True})


@pytest.mark.slow
def test_grpo_under_fsdp2_equals_one_process_with_the_same_global_batch(model_folder, tmp_path):
    cases = {family: (family, {"beta": 0.1}) for family in FAMILIES}
    assert_preferences_equal_one_process(model_folder, tmp_path, "grpo", cases, {"fsdp": True})


@pytest.mark.slow
def test_processes_under_fsdp2_sample_on_their_own_and_say_what_one_process_says(model_folder, tmp_path):
    """Each has one prompt in a step, with a picture or without, and another length of its answer."""
    (tmp_path / "script.py").write_text(SAMPLING_SCRIPT)
    folders = [str(model_folder(family)) for family in (*FAMILIES, "qwen2_5_vl")]
    launch(tmp_path / "script.py", str(Path(__file__).parent), tmp_path, *folders)
    for number, folder in enumerate(folders[:2]):
        trainer = make_ending_trainer(folder, tmp_path / "alone", batch=2)
        trainer.train()
        shortest, longest = lengths_of(trainer)
        assert torch.load(tmp_path / f"{number}.pt") == (shortest, longest)
        assert any(short < long for short, long in zip(shortest, longest, strict=True))
    assert torch.load(tmp_path / "2.pt") == torch.load(tmp_path / "1.pt")  # LoRA that changes nothing yet


def lengths_of(trainer):
    """Of every step, the lengths of the shortest and of the longest answer: there are two prompts in each."""
    names = ("completions/min_length", "completions/max_length")
    return tuple([log[name] for log in trainer.state.log_history if name in log] for name in names)


SAMPLING_SCRIPT = """
import sys
tests, folder, *models = sys.argv[1:]
sys.path.insert(0, tests)
import torch
import test_two_processes as here

for number, model in enumerate(models):
    trainer = here.make_ending_trainer(model, f"{folder}/{number}", batch=1, lora=number == 2, fsdp=True)
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(here.lengths_of(trainer), f"{folder}/{number}.pt")
"""


def make_ending_trainer(folder, output, batch, **settings):
    """Greedy sampling from a model that likes to end its answer. Alike answers teach nothing: weights stay."""
    settings |= {"max_completion_length": 40, "gradient_accumulation_steps": 1, "max_steps": 4}
    trainer = PREFERENCES["sampled"](folder, output, batch, **settings)
    end = trainer.processing_class.tokenizer.convert_tokens_to_ids("<|im_end|>")
    head = unwrap(trainer.model).get_output_embeddings()
    with torch.no_grad():
        head.weight[end] = 1.5 * head.weight.norm(dim=1).mean() * torch.nn.functional.normalize(head.weight[70], dim=0)
    return trainer


G = 3  # completions per prompt


def fixed_completions(trainer, prompt_ids):
    """Decided by the prompt and the place in its group, whichever process writes them."""
    end = trainer._tokenizer.convert_tokens_to_ids("<|im_end|>")
    seeds = [zlib.crc32(f"{len(ids)} {place % G}".encode()) for place, ids in enumerate(prompt_ids)]
    return [[65 + (seed >> shift) % 23 for shift in range(1 + seed % 7)] + [end] for seed in seeds]


class InjectedGRPO(QwenVLGRPOTrainer):
    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        return fixed_completions(self, prompt_ids), None


def spread(completion_ids, **_):
    """A reward that every completion gets another value of."""
    return [sum(ids) % 17 / 17 + len(ids) / 10 for ids in completion_ids]


def make_rollout_trainer(trainer, folder, output, batch, lora=False, **settings):
    rows = []
    for number in range(8):
        picture = [{"type": "image", "image": Image.new("RGB", (8, 8), (30 * number,) * 3)}] * (number % 2)
        content = [*picture, {"type": "text", "text": "How bright" + "?" * number}]
        source = Source("rows.jsonl", number + 1)
        rows.append(Example([{"role": "user", "content": content}], kind="reward", solution="1", source=source))
    set_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    arguments = GRPOConfig(
        str(output), per_device_train_batch_size=batch * G, num_generations=G, bf16=False,
        **{name: value for name, value in PREFERENCE_SETTINGS.items() if name != "train_sampling_strategy"}
        | {"max_completion_length": 9} | settings,
    )  # fmt: skip
    model = with_lora(model) if lora else model
    return trainer(model, [RewardTerm("spread", function=spread)], arguments, rows, load_processor(folder))


PREFERENCES = {
    "dpo": make_dpo_trainer,
    "grpo": partial(make_rollout_trainer, InjectedGRPO),
    # Always the likeliest token, so that it does not matter who draws.
    "sampled": partial(make_rollout_trainer, QwenVLGRPOTrainer, top_k=1),
}


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
