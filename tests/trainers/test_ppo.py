"""The PPO trainer: the losses it adds, its value head, resuming."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from trl import GRPOConfig

import modeling_qwenvl  # noqa: F401 (registers the model)
from processing.example import Example
from processing.processing_families import load_processor
from trainers.ppo import HEAD_FILE, PPOArguments, QwenVLPPOTrainer
from trainers.rewards import RewardTerm

# Together, not each: the quick suite trains by PPO in test_recipe_rollouts.
pytestmark = pytest.mark.slow
G = 2


def examples():
    """Four prompts, the second with a picture."""
    from PIL import Image

    rows = []
    for number in range(4):
        shown = [{"type": "image", "image": Image.new("RGB", (8, 8), (50,) * 3)}] if number == 1 else []
        message = {"role": "user", "content": [*shown, {"type": "text", "text": "How bright" + "?" * number}]}
        rows.append(Example([message], kind="reward", solution="a"))
    return rows


class Injected(QwenVLPPOTrainer):
    """With given completions: row r has r % 3 + 2 letters."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        return [[66 + place] * (place % 3 + 2) for place, _ in enumerate(prompt_ids)], None


REWARD = RewardTerm("length", function=lambda completion_ids, **_: [len(ids) / 4 for ids in completion_ids])


@pytest.fixture
def make(model_folder, tmp_path):
    def _make(trainer=Injected, family="qwen2_5_vl", folder=tmp_path, reward=REWARD, **given):
        source = model_folder(family)
        defaults = {
            "per_device_train_batch_size": G,
            "gradient_accumulation_steps": 2,
            "num_generations": G,
            "max_completion_length": 6,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "adam_epsilon": 1e-4,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "activation_checkpointing": False,
            "disable_tqdm": True,
        }
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
        arguments = PPOArguments(str(folder), **{**defaults, **given})
        return trainer(model, [reward], arguments, examples(), load_processor(source))

    return _make


def rollout(trainer):
    trainer.model.train()
    return trainer._generate_and_score_completions([{"row": row} for row in (0, 0, 1, 1)])


def test_at_the_start_advantages_are_the_discounted_score_because_values_are_zero(make):
    output = rollout(make(beta=0.0, gamma=0.5, lam=1.0, whiten_advantages=False))
    # lengths 2, 3, 4, 2; scores 0.5, 0.75, 1, 0.5
    expected = [[0.25, 0.5, 0, 0], [0.1875, 0.375, 0.75, 0], [0.125, 0.25, 0.5, 1], [0.25, 0.5, 0, 0]]
    torch.testing.assert_close(output["advantages"], torch.tensor(expected))
    torch.testing.assert_close(output["returns"], torch.tensor(expected))
    assert output["old_values"].abs().max() == 0


def test_the_score_of_an_answer_is_its_weighted_reward(make):
    settings = {"beta": 0.0, "gamma": 0.5, "lam": 1.0, "whiten_advantages": False}
    weighted = RewardTerm(REWARD.name, -3.0, function=REWARD.function)
    expected = -3 * rollout(make(**settings))["advantages"]
    torch.testing.assert_close(rollout(make(reward=weighted, **settings))["advantages"], expected)
    assert expected.min() == -3.0


def test_the_kl_penalty_is_that_of_the_two_policies_and_is_taken_off_the_rewards(make):
    trainer = make(beta=0.5, gamma=1.0, lam=0.0, whiten_advantages=False)
    with torch.no_grad():
        for parameter in trainer.freeze.parts.base.model.language_model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.manual_seed(0)))
    output = rollout(trainer)
    ratio = (output["old_per_token_logps"] - output["ref_per_token_logps"]) * output["completion_mask"]
    assert ratio.abs().max() > 0.01
    # With lambda 0 and values 0 an advantage is the token's own reward.
    scores = torch.tensor([[0, 0.5, 0, 0], [0, 0, 0.75, 0], [0, 0, 0, 1.0], [0, 0.5, 0, 0]])
    torch.testing.assert_close(output["advantages"], scores - 0.5 * ratio)


def test_the_loss_is_the_clipped_policy_loss_plus_the_value_loss_per_token(make):
    trainer = make(beta=0.1, whiten_advantages=False, value_coefficient=0.25)
    output = rollout(trainer)
    head = trainer.freeze.parts.base.value_head
    torch.nn.init.constant_(head.bias, 0.7)  # all values are 0.7 now, and moved by more than 0.2
    output["old_per_token_logps"] = output["old_per_token_logps"] - 0.3  # ratios of exp(0.3) > 1.2 are clipped
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation
    loss = trainer._compute_loss(trainer.model, output)
    mask, advantages = output["completion_mask"], output["advantages"]
    ratio = torch.tensor(0.3).exp()
    policy = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    error = torch.maximum((0.7 - output["returns"]) ** 2, (0.2 - output["returns"]) ** 2) / 2
    expected = ((policy + 0.25 * error) * mask).sum() / mask.sum()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_completion_without_a_reward_moves_nothing(make):
    reward = RewardTerm(
        "some", function=lambda completion_ids, **_: [None if len(i) == 3 else 1.0 for i in completion_ids]
    )
    output = rollout(make(reward=reward, beta=0.0))
    assert output["advantages"][1].abs().max() == 0
    assert output["returns"][1].tolist() == output["old_values"][1].tolist()
    assert output["advantages"][0].abs().max() > 0


@pytest.mark.parametrize("family", ["qwen_vl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_model_and_value_head_learn(make, family):
    trainer = make(trainer=QwenVLPPOTrainer, family=family)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(before[name], p)}
    assert {"value_head.weight", "value_head.bias"} < moved
    assert not any("blocks" in name or ".visual.layers" in name for name in moved)


def test_values_learn_what_answers_are_worth(make):
    reward = RewardTerm("same", function=lambda completions, **_: [1.0] * len(completions))
    trainer = make(reward=reward, beta=0.0, max_steps=60, learning_rate=2e-2, value_coefficient=1.0, value_clip=10.0)
    trainer.train()
    worth = [entry["value/loss"] for entry in trainer.state.log_history if "value/loss" in entry]
    assert worth[0] == pytest.approx(0.45, abs=0.06)  # half of 0.95 to the power of twice the tokens that are left
    assert worth[-1] < 0.1 * worth[0]


def test_batches_of_four_and_twice_two_end_with_the_same_weights(make):
    ends = []
    for size, accumulation in ((2 * G, 1), (G, 2)):
        trainer = make(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
        trainer.train()
        ends.append({name: p.detach() for name, p in trainer.model.named_parameters()})
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steered", [False, True])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(make, tmp_path, steered):
    given = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "trainer": QwenVLPPOTrainer}
    if steered:
        given |= {"kl_target": 1e-4, "kl_horizon": 50}
    straight = make(folder=tmp_path / "a", **given)
    straight.train()
    resumed = make(folder=tmp_path / "b", **given)
    resumed.train(str(tmp_path / "a" / "checkpoint-2"))
    for (name, value), other in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(other, value, rtol=0, atol=0, msg=name)
    assert resumed.beta == straight.beta
    assert (straight.beta != straight.args.beta) == steered
    assert "kl_coefficient" in load_file(tmp_path / "a" / "checkpoint-4" / HEAD_FILE)


def test_the_exported_model_has_no_value_head(make, tmp_path):
    trainer = make()
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert not any("value_head" in name for name in load_file(tmp_path / "final" / "model.safetensors"))
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    for name, value in loaded.named_parameters():
        torch.testing.assert_close(value, trainer.freeze.parts.base.get_parameter(name), rtol=0, atol=0)


def test_settings_that_are_not_ppos_are_refused(make, tmp_path):
    cheap = {"use_cpu": True, "activation_checkpointing": False}
    with pytest.raises(ValueError, match="PPO is the clipped loss per token"):
        PPOArguments(str(tmp_path), loss_type="grpo", **cheap)
    with pytest.raises(ValueError, match=r"gamma=1.5 must lie in \(0, 1\]"):
        PPOArguments(str(tmp_path), gamma=1.5, **cheap)
    trainer = make()
    arguments = GRPOConfig(str(tmp_path), **cheap)
    with pytest.raises(ValueError, match=r"use trainers\.ppo\.PPOArguments"):
        QwenVLPPOTrainer(trainer.freeze.parts.base, [REWARD], arguments, examples(), trainer.processing_class)
