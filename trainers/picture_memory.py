"""Pictures that several models, or several passes of one, need not encode again: policy and reference, old and new.

What is shared depends on what trains. If tower and adapter are frozen and the same in all models, the finished
features are. If the tower alone is, the outputs of its blocks are, and each model's adapter reads them. If the tower
trains, nothing is.
"""

from typing import Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from trainers.families import ModelParts, find_parts
from trainers.feature_cache import Features, blocks_that_are_read, recording, replaying
from trainers.shared_pictures import encode


class PictureMemory:
    """Remembers the last pictures that any of `models` encoded.

    `shared`: what of them is reused: "features" (of tower and adapter), "blocks" (of the tower) or "nothing".

    Memory is held until other pictures come, or `forget` is called. Whether they are other is decided by their pixels.
    Make it when it is settled what trains, and make a new one if that changes.

    Example:
        >>> memory = PictureMemory(policy, reference)
        >>> add_completion_head(policy, memory=memory)
        >>> add_completion_head(reference, memory=memory)
        >>> memory.shared
        'features'
    """

    def __init__(self, *models: nn.Module) -> None:
        parts = [find_parts(model) for model in models]
        self.shared: Literal["features", "blocks", "nothing"] = "nothing"
        if _is_shared(parts, "tower"):
            self.shared = "features" if _is_shared(parts, "adapter") else "blocks"
        self.kept = blocks_that_are_read(parts[0])
        self._blocks_of = {id(own.base): own.blocks for own in parts}
        self.forget()

    def forget(self) -> None:
        """Lets go of the pictures."""
        self._pictures: dict[str, Tensor] = {}
        self._features: BaseModelOutputWithPooling | None = None
        self._blocks: Features = {}

    def encode(self, model: PreTrainedModel, pictures: dict[str, Tensor]) -> BaseModelOutputWithPooling | None:
        """As `trainers.shared_pictures.encode`, for one of the models; what is shared comes from memory."""
        if "pixel_values" not in pictures or self.shared == "nothing":
            return encode(model.base_model, pictures)
        if not self._knows(pictures):
            self.forget()
        if self.shared == "features":
            if self._features is None:
                with torch.no_grad():  # also where gradient checkpointing makes a frozen tower's input need one
                    self._features = encode(model.base_model, pictures)
            self._pictures = pictures
            return self._features
        blocks = self._blocks_of[id(model)]
        if self._blocks:
            with replaying(blocks, self._blocks):
                return encode(model.base_model, pictures)
        with recording(blocks, self.kept) as outputs:
            encoded = encode(model.base_model, pictures)
        self._pictures, self._blocks = pictures, outputs
        return encoded

    def _knows(self, pictures: dict[str, Tensor]) -> bool:
        known = self._pictures
        return known.keys() == pictures.keys() and all(
            known[key] is value or torch.equal(known[key], value) for key, value in pictures.items()
        )


def _is_shared(models: list[ModelParts], part: str) -> bool:
    """Whether `part` is frozen and has the same weights in all `models`, whatever PEFT does elsewhere."""
    first = dict(models[0].parameters(part))
    for parts in models:
        own = dict(parts.parameters(part))
        if own.keys() != first.keys() or any(p.requires_grad for p in own.values()):
            return False
        # What PEFT added is switched off for the reference, so that the layer is another one there.
        if any(_is_of_peft(parts.base, name) for name in own):
            return False
        if any(p is not first[name] and not torch.equal(p, first[name]) for name, p in own.items()):
            return False
    return True


def _is_of_peft(base: PreTrainedModel, name: str) -> bool:
    path = name.split(".")
    above = (base.get_submodule(".".join(path[:depth])) for depth in range(1, len(path)))
    return any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in above)
