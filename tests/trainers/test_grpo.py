"""GRPO and RLOO on shared prompts give TRL's losses and weights, and go on where they stopped."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
from trl import GRPOConfig, RLOOConfig

import modeling_qwenvl  # noqa: F401 (registers the model)
from tests.trainers.rollout_runs import (
    EVERY,
    PAIRS,
    REWARD,
    G,
    OurGRPO,
    StockGRPO,
    as_stock_rows,
    assert_close,
    examples,
    losses,
    settings,
    spread,
    weights,
)
from trainers.freezing import TrainedParts, freeze
from trainers.grpo import QwenVLGRPOTrainer
from trainers.rloo import QwenVLRLOOTrainer

# Together, not each: the quick suite trains by GRPO and RLOO in test_recipe_rollouts.
pytestmark = pytest.mark.slow
PARTS = TrainedParts(("adapter", "language_model", "embeddings"))


def train_both(load, tmp_path, family, algorithm, **given):
    config, stock_class, our_class = PAIRS[algorithm]
    layout, rows = given.pop("layout", "tree"), examples()
    model, processor = load(family)
    processor.tokenizer.padding_side = "left"  # TRL pads mm_token_type_ids as the tokenizer does
    processor.tokenizer.eos_token = "<|im_end|>"
    freeze(model, PARTS)
    stock = stock_class(
        model, spread, settings(config, tmp_path, **given), as_stock_rows(rows), processing_class=processor
    )
    stock.train()
    ours = our_class(load(family)[0], [REWARD], settings(config, tmp_path, **given), rows, processor, layout=layout)
    start = weights(ours.model)
    ours.train()
    moved = max((ours.model.get_parameter(n) - p).abs().max().item() for n, p in start.items())
    assert moved > 1e-3
    return ours, stock


@pytest.mark.parametrize("algorithm", PAIRS)
@pytest.mark.parametrize("family", EVERY)
def test_losses_and_weights_are_those_of_trl_on_the_same_completions(load, tmp_path, family, algorithm):
    ours, stock = train_both(load, tmp_path, family, algorithm)
    assert losses(ours) == pytest.approx(losses(stock), abs=1e-5)
    assert losses(ours, "reward") == pytest.approx(losses(stock, "reward"), abs=1e-5)
    # A mean over micro-batches, into which TRL shuffles other completions.
    assert losses(ours, "entropy") == pytest.approx(losses(stock, "entropy"), abs=1e-3)
    assert_close(weights(ours.model), weights(stock.model))


@pytest.mark.parametrize(
    "given",
    [
        {"beta": 0.1},
        {"num_iterations": 2, "max_steps": 4},
        {"loss_type": "grpo"},
        {"layout": "rows"},
        {"temperature": 0.7},
        {"mask_truncated_completions": True},
        {"per_device_train_batch_size": 2 * G, "gradient_accumulation_steps": 1},
        {"activation_checkpointing": True},
    ],
    ids=str,
)
# TRL 1.16 calls transformers' old names for checkpointing.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_every_setting_gives_what_trl_gives(load, tmp_path, algorithm, given):
    if algorithm == "rloo" and "loss_type" in given:
        given = {"normalize_advantages": True}
    ours, stock = train_both(load, tmp_path, "qwen2_5_vl", algorithm, **given)
    assert losses(ours) == pytest.approx(losses(stock), abs=1e-5)
    assert_close(weights(ours.model), weights(stock.model))
    if given.get("beta"):
        assert losses(ours, "kl") == pytest.approx(losses(stock, "kl"), abs=5e-4)  # as the entropy above
        assert losses(ours, "kl")[-1] != 0


@pytest.mark.parametrize("family", EVERY)
def test_lora_with_a_reference_gives_what_trl_gives(load, tmp_path, family):
    def wrapped():
        model, processor = load(family)
        torch.manual_seed(0)
        regex = r"model\.language_model\..*\.(q|v)_proj"
        return get_peft_model(model, LoraConfig(r=2, target_modules=regex, init_lora_weights=False)), processor

    given = {"beta": 0.1, "max_steps": 3}
    model, processor = wrapped()
    processor.tokenizer.padding_side = "left"
    processor.tokenizer.eos_token = "<|im_end|>"
    stock = StockGRPO(
        model, spread, settings(GRPOConfig, tmp_path, **given), as_stock_rows(examples()), processing_class=processor
    )
    stock.train()
    model, processor = wrapped()
    ours = OurGRPO(model, [REWARD], settings(GRPOConfig, tmp_path, **given), examples(), processor)
    ours.train()
    assert losses(ours) == pytest.approx(losses(stock), abs=1e-5)
    assert losses(ours, "kl")[-1] > 0
    assert_close(weights(ours.model), weights(stock.model))


@pytest.mark.parametrize(("family", "beta"), [("qwen2_5_vl", 0.0), ("qwen2_5_vl", 0.1), ("qwen_vl", 0.1)])
def test_lora_on_a_4_bit_model_trains_only_the_adapter_in_its_own_dtype(load, model_folder, tmp_path, family, beta):
    model = AutoModelForImageTextToText.from_pretrained(
        model_folder(family),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["model.visual", "model.adapter", "lm_head"],
        ),
        device_map="cpu",
    )
    regex = r"model\.language_model\..*\.(q|v)_proj"
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=regex))
    arguments = settings(GRPOConfig, tmp_path, beta=beta)
    trainer = QwenVLGRPOTrainer(wrapped, [REWARD], arguments, examples((0, 1, 2)), load(family)[1])
    before = weights(wrapped)
    trainer.train()
    changed = {name for name, p in wrapped.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert all(".lora_" in name and ".default." in name for name in changed)
    assert {wrapped.get_parameter(name).dtype for name in changed} == {torch.float32}


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_stopped(load, tmp_path, algorithm):
    config, trainer = {"grpo": (GRPOConfig, QwenVLGRPOTrainer), "rloo": (RLOOConfig, QwenVLRLOOTrainer)}[algorithm]

    def run(folder, resume=None):
        model, processor = load("qwen2_5_vl")
        arguments = settings(config, folder, max_steps=4, save_strategy="steps", save_steps=2, beta=0.1)
        ours = trainer(model, [REWARD], arguments, examples(), processor)
        ours.train(resume)
        return weights(model)

    straight = run(tmp_path / "a")
    assert_close(run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-2")), straight, atol=0)
