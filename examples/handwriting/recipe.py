"""How long each part of the demonstration learns, from what, and how fast: the numbers that were tried and chosen.

What was tried stands in docs/demo.md.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class StageRecipe:
    """One stage of training.

    trees: how many pictures (in stage 3 also pairs of them) are asked about, each in `branches` conversations; they
        are made once and learned from again until `steps` of `batch_size` trees are done.
    mixture: task -> its share of the conversations.
    seconds: what the stage took on two quiet cores; the demo shortens the stages by it when the machine is slower.
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
CHAT = {"conversation": 2.0, "two pictures": 1.0}

SHORT = Recipe(
    name="short",
    scenes=8000,
    held_out=150,
    tower_steps=1000,
    tower_batch_size=16,
    tower_rate=1.5e-3,
    tower_seconds=70,
    text=StageRecipe(60, 400, 4, 4, SEVEN_TASKS, rate=1e-3, seconds=3),
    pretrain=StageRecipe(
        150, 2400, 16, 1, {"caption": 1.0}, rate=1e-3, adapter_rate=1e-3, tower_rate=1e-4, seconds=13
    ),
    multitask=StageRecipe(1400, 6000, 8, 6, SEVEN_TASKS, rate=1e-3, adapter_rate=1e-3, tower_rate=1e-4, seconds=290),
    sft=StageRecipe(400, 2400, 8, 2, CHAT, rate=5e-4, adapter_rate=5e-4, seconds=70),
    limit_minutes=9.0,
)


def scaled(recipe: Recipe, factor: float, name: str) -> Recipe:
    """The same recipe with every number of steps, and what it takes, times `factor`."""

    def stage(one: StageRecipe) -> StageRecipe:
        return replace(one, steps=max(1, round(one.steps * factor)), seconds=one.seconds * factor)

    return replace(
        recipe,
        name=name,
        tower_steps=max(1, round(recipe.tower_steps * factor)),
        tower_seconds=recipe.tower_seconds * factor,
        text=stage(recipe.text),
        pretrain=stage(recipe.pretrain),
        multitask=stage(recipe.multitask),
        sft=stage(recipe.sft),
    )


LONG = replace(scaled(SHORT, 3.6, "long"), limit_minutes=29.0)
