"""Prompts, completions that TRL's trainers and ours write alike, and a reward: for the tests of GRPO and RLOO.

Legend: G completions per prompt.
"""

import zlib

import torch
from datasets import Dataset
from PIL import Image
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

import modeling_qwenvl  # noqa: F401 (registers the model)
from processing.example import Example, Source
from trainers.grpo import QwenVLGRPOTrainer
from trainers.rewards import RewardTerm
from trainers.rloo import QwenVLRLOOTrainer

FAMILIES = ["qwen_vl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
COMPOSED = ["clip_qwen2", "siglip_llama"]
EVERY = FAMILIES + COMPOSED
G = 3


def picture(grey):
    return Image.new("RGB", (8, 8), (grey,) * 3)


def examples(pictures=(1, 2, 1, 1, 2, 1)):
    """Prompts of different lengths with so many pictures each."""
    rows = []
    for number, count in enumerate(pictures):
        shown = [{"type": "image", "image": picture(40 * number + 20 * index)} for index in range(count)]
        content = [*shown, {"type": "text", "text": "How bright" + "?" * number}]
        message = {"role": "user", "content": content}
        rows.append(Example([message], kind="reward", solution=str(number), source=Source("rows.jsonl", number + 1)))
    return rows


def as_stock_rows(rows):
    prompts = [[{"role": "user", "content": row.messages[0]["content"][-1]["text"]}] for row in rows]
    return Dataset.from_dict({"prompt": prompts, "images": [row.pictures for row in rows]})


def fixed_completions(prompt_ids, end):
    """Per row 1 to 7 letters, two of three times with an end, decided by the prompt and the place in its group."""
    made = []
    for place, ids in enumerate(prompt_ids):
        seed = zlib.crc32(f"{len(ids)} {place % G}".encode())
        made.append([65 + (seed >> shift) % 23 for shift in range(1 + seed % 7)] + [end] * (seed % 3 > 0))
    return made


class Injected:
    """In front of a trainer: completions that both sides write alike."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        made = fixed_completions(prompt_ids, self._tokenizer.convert_tokens_to_ids("<|im_end|>"))
        return (made, None) if isinstance(self, GRPOTrainer) else made


class StockGRPO(Injected, GRPOTrainer):
    pass


class OurGRPO(Injected, QwenVLGRPOTrainer):
    pass


class StockRLOO(Injected, RLOOTrainer):
    pass


class OurRLOO(Injected, QwenVLRLOOTrainer):
    pass


PAIRS = {"grpo": (GRPOConfig, StockGRPO, OurGRPO), "rloo": (RLOOConfig, StockRLOO, OurRLOO)}


def spread(completion_ids, **_):
    """A reward that every completion gets another value of."""
    return [sum(ids) % 17 / 17 + len(ids) / 10 for ids in completion_ids]


REWARD = RewardTerm("spread", function=spread)


def settings(config, folder, **given):
    defaults = {
        "per_device_train_batch_size": G,
        "gradient_accumulation_steps": 2,
        "num_generations": G,
        "max_completion_length": 9,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-4,  # so that a gradient of 1e-8 is not blown up to a full step
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "activation_checkpointing": False,
        "disable_tqdm": True,
    }
    return config(str(folder), **{**defaults, **given})


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_close(ours, stock, atol=1e-5):
    assert ours.keys() == stock.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], stock[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def losses(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]
