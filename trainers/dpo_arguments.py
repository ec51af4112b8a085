"""TRL's DPOConfig with what pictures and parts need besides: the layout, the reference, the resolution."""

from dataclasses import dataclass, field
from typing import Literal

from trl import DPOConfig

Reference = Literal["adapter_off", "adapter_copy", "copy", "cache"]


@dataclass
class DPOArguments(DPOConfig):
    """Settings of `QwenVLDPOTrainer`: all of TRL's (losses, `beta`, `label_smoothing`, ...), and those below.

    Raises ValueError for settings that would silently do something else than they say.
    """

    completion_layout: Literal["tree", "rows"] = field(
        default="tree",
        metadata={"help": "'tree' computes a prompt once for both answers, 'rows' once for each (flash attention)."},
    )
    reference: Reference | None = field(
        default=None,
        metadata={
            "help": "What the policy is compared with: 'adapter_off' (the base of LoRA), 'adapter_copy' (the adapter "
            "as it was at the start), 'copy' (the whole model as it was), 'cache' (what either gave, from disk). "
            "Default: a copy of the adapter or the model, and adapter_off for a fresh adapter."
        },
    )
    reference_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for the reference log-probabilities of reference='cache'."}
    )
    resolution: int | None = field(
        default=None,
        metadata={"help": "Side of pictures in pixels (area: its square, for dynamic resolution). Default: SFT's."},
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest prompt with its longer answer, in tokens; pictures shrink, else it is refused."},
    )
    # Other defaults than TRL's: a collator needs the rows; and the cache has its own name here.
    remove_unused_columns: bool = field(default=False)
    precompute_ref_log_probs: bool = field(default=False)

    def __post_init__(self) -> None:
        if self.precompute_ref_log_probs:
            raise ValueError("precompute_ref_log_probs is called reference='cache' here, with a reference_cache_dir.")
        if (self.reference == "cache") != (self.reference_cache_dir is not None):
            raise ValueError(
                f"reference={self.reference!r} and reference_cache_dir={self.reference_cache_dir!r}: the cache needs "
                "a folder, and nothing else has one."
            )
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor belongs to next-token losses: DPO's is label_smoothing.")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop the rows before the collator: leave it out.")
        if self.truncation_mode != "keep_start" or self.padding_free:
            raise ValueError(
                f"truncation_mode={self.truncation_mode!r} and padding_free={self.padding_free}: nothing is truncated "
                "here, and rows are padded. Leave both out."
            )
        # From here on it is TRL's name for it: its loss then reads the columns of the cache.
        self.precompute_ref_log_probs = self.reference == "cache"
        super().__post_init__()
