"""Each picture, and each video, is encoded once per model call, however many rows show it.

`encode` runs tower and adapter on the pictures as they come, each one once; `spread` hands the result to every row
that shows a picture. Both are called inside the model's forward, where DDP and FSDP have their parameters at hand.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

# What describes pictures in a batch; everything else describes rows.
PICTURE_KEYS = ("pixel_values", "image_grid_thw", "image_sizes")


def pictures_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `encode` takes of a batch: its pictures, and after them its videos, which are pictures of several frames to
    the towers that know them (Qwen2-VL and later)."""
    pictures = {key: batch[key] for key in PICTURE_KEYS if key in batch}
    if "pixel_values_videos" in batch:
        for key, of_videos in (("pixel_values", "pixel_values_videos"), ("image_grid_thw", "video_grid_thw")):
            pictures[key] = torch.cat([batch[name] for name in (key, of_videos) if name in batch])
    return pictures


def encode(inner: PreTrainedModel, pictures: dict[str, Tensor]) -> BaseModelOutputWithPooling | None:
    """Tower and adapter on a batch's pictures; None without any.

    Args:
        inner: the model without head.
        pictures: those of `PICTURE_KEYS` that the model's processor makes.

    Returns:
        What the model's `get_image_features` gives: `pooler_output` holds one (tokens, width) tensor per picture, and
        `deepstack_features` (Qwen3-VL) the same for each of some decoder layers.
    """
    if "pixel_values" not in pictures:
        return None
    accepted = inspect.signature(inner.get_image_features).parameters
    return inner.get_image_features(
        **{name: value for name, value in pictures.items() if name in accepted}, return_dict=True
    )


def spread(encoded: BaseModelOutputWithPooling, shown: Sequence[int]) -> BaseModelOutputWithPooling:
    """The features in the order in which rows show their pictures: `shown` has indices, a picture's as often as it is
    shown. Nothing is encoded again, and the gradients of all that show a picture add up.

    Example:
        >>> [len(feature) for feature in spread(encoded, [0, 1, 0, 1]).pooler_output]  # two pictures, two rows
        [4, 6, 4, 6]
    """
    again: dict[str, Any] = {"pooler_output": [encoded.pooler_output[picture] for picture in shown]}
    if "deepstack_features" in encoded:
        again["deepstack_features"] = [[layer[picture] for picture in shown] for layer in encoded.deepstack_features]
    return type(encoded)(**{**encoded, **again})
