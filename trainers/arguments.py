"""transformers' TrainingArguments with what the stages need besides: rates per part, what to freeze, the loss."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from trainers.optimizer import LearningRates


@dataclass
class StageArguments(TrainingArguments):
    """Settings of a stage trainer. Everything that transformers' TrainingArguments knows works here too.

    AdamW's betas, epsilon and weight decay are TrainingArguments' (`adam_beta2`, ...); `label_smoothing_factor` is
    TrainingArguments' too, applied to the shifted targets.

    Raises ValueError for settings that would silently do something else than they say.
    """

    tower_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the tower; learning_rate if not given."}
    )
    adapter_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the adapter; learning_rate if not given."}
    )
    embeddings_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate of token embedding and head (for new tokens); learning_rate if not given."
        },
    )
    tower_layer_decay: float = field(
        default=0.95,
        metadata={"help": "Each block of the tower learns this many times as fast as the next one. 1.0: all alike."},
    )
    tower_stem_extra_step: bool = field(
        default=True,
        metadata={"help": "Patch embedding, position table and ln_pre learn slower than the first block, not alike."},
    )
    last_tower_blocks: int | None = field(
        default=None, metadata={"help": "Train only so many of the tower's last blocks. All if not given."}
    )
    freeze_patterns: list[str] = field(
        default_factory=list,
        metadata={"help": "Regular expressions; parameters whose names they find are frozen besides."},
    )
    resolution: int | None = field(
        default=None,
        metadata={
            "help": "Side of pictures in pixels (area: its square, for dynamic resolution). Default: the stage's."
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest example in tokens; pictures shrink, then turns are left out, then it is refused."},
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Several examples in one row of at most max_length tokens; they do not see each other."},
    )
    feature_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for the features of a frozen tower, which later epochs read instead of running it."},
    )
    z_loss: float = field(
        default=0.0, metadata={"help": "Weight of the squared log-normaliser of each target (PaLM uses 1e-4)."}
    )
    # Other defaults than transformers':
    # a collator needs the columns that the model's forward does not name (messages, images).
    remove_unused_columns: bool = field(default=False)
    accelerator_config: dict | str | None = field(default=None)
    # a batch of text rows alone gives the tower no gradient; DistributedDataParallel would wait for it.
    ddp_find_unused_parameters: bool | None = field(default=True)

    def __post_init__(self) -> None:
        if self.accelerator_config is None:
            # Of an iterable dataset, accelerate would cut the first rank's batches into rows for the other ranks, and
            # pictures are no rows.
            self.accelerator_config = {"dispatch_batches": False}
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns=True would drop pictures and messages before the collator: leave it."
            )
        if (self.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "use_reentrant=True gives no gradient to layers behind a frozen part: leave it out (non-reentrant)."
            )
        if not self.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices=False weighs tokens by the device they were on: the loss is the mean "
                "over all tokens of all devices, so leave it True."
            )
        if self.packing and self.max_length is None:
            raise ValueError("packing=True fills rows up to max_length tokens: set max_length.")
        if self.z_loss < 0 or not 0 < self.tower_layer_decay <= 1:
            raise ValueError(
                f"z_loss={self.z_loss} must not be negative, and tower_layer_decay={self.tower_layer_decay} must lie "
                "in (0, 1]."
            )

    @property
    def learning_rates(self) -> LearningRates:
        return LearningRates(
            base=self.learning_rate,
            tower=self.tower_learning_rate,
            adapter=self.adapter_learning_rate,
            embeddings=self.embeddings_learning_rate,
            tower_layer_decay=self.tower_layer_decay,
            stem_extra_step=self.tower_stem_extra_step,
        )
