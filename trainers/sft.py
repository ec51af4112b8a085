"""Stage 3: the adapter and the language model learn to hold conversations; the tower is frozen."""

from trainers.stage_trainer import StageTrainer
from trainers.stages import SFT


class QwenVLSFTTrainer(StageTrainer):
    """Trains adapter and language model on conversations at 448 pixels; the tower stays bit-identical and costs one
    forward pass without a graph.

    Qwen-VL, section 3.3. See `StageTrainer` for arguments and errors.
    """

    stage = SFT
