"""A training run as one frozen, typed value: a Recipe of sections, refused when its fields contradict each other.

`trainers/recipe_reading.py` reads one from YAML, `trainers/train.py` runs it, `trainers/estimate.py` says what memory
it takes. The fields' meanings stand here and nowhere else; where the numbers of the named recipes come from stands in
docs/recipes.md.
"""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from trainers.contradictions import contradictions
from trainers.recipe_preference import PreferenceSection
from trainers.recipe_sampling import SamplingSection

Stage = Literal["pretrain", "multitask", "sft", "dpo", "grpo", "rloo", "ppo"]
SAMPLED_STAGES = ("grpo", "rloo", "ppo")
Training = Literal["frozen", "full", "lora"]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(gt=0)]

# Strict: "2" is not 2 and True is not 1. Unknown keys are refused; recipe_reading.py names the nearest known one.
CHECKED = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, config=CHECKED)
class ModelSection:
    """Which weights to start from and how they are held.

    `path`: a folder or a Hub name. `dtype`: of the frozen weights; `trained_dtype`: of those that learn (float32 keeps
    updates smaller than 2**-8 of a weight, which bfloat16 rounds away). `quantization`: "nf4" holds the language
    model's linear layers in 4 bits (QLoRA, arXiv 2305.14314) and nothing else. `new_tokens`: strings that become
    tokens of their own when the tokenizer lacks them.
    """

    path: str = ""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    trained_dtype: Literal["float32", "bfloat16"] = "float32"
    quantization: Literal["none", "nf4"] = "none"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    new_tokens: tuple[str, ...] = ()


@dataclass(frozen=True, config=CHECKED)
class TowerSection:
    """How the tower learns: not at all, all its weights, or through LoRA.

    `learning_rate`: None means the optimiser's. `layer_decay`: each block learns this many times as fast as the next
    one; 1.0 is off. `last_blocks`: only so many of the last blocks learn; None means all. `checkpointing`: activations
    are recomputed in the backward pass instead of kept.
    """

    train: Training = "frozen"
    learning_rate: Positive | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    last_blocks: Count | None = None
    checkpointing: bool = False


@dataclass(frozen=True, config=CHECKED)
class AdapterSection:
    """How the adapter learns; fields as the tower's."""

    train: Training = "frozen"
    learning_rate: Positive | None = None


@dataclass(frozen=True, config=CHECKED)
class LanguageModelSection:
    """How the language model learns, at the optimiser's learning rate. A frozen one may be checkpointed as well: what
    learns before it needs gradients through it."""

    train: Training = "frozen"
    checkpointing: bool = False


@dataclass(frozen=True, config=CHECKED)
class EmbeddingsSection:
    """Input and output embeddings: frozen, all rows, or only the rows of `model.new_tokens`."""

    train: Literal["frozen", "full", "new_tokens"] = "frozen"
    learning_rate: Positive | None = None


@dataclass(frozen=True, config=CHECKED)
class PartsSection:
    """The model's parts, as trainers/families.py finds them.

    `frozen_patterns`: regular expressions; parameters of trained parts whose names they find stay as they are.
    """

    tower: TowerSection = field(default_factory=TowerSection)
    adapter: AdapterSection = field(default_factory=AdapterSection)
    language_model: LanguageModelSection = field(default_factory=LanguageModelSection)
    embeddings: EmbeddingsSection = field(default_factory=EmbeddingsSection)
    frozen_patterns: tuple[str, ...] = ()


@dataclass(frozen=True, config=CHECKED)
class LoraSection:
    """LoRA (arXiv 2106.09685) of the parts that say `train: lora`; `dora` adds magnitudes (arXiv 2402.09353).

    The update of a weight is scaled by alpha / rank. A `dropout` of 0.0 is off, and stays off. `targets`: last names
    of the linear layers ("q_proj", ...); none given means all linear layers of the parts.
    """

    rank: Count = 64
    alpha: Positive = 16.0
    dropout: Share = 0.05
    dora: bool = False
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, config=CHECKED)
class OptimizerSection:
    """AdamW and its schedule. Learning rates and counts are per optimiser step, after accumulation.

    `warmup_steps`: linear; below 1 it is a share of all steps. `min_learning_rate`: where the cosine ends; parts with
    their own rate end at the same share of it. Exactly one of `max_steps` and `epochs` is given.
    """

    learning_rate: Positive = 1e-5
    min_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[float, Field(ge=0)] = 0.0
    max_steps: Count | None = None
    epochs: Positive | None = None
    beta1: Share = 0.9
    beta2: Share = 0.98
    epsilon: Positive = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    max_grad_norm: Positive = 1.0
    states: Literal["float32", "8bit", "8bit_paged"] = "float32"
    global_batch_size: Count = 128
    label_smoothing: Share = 0.0
    z_loss: Annotated[float, Field(ge=0)] = 0.0


@dataclass(frozen=True, config=CHECKED)
class DataFile:
    """One file of rows. `format`: a name of processing/row_formats.py; None means that each row is told by its keys.
    `weight`: how often its rows are drawn, relative to the other files'."""

    path: str
    format: str | None = None
    weight: Positive = 1.0


@dataclass(frozen=True, config=CHECKED)
class DataSection:
    """Rows and what becomes of them.

    `max_length`: tokens of a row, pictures' included. `too_long`: what is done with rows that stay longer after their
    pictures were made smaller and their last turns left out. `picture_side`: pixels; the native model sees a square of
    this side, the later families at most this side squared in area, in pictures and in frames of videos. `video_side`:
    the same for frames, where they shall be smaller; `video_fps`, `video_frames`: frames per second, and their largest
    number; None means what the model's video processor says. `packing`: several rows in one sequence of
    at most `max_length` tokens (in stage multitask of one task), which then is what a device takes at once.
    """

    train: tuple[DataFile, ...] = ()
    validation: tuple[DataFile, ...] = ()
    max_length: Count = 2048
    too_long: Literal["raise", "drop"] = "raise"
    picture_side: Count = 448
    video_side: Count | None = None
    video_fps: Positive | None = None
    video_frames: Count | None = None
    packing: bool = False
    workers: Annotated[int, Field(ge=0)] = 2


@dataclass(frozen=True, config=CHECKED)
class HardwareSection:
    """The machine. `memory_gib`: of one device. `sharding`: "full" is FSDP: weights, gradients and optimiser states
    are split over the devices. `precision`: of the multiplications ("bfloat16" is autocast)."""

    devices: Count = 1
    memory_gib: Positive = 24.0
    per_device_batch_size: Count = 1
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    sharding: Literal["none", "full"] = "none"


@dataclass(frozen=True, config=CHECKED)
class EstimateSection:
    """What the memory estimate assumes of a row of `data.max_length` tokens: how many pictures it has, and which share
    of its text is supervised (1.0 is the worst case)."""

    pictures_per_row: Count = 1
    supervised_share: Annotated[float, Field(gt=0, le=1)] = 1.0


@dataclass(frozen=True, config=CHECKED)
class RunSection:
    """Where results go and how often; all intervals in optimiser steps.

    `answers`: how many rows of `data.validation`, from the first on, are answered and scored at each evaluation; 0 is
    none. `feature_cache_dir`: where a frozen tower's features are kept for later epochs.
    """

    output_dir: str = "runs/qwenvl"
    seed: int = 0
    log_every: Count = 10
    save_every: Count = 500
    keep_checkpoints: Count = 2
    evaluate_every: Count | None = None
    answers: Annotated[int, Field(ge=0)] = 0
    feature_cache_dir: str | None = None
    report_to: Literal[
        "none", "tensorboard", "wandb", "mlflow", "comet_ml", "trackio", "swanlab", "clearml", "neptune", "dvclive"
    ] = "none"


@dataclass(frozen=True, config=CHECKED)
class Recipe:
    """Everything that a training run is made of.

    Raises ValueError (pydantic's ValidationError) for a wrong type, an unknown key, or values that contradict each
    other.

    Example:
        >>> from dataclasses import replace
        >>> from trainers.recipe_reading import load_recipe
        >>> paper = load_recipe("paper_sft")
        >>> paper.optimizer.learning_rate, paper.optimizer.global_batch_size
        (1e-05, 128)
        >>> replace(paper, hardware=replace(paper.hardware, devices=8)).accumulation_steps
        16
    """

    name: str
    stage: Stage
    model: ModelSection = field(default_factory=ModelSection)
    parts: PartsSection = field(default_factory=PartsSection)
    lora: LoraSection | None = None
    preference: PreferenceSection | None = None
    sampling: SamplingSection | None = None
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    data: DataSection = field(default_factory=DataSection)
    hardware: HardwareSection = field(default_factory=HardwareSection)
    estimate: EstimateSection = field(default_factory=EstimateSection)
    run: RunSection = field(default_factory=RunSection)

    def __post_init__(self) -> None:
        if found := contradictions(self):
            raise ValueError("; ".join(found))

    @property
    def training(self) -> dict[str, str]:
        """How each part learns, by its name in trainers/families.py."""
        parts = self.parts
        return {
            "tower": parts.tower.train,
            "adapter": parts.adapter.train,
            "language_model": parts.language_model.train,
            "embeddings": parts.embeddings.train,
        }

    @property
    def trained_parts(self) -> tuple[str, ...]:
        return tuple(part for part, how in self.training.items() if how != "frozen")

    @property
    def lora_parts(self) -> tuple[str, ...]:
        return tuple(part for part, how in self.training.items() if how == "lora")

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per optimiser step on each device."""
        return self.optimizer.global_batch_size // (self.hardware.devices * self.hardware.per_device_batch_size)
