"""PartsMixin: in front of TRL's trainers, the parts of the model train or stay frozen as in the stage trainers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import TrainOutput

from trainers.cpu_sharding import CpuShardingMixin
from trainers.families import PARTS
from trainers.freezing import Freeze, TrainedParts, freeze
from trainers.optimizer import LearningRates, build_optimizer
from trainers.stages import SFT


def freeze_for_preferences(model: nn.Module, trained: TrainedParts | None, is_peft: bool) -> Freeze:
    """Freezes `model` as `trained` says. Without it: of a PeftModel trains what PEFT made trainable, of a bare model
    what trains in SFT (all but the tower)."""
    return freeze(model, trained or TrainedParts(PARTS if is_peft else SFT.parts))


class PartsMixin(CpuShardingMixin):
    """Put before a trainer that sets `freeze` (and `learning_rates`, if parts have their own) in its __init__.

    Prints what trains; a frozen tower runs without a graph; frozen modules stay in evaluation mode; weight decay and
    learning rates go by part (trainers/optimizer.py).
    """

    freeze: Freeze
    learning_rates: LearningRates | None = None
    optimizer: torch.optim.Optimizer | None
    aux_loss_enabled: bool

    @property
    def _encodes_always(self) -> bool:
        """Whether a batch of text needs a blank picture, as trainers/blank_pictures.py says."""
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return is_sharded or not any(self.freeze.count(part)[0] for part in ("language_model", "embeddings"))

    def _check_experts(self) -> None:
        """After TRL's __init__: ValueError where TRL would add the loss that keeps a mixture of experts balanced."""
        if self.aux_loss_enabled:
            raise ValueError(
                "The language model is a mixture of experts with router_aux_loss_coef above 0, but the completion "
                "head computes no loss of routers: pass router_aux_loss_coef=0.0 in the arguments."
            )

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> TrainOutput:
        if self.is_world_process_zero():
            Console().print(self.freeze.table("what trains"))
        with self.freeze.tower_without_graph():
            return super().train(resume_from_checkpoint, **kwargs)

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            self.freeze.set_modes()
        return super().compute_loss(model, *args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            rates = self.learning_rates or LearningRates(self.args.learning_rate, tower_layer_decay=1.0)
            self.optimizer = build_optimizer(self, model, rates)
        return self.optimizer


@contextmanager
def checkpointing_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards, the same layers recompute their activations as before: TRL switches them all off for the reference,
    and all on again, whichever were on."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    were_on = [layer.gradient_checkpointing for layer in layers]
    try:
        yield
    finally:
        for layer, was_on in zip(layers, were_on, strict=True):
            layer.gradient_checkpointing = was_on
