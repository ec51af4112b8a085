"""Optimizer groups: a learning rate per part, layer-wise decay in the tower, weight decay on matrices only.

transformers decides about weight decay by the parameter's name, so that a norm called `ln_1`, a query or a position
table decays. Here the type of the module that owns the parameter decides.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import Trainer
from transformers.pytorch_utils import Conv1D

from trainers.families import ModelParts, find_parts
from trainers.freezing import tower_depths

# Modules whose `weight` multiplies activations; LoRA's and bitsandbytes' layers are subclasses of Linear.
_MATRIX_MODULES = (nn.Linear, _ConvNd, Conv1D)
_ATTENTION_MATRICES = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rates. The scheduler scales all of them alike.

    Attributes:
        base: the language model's, and that of every part without its own.
        tower, adapter, embeddings: the part's own, or None.
        tower_layer_decay: factor in (0, 1] from one block of the tower to the block before it. Qwen-VL: 0.95
            (table 8).
        stem_extra_step: the paper does not say where patch embedding, position table and ln_pre stand. True: one step
            below the first block, as in BEiT's fine-tuning (arXiv 2106.08254); False: with the first block.
    """

    base: float
    tower: float | None = None
    adapter: float | None = None
    embeddings: float | None = None
    tower_layer_decay: float = 0.95
    stem_extra_step: bool = True

    def of_part(self, part: str) -> float:
        own = {"tower": self.tower, "adapter": self.adapter, "embeddings": self.embeddings}.get(part)
        return self.base if own is None else own

    def of_depth(self, depth: int, num_blocks: int) -> float:
        """Learning rate in the tower at `depth` of `trainers.freezing.tower_depths`.

        The last block and what follows it have the tower's full rate; block i of n has rate * decay ** (n - 1 - i).

        Example:
            >>> rates = LearningRates(base=1.0, tower_layer_decay=0.5)
            >>> [rates.of_depth(depth, num_blocks=3) for depth in range(5)]
            [0.125, 0.25, 0.5, 1.0, 1.0]
        """
        lowest = 0 if self.stem_extra_step else 1
        steps_below_last_block = max(0, num_blocks - max(depth, lowest))
        return self.of_part("tower") * self.tower_layer_decay**steps_below_last_block


def decaying_parameters(parts: ModelParts) -> set[str]:
    """Names of the parameters that weight decay acts on: the matrices of linear, convolution and attention layers, and
    the token embedding.

    All else is left alone: biases, norms of any class, and every parameter that a module holds directly (queries,
    class embeddings, position tables). An `nn.Embedding` other than the token embedding is a position table as well.
    """
    decaying = set()
    # PEFT may have wrapped it.
    token_embeddings = [m for m in parts.base.get_input_embeddings().modules() if isinstance(m, nn.Embedding)]
    for path, module in parts.base.named_modules():
        matrices: tuple[str, ...] = ()
        if isinstance(module, _MATRIX_MODULES) or module in token_embeddings:
            matrices = ("weight",)
        elif isinstance(module, nn.MultiheadAttention):
            matrices = _ATTENTION_MATRICES
        decaying |= {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False) if name in matrices}
    return decaying


def keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """Tells bitsandbytes' optimizers to keep the states of embeddings in 32 bits, as its authors advise
    (arXiv 2110.02861); to be called before the first step."""
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


def parameter_groups(model: nn.Module, rates: LearningRates, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, of the parameters that require gradients.

    Each group has `params`, `lr`, `weight_decay` and a `name` for logs: the part, the depth in the tower, and "decay"
    or "no decay". Every trainable parameter is in exactly one group.

    Raises ValueError for a learning rate given to a part of which nothing trains.

    Example:
        >>> [group["name"] for group in parameter_groups(adapter_only, LearningRates(1e-5), weight_decay=0.05)]
        ['adapter, decay', 'adapter, no decay']
    """
    parts = find_parts(model)
    depths = tower_depths(parts)
    decaying = decaying_parameters(parts)
    trainable = {name: p for name, p in parts.base.named_parameters() if p.requires_grad}
    trained_parts = {parts.part_of[name] for name in trainable}
    for part in ("tower", "adapter", "embeddings"):
        if part not in trained_parts and getattr(rates, part) is not None:
            raise ValueError(
                f"A learning rate is given for the {part} ({getattr(rates, part)}), but nothing of it trains: leave "
                f"it out, or train the part. Trained: {', '.join(sorted(trained_parts))}."
            )

    members: dict[tuple, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in trainable.items():
        members[parts.part_of[name], depths.get(name), name in decaying].append(parameter)

    groups: list[dict[str, Any]] = []
    for (part, depth, decays), parameters in members.items():
        lr = rates.of_part(part) if depth is None else rates.of_depth(depth, len(parts.blocks))
        where = part if depth is None else f"{part} {depth}"
        groups.append(
            {
                "params": parameters,
                "lr": lr,
                "weight_decay": weight_decay if decays else 0.0,
                "name": f"{where}, {'decay' if decays else 'no decay'}",
            }
        )
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(trainable)
    return groups


def build_optimizer(trainer: Trainer, model: nn.Module, rates: LearningRates) -> torch.optim.Optimizer:
    """What `trainer.args.optim` names, on the groups of `parameter_groups`.

    Raises ValueError, besides `parameter_groups`, for an optimizer that makes its own groups.
    """
    args = trainer.args
    optimizer_class, settings = trainer.get_optimizer_cls_and_kwargs(args, model)
    if not isinstance(optimizer_class, type) or {"params", "model", "optimizer_dict"} & set(settings):
        raise ValueError(f"optim={args.optim} makes its own parameter groups: choose a plain optimizer.")
    if optimizer_class.__module__.startswith("bitsandbytes"):
        keep_embeddings_in_32_bits(model)
    return optimizer_class(parameter_groups(model, rates, args.weight_decay), **settings)
