"""Stage 1: the tower and the adapter learn to write captions and alt texts through a frozen language model."""

from trainers.stage_trainer import StageTrainer
from trainers.stages import PRETRAIN


class QwenVLPretrainTrainer(StageTrainer):
    """Trains tower and adapter on picture-text pairs at 224 pixels; the language model stays bit-identical.

    Qwen-VL, section 3.1. See `StageTrainer` for arguments and errors.
    """

    stage = PRETRAIN
