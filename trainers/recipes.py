"""A training run as one frozen, typed value: a Recipe of sections, refused when its fields contradict each other.

`trainers/recipe_reading.py` reads one from YAML, `trainers/train.py` runs it, `trainers/estimate.py` says what memory
it takes. The fields' meanings stand here and nowhere else; where the numbers of the named recipes come from stands in
docs/recipes.md.
"""

from dataclasses import field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

Stage = Literal["pretrain", "multitask", "sft"]
Training = Literal["frozen", "full", "lora"]
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0), Lt(1)]
Count = Annotated[int, Gt(0)]

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
class PartSection:
    """How one part of the model learns: not at all, all its weights, or through LoRA.

    `learning_rate`: None means the optimiser's. `layer_decay` (tower only): each block learns this many times as fast
    as the next one; 1.0 is off. `checkpointing`: activations are recomputed in the backward pass instead of kept.
    """

    train: Training = "frozen"
    learning_rate: Positive | None = None
    layer_decay: Annotated[float, Gt(0), Le(1)] = 1.0
    checkpointing: bool = False


@dataclass(frozen=True, config=CHECKED)
class EmbeddingsSection:
    """Input and output embeddings: frozen, all rows, or only the rows of `model.new_tokens`."""

    train: Literal["frozen", "full", "new_tokens"] = "frozen"
    learning_rate: Positive | None = None


@dataclass(frozen=True, config=CHECKED)
class PartsSection:
    """The model's parts, as trainers/families.py finds them."""

    tower: PartSection = field(default_factory=PartSection)
    adapter: PartSection = field(default_factory=PartSection)
    language_model: PartSection = field(default_factory=PartSection)
    embeddings: EmbeddingsSection = field(default_factory=EmbeddingsSection)


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
    min_learning_rate: Annotated[float, Ge(0)] = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[float, Ge(0)] = 0.0
    max_steps: Count | None = None
    epochs: Positive | None = None
    beta1: Share = 0.9
    beta2: Share = 0.98
    epsilon: Positive = 1e-6
    weight_decay: Annotated[float, Ge(0)] = 0.05
    max_grad_norm: Positive = 1.0
    states: Literal["float32", "8bit", "8bit_paged"] = "float32"
    global_batch_size: Count = 128
    label_smoothing: Share = 0.0
    z_loss: Annotated[float, Ge(0)] = 0.0


@dataclass(frozen=True, config=CHECKED)
class DataFile:
    """One file of rows. `weight`: how often its rows are drawn, relative to the other files'."""

    path: str
    weight: Positive = 1.0


@dataclass(frozen=True, config=CHECKED)
class DataSection:
    """Rows and what becomes of them.

    `max_length`: tokens of a row, pictures' included. `picture_side`: pixels; the native model sees a square of this
    side, the later families at most this side squared in area. `pictures_per_row` is only what the memory estimate
    assumes. `packing`: several rows of one task in one sequence of `max_length`.
    """

    train: tuple[DataFile, ...] = ()
    validation: tuple[DataFile, ...] = ()
    max_length: Count = 2048
    picture_side: Count = 448
    pictures_per_row: Count = 1
    packing: bool = False
    workers: Annotated[int, Ge(0)] = 2


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
class RunSection:
    """Where results go and how often; all intervals in optimiser steps."""

    output_dir: str = "runs/qwenvl"
    seed: int = 0
    log_every: Count = 10
    save_every: Count = 500
    keep_checkpoints: Count = 2
    evaluate_every: Count | None = None
    report_to: Literal["none", "tensorboard", "wandb"] = "none"


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
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    data: DataSection = field(default_factory=DataSection)
    hardware: HardwareSection = field(default_factory=HardwareSection)
    run: RunSection = field(default_factory=RunSection)

    def __post_init__(self) -> None:
        contradictions = [text for text, holds in self._contradictions() if holds]
        if contradictions:
            raise ValueError("; ".join(contradictions))

    @property
    def named_parts(self) -> dict[str, PartSection]:
        """The parts that are stacks of layers, by name."""
        return {
            "tower": self.parts.tower,
            "adapter": self.parts.adapter,
            "language_model": self.parts.language_model,
        }

    @property
    def lora_parts(self) -> tuple[str, ...]:
        return tuple(name for name, part in self.named_parts.items() if part.train == "lora")

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per optimiser step on each device."""
        return self.optimizer.global_batch_size // (self.hardware.devices * self.hardware.per_device_batch_size)

    def _contradictions(self) -> list[tuple[str, bool]]:
        parts, optimizer, hardware = self.parts, self.optimizer, self.hardware
        at_once = hardware.devices * hardware.per_device_batch_size
        quantized = self.model.quantization == "nf4"
        all_rates = [part.learning_rate for part in self.named_parts.values()] + [parts.embeddings.learning_rate]
        return [
            (
                "nothing learns: every part is frozen; set train of a part to full or lora",
                all(part.train == "frozen" for part in self.named_parts.values())
                and parts.embeddings.train == "frozen",
            ),
            (
                "4-bit weights cannot learn (model.quantization is nf4 and parts.language_model.train is full): "
                "train it with lora, or set model.quantization to none",
                quantized and parts.language_model.train == "full",
            ),
            (
                "4-bit weights are only trained beside LoRA: set parts.language_model.train to lora, or "
                "model.quantization to none",
                quantized and not self.lora_parts,
            ),
            (
                f"parts {', '.join(self.lora_parts)} train through LoRA, but lora is null: give its rank and alpha",
                bool(self.lora_parts) and self.lora is None,
            ),
            (
                "lora is given, but no part says train: lora; set one to lora, or set lora to null",
                not self.lora_parts and self.lora is not None,
            ),
            (
                "the tower cannot be trained whole next to LoRA: set parts.tower.train to lora or frozen",
                bool(self.lora_parts) and parts.tower.train == "full",
            ),
            (
                "the language model cannot be trained whole next to LoRA: train it with lora, or no part",
                bool(self.lora_parts) and parts.language_model.train == "full",
            ),
            *(
                (
                    f"parts.{name} is frozen, but has a learning_rate or a layer_decay: train it, or set them to null "
                    "and 1.0",
                    part.train == "frozen" and (part.learning_rate is not None or part.layer_decay != 1.0),
                )
                for name, part in self.named_parts.items()
            ),
            (
                "parts.embeddings is frozen, but has a learning_rate of its own: train it, or drop the rate",
                parts.embeddings.train == "frozen" and parts.embeddings.learning_rate is not None,
            ),
            (
                "layer_decay is for the tower only: set it to 1.0 for the adapter and the language model",
                parts.adapter.layer_decay != 1.0 or parts.language_model.layer_decay != 1.0,
            ),
            (
                "the adapter has too few layers to recompute: set parts.adapter.checkpointing to false",
                parts.adapter.checkpointing,
            ),
            (
                "a frozen tower keeps nothing to recompute: set parts.tower.checkpointing to false",
                parts.tower.train == "frozen" and parts.tower.checkpointing,
            ),
            (
                "parts.embeddings.train is new_tokens, but model.new_tokens is empty: name the tokens",
                parts.embeddings.train == "new_tokens" and not self.model.new_tokens,
            ),
            (
                "model.new_tokens would stay at their random start: set parts.embeddings.train to new_tokens or full",
                bool(self.model.new_tokens) and parts.embeddings.train == "frozen",
            ),
            (
                f"optimizer.min_learning_rate {optimizer.min_learning_rate} is above the learning_rate "
                f"{optimizer.learning_rate}",
                optimizer.min_learning_rate > optimizer.learning_rate,
            ),
            (
                f"optimizer.min_learning_rate belongs to the cosine, but the schedule is {optimizer.schedule}: "
                "set it to 0.0",
                optimizer.min_learning_rate > 0 and optimizer.schedule != "cosine",
            ),
            (
                f"give one of optimizer.max_steps ({optimizer.max_steps}) and optimizer.epochs ({optimizer.epochs}), "
                "and set the other to null",
                (optimizer.max_steps is None) == (optimizer.epochs is None),
            ),
            (
                f"optimizer.warmup_steps {optimizer.warmup_steps} is neither a whole number nor a share below 1",
                optimizer.warmup_steps >= 1 and optimizer.warmup_steps != int(optimizer.warmup_steps),
            ),
            (
                f"optimizer.warmup_steps {optimizer.warmup_steps:g} leaves nothing of max_steps {optimizer.max_steps}",
                optimizer.max_steps is not None and optimizer.warmup_steps >= optimizer.max_steps,
            ),
            (
                f"optimizer.global_batch_size {optimizer.global_batch_size} is not a multiple of "
                f"{hardware.devices} device(s) x hardware.per_device_batch_size {hardware.per_device_batch_size}",
                optimizer.global_batch_size % at_once != 0,
            ),
            (
                f"hardware.precision float32 multiplies no mixed weights, but model.dtype is {self.model.dtype} and "
                f"model.trained_dtype {self.model.trained_dtype}: make them equal, or set precision to bfloat16",
                hardware.precision == "float32" and self.model.dtype != self.model.trained_dtype,
            ),
            (
                "sharding over one device is nothing: set hardware.sharding to none, or hardware.devices above 1",
                hardware.sharding == "full" and hardware.devices == 1,
            ),
            (
                "4-bit weights are not sharded here: set hardware.sharding to none",
                hardware.sharding == "full" and quantized,
            ),
            (
                f"a part's learning_rate is below optimizer.min_learning_rate {optimizer.min_learning_rate} "
                "before the cosine began",
                any(rate is not None and rate < optimizer.min_learning_rate for rate in all_rates),
            ),
            (
                "run.evaluate_every is set, but data.validation is empty: name a file of held-out rows",
                self.run.evaluate_every is not None and not self.data.validation,
            ),
        ]
