"""Which parameters train: set in one place, shown as a table, checked against the gradients, and free where frozen.

Setting `module.requires_grad = False` on a module freezes nothing (it makes an attribute), and an optimizer does not
complain about a part that gets no gradient. So `freeze` is the only place that sets `requires_grad`, and
`Freeze.check_gradients` compares what happened with what was meant.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from rich.table import Table
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from trainers.families import PARTS, ModelParts, find_parts

VISION_PARTS = ("tower", "adapter")
# What the pictures and the text pass on their way to the loss: gradient flows back through all that comes later.
_FLOW = {"tower": 0, "adapter": 1, "embeddings": 1, "language_model": 2}


@dataclass(frozen=True)
class TrainedParts:
    """What trains; everything else is frozen.

    Attributes:
        parts: some of `trainers.families.PARTS`.
        last_tower_blocks: only this many of the tower's last blocks train, with what follows them (as a final norm);
            None trains the whole tower. At least 1.
        frozen_patterns: regular expressions, searched in the parameter's name; what they find is frozen as well.
    """

    parts: tuple[str, ...]
    last_tower_blocks: int | None = None
    frozen_patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise ValueError(f"parts={self.parts!r}: give at least one of {', '.join(PARTS)}.")
        if self.last_tower_blocks is not None and "tower" not in self.parts:
            raise ValueError(
                f"last_tower_blocks={self.last_tower_blocks}, but the tower is not among the trained parts "
                f"{self.parts!r}: add 'tower' or leave last_tower_blocks out."
            )


def freeze(model: nn.Module, trained: TrainedParts) -> "Freeze":
    """Sets `requires_grad` of every parameter of `model`, and returns what was decided.

    Of a PeftModel only what PEFT made trainable can train: LoRA's weights, `modules_to_save`. A part without any
    stays frozen.

    Raises ValueError for an unknown family, for a pattern that freezes nothing, for more blocks than the tower has,
    and if nothing is left to train.
    """
    parts = find_parts(model)
    trains = _what_trains(parts, trained)
    if parts.base is not model:  # wrapped by PEFT
        trains = {name: trains[name] and p.requires_grad for name, p in parts.base.named_parameters()}
    if not any(trains.values()):
        raise ValueError(
            f"Nothing of {type(parts.base).__name__} is left to train with {trained}. If PEFT wraps it, its "
            "target_modules or modules_to_save must reach one of these parts."
        )
    for name, parameter in parts.base.named_parameters():
        parameter.requires_grad_(trains[name])
    for module in parts.base.modules():
        if isinstance(module, Linear4bit):
            # On some CPUs a layer in evaluation mode is packed for inference, for good and with rounded scales, and
            # lets no gradient through any more: one evaluation would end the training.
            module.support_avx512bf16_for_cpu = False
    return Freeze(parts, trains)


def _what_trains(parts: ModelParts, trained: TrainedParts) -> dict[str, bool]:
    num_blocks = len(parts.blocks)
    last = trained.last_tower_blocks
    if last is not None and not 1 <= last <= num_blocks:
        raise ValueError(f"last_tower_blocks={last}, but the tower has {num_blocks} blocks: give 1 to {num_blocks}.")

    trains = {name: part in trained.parts and name not in parts.constants for name, part in parts.part_of.items()}
    if last is not None:
        for name, depth in tower_depths(parts).items():
            trains[name] = depth > num_blocks - last
    for pattern in trained.frozen_patterns:
        found = [name for name in trains if trains[name] and re.search(pattern, name)]
        if not found:
            example = next((name for name in trains if trains[name]), "none")
            raise ValueError(
                f"The freeze pattern {pattern!r} finds no parameter that would train. Names look like {example}; "
                f"trained parts: {', '.join(trained.parts)}."
            )
        trains.update(dict.fromkeys(found, False))
    return trains


def tower_depths(parts: ModelParts) -> dict[str, int]:
    """Depth of each parameter of the tower: 0 before the blocks, i + 1 in block i, len(blocks) + 1 after the blocks.

    Before and after is the order of registration, which is the order of computation in every tower of the table: patch
    embedding, class embedding, position table and ln_pre come before, the final norm after.

    Example:
        >>> tower_depths(find_parts(llava))["model.vision_tower.pre_layrnorm.weight"]
        0
    """
    depths, passed_blocks = {}, False
    for name, _ in parts.parameters("tower"):
        block = parts.block_of(name)
        passed_blocks = passed_blocks or block is not None
        depths[name] = block + 1 if block is not None else (len(parts.blocks) + 1) * passed_blocks
    return depths


class Freeze:
    """What `freeze` decided for one model: its table, its check, and the means that make frozen parts cost nothing."""

    def __init__(self, parts: ModelParts, trains: dict[str, bool]) -> None:
        self.parts = parts
        self.trains = trains  # parameter name -> does it train
        # By identity, since a tied weight has one name only.
        self._trains = {id(p): trains[name] for name, p in parts.base.named_parameters()}
        self._frozen_modules = list(self._find_frozen_modules(parts.base))
        self._layers_with_flow = list(self._find_layers_with_flow())

    def count(self, part: str) -> tuple[int, int]:
        """(parameters that train, parameters in all) of one part."""
        sizes = [(p.numel(), self.trains[name]) for name, p in self.parts.parameters(part)]
        return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)

    def table(self, title: str) -> Table:
        """The parts with the number of their parameters, and how many of them train."""
        table = Table("part", title=title)
        for heading in ("parameters", "trained", "frozen"):
            table.add_column(heading, justify="right")
        rows = [(part, *self.count(part)) for part in PARTS]
        rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
        for part, trained, total in rows:
            table.add_row(part, f"{total:,}", f"{trained:,}", f"{total - trained:,}", end_section=part == PARTS[-1])
        return table

    def check_gradients(self, saw_pictures: bool) -> bool:
        """Compares the gradients of one step, before they are cleared, with what should train.

        Returns whether every trained part could be judged: tower and adapter get no gradient from a step that
        `saw_pictures` says had none, and have to wait. Raises RuntimeError for a frozen parameter with a gradient and
        for a trained part without any.
        """
        for name, parameter in self.parts.base.named_parameters():
            if not self.trains[name] and (parameter.grad is not None or parameter.requires_grad):
                raise RuntimeError(
                    f"{name} is frozen but has {'a gradient' if parameter.grad is not None else 'requires_grad set'}: "
                    "something other than trainers.freezing.freeze changed requires_grad after the trainer was made."
                )
        judged = True
        for part in PARTS:
            trained = [(name, p) for name, p in self.parts.parameters(part) if self.trains[name]]
            if not trained or any(p.grad is not None and bool(p.grad.any()) for _, p in trained):
                continue
            if part in VISION_PARTS and not saw_pictures:
                judged = False
                continue
            raise RuntimeError(
                f"The {part} should train ({len(trained)} tensors, first {trained[0][0]}), but after the first step "
                "none of them has a gradient other than zero: it is not connected to the loss."
            )
        return judged

    def set_modes(self) -> None:
        """Frozen modules to eval mode (no dropout, no drop path). To be called after each `model.train()`.

        transformers checkpoints a layer only in train mode. A frozen layer that gradients pass through, as the
        language model's in stage 1, therefore keeps that mode for itself while its children are in eval mode.
        """
        for module in self._frozen_modules:
            module.eval()
        for layer in self._layers_with_flow:
            layer.training = layer.gradient_checkpointing

    @contextmanager
    def tower_without_graph(self) -> Iterator[None]:
        """Inside, the frozen beginning of the tower runs without autograd graph, also under gradient checkpointing.

        transformers makes the output of every input embedding require a gradient when checkpointing is switched on,
        the patch embedding included, so that a frozen tower builds a graph and is run again in the backward pass, for
        nothing. A detach in front of the first block undoes this, whoever set that hook.
        """
        stem = [name for name, depth in tower_depths(self.parts).items() if depth == 0]
        if any(self.trains[name] for name in stem):
            yield
            return
        handle = self.parts.blocks[0].register_forward_pre_hook(_detach_inputs, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _find_frozen_modules(self, module: nn.Module) -> Iterator[nn.Module]:
        """The largest modules that hold parameters, none of which trains."""
        trains = [self._trains[id(p)] for p in module.parameters()]
        if trains and not any(trains):
            yield module
        elif trains:
            for child in module.children():
                yield from self._find_frozen_modules(child)

    def _find_layers_with_flow(self) -> Iterator[GradientCheckpointingLayer]:
        """Frozen checkpointable layers behind something that trains."""
        named = sorted(self.parts.base.named_parameters(), key=lambda item: _FLOW[self.parts.part_of[item[0]]])
        first_trained = next(i for i, (name, _) in enumerate(named) if self.trains[name])
        ahead = {id(p) for _, p in named[:first_trained]}
        for layer in self.parts.base.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                ids = [id(p) for p in layer.parameters()]
                if not any(self._trains[i] for i in ids) and ahead.isdisjoint(ids):
                    yield layer


def _detach_inputs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    def detached(value: Any) -> Any:
        return value.detach() if isinstance(value, torch.Tensor) else value

    return tuple(map(detached, args)), {name: detached(value) for name, value in kwargs.items()}
