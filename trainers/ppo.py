"""PPO: a value head on the policy says what an answer is worth before each token (arXiv 1707.06347, 2203.02155).

TRL 1.16 has no PPO. This is GRPO's trainer with other advantages: rollouts, rewards, reference and the clipped policy
loss are GRPO's; the value head, advantages per token (GAE), the value loss and KL control are added here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOConfig

from trainers.completion_logps import add_completion_head
from trainers.grpo import QwenVLGRPOTrainer
from trainers.ppo_losses import (
    KLControl,
    generalized_advantages,
    token_rewards,
    token_totals,
    value_losses,
    whitened,
)
from trainers.rewards import RewardTerm

HEAD = "value_head"
HEAD_FILE = "value_head.safetensors"  # in checkpoints: the head and the KL coefficient


@dataclass
class PPOArguments(GRPOConfig):
    """GRPO's arguments and PPO's own. `beta` is the (first) coefficient of the KL penalty, which PPO takes off the
    rewards token by token; `epsilon` clips the policy; `num_iterations` is the number of passes over a batch.

    Raises ValueError for a loss that is not PPO's.
    """

    beta: float = field(default=0.05, metadata={"help": "Coefficient of the KL penalty in the reward."})
    kl_target: float | None = field(
        default=None, metadata={"help": "KL of an answer, in nats, that beta is steered to. None: beta is constant."}
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "Answers within which beta follows its target."})
    gamma: float = field(default=1.0, metadata={"help": "Discount of rewards, per token."})
    lam: float = field(default=0.95, metadata={"help": "GAE's lambda."})
    value_coefficient: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    value_clip: float = field(default=0.2, metadata={"help": "How far a value may move from the old one per batch."})
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Advantages get mean 0 and deviation 1 over the batch of rollouts."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type != "dapo" or self.importance_sampling_level != "token":
            raise ValueError(
                f"loss_type={self.loss_type!r} with importance_sampling_level={self.importance_sampling_level!r}: "
                "PPO is the clipped loss per token, averaged over all tokens of the step ('dapo', 'token')."
            )
        if not (0 < self.gamma <= 1 and 0 <= self.lam <= 1 and self.value_clip > 0 and self.value_coefficient >= 0):
            raise ValueError(
                f"gamma={self.gamma} must lie in (0, 1], lam={self.lam} in [0, 1], value_clip={self.value_clip} above "
                f"0, value_coefficient={self.value_coefficient} at or above 0."
            )


class QwenVLPPOTrainer(QwenVLGRPOTrainer):
    """PPO on the rollouts and rewards of `QwenVLGRPOTrainer`; `args` are PPOArguments.

    The value head is a linear layer on the hidden state that predicts a token, 0 at the start. It trains with the
    model, is kept in checkpoints, and left out of the exported model. See `RolloutMixin` for the other arguments.

    Raises ValueError under FSDP and DeepSpeed, which would shard the head out of reach.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        rewards: Sequence[str | RewardTerm],
        args: PPOArguments,
        *rest: Any,
        **others: Any,
    ) -> None:
        if not isinstance(args, PPOArguments):
            raise ValueError(f"args is a {type(args).__name__}: use trainers.ppo.PPOArguments.")
        super().__init__(model, rewards, args, *rest, **others)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("PPO's value head is not made for FSDP and DeepSpeed: use DDP, or GRPO or RLOO.")
        base = self.freeze.parts.base
        embedding = base.get_output_embeddings().weight
        # In 32 bits, whatever the model is in: values are small differences.
        base.value_head = nn.Linear(base.config.get_text_config().hidden_size, 1, device=embedding.device)
        nn.init.zeros_(base.value_head.weight)
        nn.init.zeros_(base.value_head.bias)
        outputs = ("log_probs", "entropy", "state_values")
        add_completion_head(base, self.layout, self.temperature, outputs, encodes_always=self._encodes_always)
        self.kl_control = KLControl(self.beta, self.args.kl_target, self.args.kl_horizon)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            base = self.freeze.parts.base
            # No part of the model, so that it has no line in the table of families.
            head = base.value_head
            del base.value_head
            try:
                optimizer = super().create_optimizer(model)
            finally:
                base.value_head = head
            optimizer.add_param_group(
                {"params": list(head.parameters()), "lr": self.args.learning_rate, "weight_decay": 0.0}
            )
        return self.optimizer

    # --- Advantages ---

    def _finish(self, output: dict[str, Any]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        mask = output["completion_mask"]
        with torch.no_grad():
            scored = self._score(self.model, ids, attention, mask.shape[1], self._rows_per_pass)
        logps, values = scored["log_probs"], scored["state_values"]
        log_ratio = logps - output["ref_per_token_logps"] if self.beta else torch.zeros_like(logps)
        scores = self._local_scores()
        rewards = token_rewards(scores.nan_to_num(), log_ratio, mask, self.beta)
        advantages, returns = generalized_advantages(rewards, values, mask, self.args.gamma, self.args.lam)
        # An answer that no reward applies to moves neither policy nor values.
        applies = mask * ~scores.isnan()[:, None]
        if self.args.whiten_advantages:
            totals = self.accelerator.reduce(token_totals(advantages, applies), "sum")
            advantages = whitened(advantages, applies, totals)
        returns = torch.where(applies.bool(), returns, values)
        kl = self.accelerator.gather((log_ratio * mask).sum(dim=1))
        self._metrics[mode]["kl"].append(kl.mean().item())
        self._metrics[mode]["kl_coefficient"].append(self.beta)
        self._metrics[mode]["value/mean"].append(self._mean(values, mask))
        self._metrics[mode]["value/return"].append(self._mean(returns, mask))
        if mode == "train":
            self.beta = self.kl_control.update(kl.mean().item(), len(kl))
        return output | {
            "advantages": advantages * applies,
            "old_per_token_logps": logps,
            "old_values": values,
            "returns": returns,
        }

    def _mean(self, values_NT: Tensor, mask_NT: Tensor) -> float:
        total = self.accelerator.reduce(token_totals(values_NT, mask_NT), "sum")
        return (total[0] / total[2].clamp(min=1)).item()

    # --- Losses ---

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        # The KL penalty is in the rewards already; GRPO would add it to the loss.
        beta, self.beta = self.beta, 0.0
        try:
            policy_loss = super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
        mask = inputs["completion_mask"]
        values = self._scored["state_values"]
        losses = value_losses(values, inputs["old_values"], inputs["returns"], self.args.value_clip)
        # Divided as the policy loss is: by the tokens of one optimizer step, over all devices.
        normalizer = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:
            normalizer = normalizer * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["value/loss"].append(self._mean(losses.detach(), mask))
        return policy_loss + self.args.value_coefficient * (losses * mask).sum() / normalizer

    # --- Checkpoints ---

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        base = self.freeze.parts.base
        if self._is_saving_checkpoint:
            super()._save(output_dir, state_dict)
            if self.args.should_save:
                assert output_dir is not None
                head = {
                    name: value.detach().cpu().contiguous() for name, value in base.value_head.state_dict().items()
                }
                head["kl_coefficient"] = torch.tensor(self.kl_control.coefficient, dtype=torch.float64)
                save_file(head, Path(output_dir) / HEAD_FILE)
            return
        state = self.accelerator.get_state_dict(self.model) if state_dict is None else state_dict
        super()._save(output_dir, {name: value for name, value in state.items() if HEAD not in name.split(".")})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_head(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        self._load_head(Path(self.state.best_model_checkpoint))

    def _load_head(self, checkpoint: Path) -> None:
        head = load_file(checkpoint / HEAD_FILE)
        self.beta = self.kl_control.coefficient = head.pop("kl_coefficient").item()
        self.freeze.parts.base.value_head.load_state_dict(head)
