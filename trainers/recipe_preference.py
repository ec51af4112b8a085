"""The section `preference` of a recipe: which loss compares the two answers, and with what reference."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Loss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
READ_LABEL_SMOOTHING = {"exo_pair", "robust", "aot", "aot_unpaired"}
HAVE_DIVERGENCES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class PreferenceSection:
    """Preference training on rows with `chosen` and `rejected` (stage: dpo). Names and meanings of the losses are
    TRL's.

    `losses`: one, or several as a mixture (MPO: sigmoid, bco_pair, sft) with as many `loss_weights`. `beta`: how
    dearly the policy pays for leaving the reference. `divergence`: what the distance is measured by; `alpha` belongs
    to alpha_divergence. `ld_alpha`: weight of what the longer answer has beyond the shorter one's length.
    `label_smoothing`: share of pairs taken to be the wrong way round. `weighted`: pairs weigh as likely as the policy
    finds them (WPO). `reference`: the policy as it was at the start, by switching LoRA off, by a copy of the adapter
    or the model, or from `reference_cache_dir`, where it is computed once per row; null chooses. `layout`: "tree"
    computes a prompt once for both answers, "rows" once for each.
    """

    losses: tuple[Loss, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] = ()
    beta: Annotated[float, Field(gt=0)] = 0.1
    divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    alpha: float | None = None
    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    weighted: bool = False
    reference: Literal["adapter_off", "adapter_copy", "copy", "cache"] | None = None
    reference_cache_dir: str | None = None
    layout: Literal["tree", "rows"] = "tree"

    def __post_init__(self) -> None:
        losses = set(self.losses)
        rules = [
            ("preference.losses names a loss twice or none", len(losses) != len(self.losses) or not losses),
            (
                f"preference.losses are {len(self.losses)}, but loss_weights {len(self.loss_weights)}: give one each",
                len(self.losses) != len(self.loss_weights) and (len(self.losses) > 1 or self.loss_weights != ()),
            ),
            (
                f"preference.label_smoothing is read by {', '.join(sorted(READ_LABEL_SMOOTHING))} alone: set it to 0",
                self.label_smoothing > 0 and not losses & READ_LABEL_SMOOTHING,
            ),
            (
                "the loss exo_pair needs preference.label_smoothing above 0: its paper takes 1e-3",
                "exo_pair" in losses and self.label_smoothing == 0,
            ),
            (
                f"preference.divergence {self.divergence} goes with {', '.join(sorted(HAVE_DIVERGENCES))} alone",
                self.divergence != "reverse_kl" and not losses <= HAVE_DIVERGENCES,
            ),
            (
                "preference.alpha and divergence alpha_divergence go together: give both or neither",
                (self.alpha is not None) != (self.divergence == "alpha_divergence"),
            ),
            (
                "preference.weighted does not go with aot and aot_unpaired, which sort the pairs",
                self.weighted and bool(losses & {"aot", "aot_unpaired"}),
            ),
            (
                "preference.reference cache and reference_cache_dir go together: give both or neither",
                (self.reference == "cache") != (self.reference_cache_dir is not None),
            ),
        ]
        if found := [message for message, applies in rules if applies]:
            raise ValueError("; ".join(found))
