"""DPO and GRPO on two processes over gloo equal one with the same global batch, under DDP and FSDP2; half of the rows
have no picture."""

import json
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
from tests.trainers.two_process_runs import FAMILIES, SETTINGS, launch
from trainers.dpo import QwenVLDPOTrainer
from trainers.dpo_arguments import DPOArguments
from trainers.families import unwrap
from trainers.grpo import QwenVLGRPOTrainer
from trainers.rewards import RewardTerm

PREFERENCE_SETTINGS = {name: value for name, value in SETTINGS.items() if name != "tower_layer_decay"} | {
    "learning_rate": 1.0,
    "activation_checkpointing": False,
}

PREFERENCE_SCRIPT = """
import sys
tests, algorithm, folder, cases = sys.argv[1:]
sys.path.insert(0, tests)
import json, torch
import test_two_processes_preference as here

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
import test_two_processes_preference as here

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
