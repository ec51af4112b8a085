"""The three training stages of Qwen-VL (arXiv 2308.12966, section 3 and table 8): what each stage is, nothing more.

Learning rates, batch sizes and steps are a recipe's business; what trains, at which resolution and on which kind of
text is the stage.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: how it is called in tables and messages.
        parts: what trains (`trainers.families.PARTS`); the rest is frozen.
        resolution: side of the square picture, in pixels, that the stage uses on Qwen-VL. Families with dynamic
            resolution keep their own limits.
        label_style: "plain" is the paper's `prompt answer<eos>` with loss on answer and end; "chat" is the
            conversation template with loss on the assistant's text.
        packs_by_task: whether rows of the same task are packed into one sequence (section 3.2).
    """

    name: str
    parts: tuple[str, ...]
    resolution: int
    label_style: Literal["plain", "chat"]
    packs_by_task: bool = False


PRETRAIN = Stage("pretrain", parts=("tower", "adapter"), resolution=224, label_style="plain")

MULTITASK = Stage(
    "multitask",
    parts=("tower", "adapter", "language_model", "embeddings"),
    resolution=448,
    label_style="plain",
    packs_by_task=True,
)

SFT = Stage("sft", parts=("adapter", "language_model", "embeddings"), resolution=448, label_style="chat")
