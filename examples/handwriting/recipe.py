"""How long each part of the demonstration learns, from what, and how fast: the numbers that were tried and chosen.

What was tried stands in docs/demo.md.
"""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class StageRecipe:
    """One stage of training.

    trees: how many pictures (in stage 3 also pairs of them) are asked about, each in `branches` conversations; they
        are made once and learned from again until `steps` of `batch_size` trees are done.
    mixture: task -> its share of the conversations. asked: task -> its share of the turns, in stage 3's conversations
        about one picture.
    seconds: what the stage takes two cores (of an EPYC, with AVX-512). How much faster or slower a machine is, the
        demo sees in the stage before, and leaves out steps where the stages would not end in time.
    Rates are peaks of a cosine that ends at a fiftieth; `tower_rate` None: the tower is frozen.
    """

    steps: int
    trees: int
    batch_size: int
    branches: int
    mixture: dict[str, float]
    rate: float
    seconds: float
    adapter_rate: float | None = None
    tower_rate: float | None = None
    asked: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """The whole run. tower_*: stage 0 of the tower; text: stage 0 of the language model; then the paper's stages."""

    name: str
    scenes: int
    held_out: int
    tower_steps: int
    tower_batch_size: int
    tower_rate: float
    tower_seconds: float
    text: StageRecipe
    pretrain: StageRecipe
    multitask: StageRecipe
    sft: StageRecipe
    limit_minutes: float


SEVEN_TASKS = {
    "caption": 2.0,
    "reading": 3.0,
    "seeing": 1.0,
    "grounding": 3.0,
    "referring": 1.0,
    "ocr": 1.0,
    "caption_with_grounding": 1.0,
}
CAPTIONS = {"caption": 1.0}
CHAT = {"conversation": 3.0, "two pictures": 1.0}

SHORT = Recipe(
    name="short",
    scenes=8000,
    held_out=150,
    tower_steps=1000,
    tower_batch_size=16,
    tower_rate=1.5e-3,
    tower_seconds=56,
    text=StageRecipe(60, 400, 4, 4, SEVEN_TASKS, rate=1e-3, seconds=3),
    pretrain=StageRecipe(150, 2400, 16, 1, CAPTIONS, rate=1e-3, adapter_rate=1e-3, tower_rate=1e-4, seconds=15),
    multitask=StageRecipe(1250, 5000, 8, 6, SEVEN_TASKS, rate=1e-3, adapter_rate=1e-3, tower_rate=1e-4, seconds=300),
    sft=StageRecipe(700, 2400, 8, 5, CHAT, rate=1e-3, adapter_rate=1e-3, asked=SEVEN_TASKS, seconds=230),
    limit_minutes=9.3,
)

LONG = replace(
    SHORT,
    name="long",
    scenes=16000,
    tower_steps=2000,
    tower_seconds=2 * SHORT.tower_seconds,
    pretrain=replace(SHORT.pretrain, steps=300, trees=4800, seconds=2 * SHORT.pretrain.seconds),
    multitask=replace(SHORT.multitask, steps=3500, trees=14000, seconds=3500 / 1250 * SHORT.multitask.seconds),
    sft=replace(SHORT.sft, steps=1900, trees=7200, seconds=1900 / 700 * SHORT.sft.seconds),
    limit_minutes=29.0,
)
