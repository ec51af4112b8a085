"""RolloutDisplayMixin: warnings about rollouts that teach nothing, and a page of the last completions at every log."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer

from trainers.completions_page import Completed, completions_page
from trainers.rollout_watch import RolloutWatch
from trainers.rollouts import Prompt

logger = logging.getLogger(__name__)


class RolloutDisplayMixin(Trainer):
    """Put before a trainer that calls `_warn` and `_keep` with each batch of rollouts.

    Pages are `output_dir`/completions/step-000010.html, of the first process's completions.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.watch = RolloutWatch()
        self._shown: list[Completed] = []
        super().__init__(*args, **kwargs)

    def _warn(self, scores: Tensor, completion_mask: Tensor) -> None:
        """scores: (groups, completions per group). Held-out rows are not warned about."""
        if self.model.training:
            mean_length = float(completion_mask.sum(dim=1).float().mean())
            for message in self.watch.observe(scores.tolist(), mean_length):
                logger.warning("Step %d: %s", self.state.global_step + 1, message)

    def _keep(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[dict[str, str]]],
        names: Sequence[str],
        rewards: Tensor,
        advantages: Tensor,
        completion_mask: Tensor,
    ) -> None:
        """One row each; rewards: (N, functions). Advantages per token, as PPO has them, are shown by their mean."""
        if advantages.ndim == 2:
            advantages = advantages.sum(dim=1) / completion_mask.sum(dim=1).clamp(min=1)
        rows = zip(prompts, completions, rewards.tolist(), advantages.tolist(), strict=True)
        self._shown = [
            Completed(prompt, message["content"], dict(zip(names, values, strict=True)), advantage)
            for prompt, (message,), values, advantage in rows
        ]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self._shown and self.is_world_process_zero():
            folder = Path(self.args.output_dir) / "completions"
            folder.mkdir(parents=True, exist_ok=True)
            page = completions_page(self._shown, f"Step {self.state.global_step}")
            (folder / f"step-{self.state.global_step:06d}.html").write_text(page, encoding="utf-8")
            self._shown = []
