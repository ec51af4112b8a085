"""Stage 2: everything learns, on captions, questions, grounding, OCR and pure text."""

from trainers.stage_trainer import StageTrainer
from trainers.stages import MULTITASK


class QwenVLMultiTaskTrainer(StageTrainer):
    """Trains every part on the seven tasks at 448 pixels, rows of the same task packed into one sequence.

    Qwen-VL, section 3.2. See `StageTrainer` for arguments and errors.
    """

    stage = MULTITASK
