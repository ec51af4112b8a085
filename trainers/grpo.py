"""GRPO: groups of sampled answers, rewarded relative to their own group (arXiv 2402.03300, section 4.1)."""

from typing import Any

from trl import GRPOTrainer

from trainers.checkpoint_mixin import CheckpointMixin
from trainers.rollout_mixin import RolloutMixin


class QwenVLGRPOTrainer(RolloutMixin, CheckpointMixin, GRPOTrainer):
    """TRL's GRPOTrainer, with all its losses, for models of this package; pictures are encoded once per group.

    See `RolloutMixin` for arguments and errors. Tools and environments are left out: an answer here is one turn.

    Example:
        >>> trainer = QwenVLGRPOTrainer(
        ...     model, ["box_iou", RewardTerm("format", 0.2)], GRPOConfig("runs/grpo", num_generations=8),
        ...     train_dataset=list(read_rows("grounding.jsonl")), processing_class=load_processor(path))
        >>> trainer.train()
    """

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        ids, completion_ids, tool_mask, _, logprobs, extra, _, tools = super()._generate(prompts)
        # No images: TRL would preprocess them again for every completion.
        return ids, completion_ids, tool_mask, self._as_messages(completion_ids), logprobs, extra, None, tools
