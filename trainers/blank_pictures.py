"""The tower runs in every forward pass, also on a process whose rows have no picture.

FSDP and ZeRO-3 collect each block's weights when the block runs, from all processes. A process without a picture
would skip the tower, and the others wait for it, or meet its next collective. So it encodes a blank picture where the
others encode theirs, with weight 0. The same gives stage 1, where nothing but the vision parts trains, something to go
back through from a batch of text.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from trainers.families import ModelParts


@contextmanager
def tower_in_every_forward(parts: ModelParts, is_sharded: bool) -> Iterator[None]:
    """Inside, each forward pass with gradients runs tower and adapter, if need be on a blank picture; where the model
    `is_sharded`, those without gradients do so too.

    For families whose language model comes after the tower and takes `inputs_embeds` by name: all of the table.
    """
    ran = False

    def note(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal ran
        ran = True

    def add_blank(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        nonlocal ran
        had_picture, ran = ran, False
        cache = kwargs.get("past_key_values")
        is_continued = cache is not None and cache.get_seq_length() > 0  # the pictures were in the prompt
        # Not the module's mode: a frozen language model is in evaluation mode while the rest trains.
        if had_picture or is_continued or not (is_sharded or torch.is_grad_enabled()):
            return args, kwargs
        blank = parts.base.get_image_features(**blank_inputs(parts), return_dict=True)
        ran = False
        embeds = kwargs["inputs_embeds"]
        return args, {**kwargs, "inputs_embeds": embeds + nothing_of(blank).to(embeds.device, embeds.dtype)}

    (tower,) = parts.modules("tower")
    (language_model,) = parts.modules("language_model")
    with ExitStack() as hooks:
        hooks.callback(tower.register_forward_hook(note).remove)
        hooks.callback(language_model.register_forward_pre_hook(add_blank, with_kwargs=True).remove)
        yield


def nothing_of(encoded: BaseModelOutputWithPooling) -> Tensor:
    """0, with a gradient of 0 for every weight that encoded the pictures."""
    # Qwen3-VL: what its further mergers give, for each of their layers and each picture.
    deep = [features for layer in encoded.get("deepstack_features") or () for features in layer]
    features = (*encoded.pooler_output, *deep)
    return sum((one.float().mean() * 0 for one in features), torch.zeros((), device=features[0].device))


def blank_inputs(parts: ModelParts) -> dict[str, Tensor]:
    """What `get_image_features` takes for the smallest picture of the family, all zeros.

    Example (Qwen2.5-VL):
        >>> {name: tuple(value.shape) for name, value in blank_inputs(parts).items()}
        {'pixel_values': (4, 1176), 'image_grid_thw': (1, 3)}
    """
    vision = parts.base.config.vision_config.to_dict()
    device, dtype = next((p.device, p.dtype) for _, p in parts.parameters("tower"))
    if "spatial_merge_size" in vision:
        merge = vision["spatial_merge_size"]
        channels = vision.get("in_channels", vision.get("in_chans", 3))
        width = channels * vision["temporal_patch_size"] * vision["patch_size"] ** 2
        return {
            "pixel_values": torch.zeros(merge**2, width, device=device, dtype=dtype),
            "image_grid_thw": torch.tensor([[1, merge, merge]], device=device),
        }
    side = vision["image_size"]
    return {"pixel_values": torch.zeros(1, 3, side, side, device=device, dtype=dtype)}
