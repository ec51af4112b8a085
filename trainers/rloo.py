"""RLOO: each answer against the mean reward of its siblings, whole answers weighed (arXiv 2402.14740, section 3)."""

from typing import Any

from trl import RLOOTrainer

from trainers.checkpoint_mixin import CheckpointMixin
from trainers.rollout_mixin import RolloutMixin


class QwenVLRLOOTrainer(RolloutMixin, CheckpointMixin, RLOOTrainer):
    """TRL's RLOOTrainer for models of this package; pictures are encoded once per group.

    See `RolloutMixin` for arguments and errors. The KL penalty (`beta`) is part of the reward, as in the paper.
    """

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        ids, completion_ids, _ = super()._generate(prompts)
        return ids, completion_ids, self._as_messages(completion_ids)
