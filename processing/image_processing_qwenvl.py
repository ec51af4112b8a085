"""Pictures -> `pixel_values`, on torchvision: fast, on any device, up to 2 grey levels from the original's pixels.

`image_processing_pil_qwenvl.py` gives exactly the original's pixels and is what `QwenVLProcessor` loads by default.
"""

from typing import Any

import PIL.Image
import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling


class QwenVLImageProcessor(TorchvisionBackend):
    """Resizes to one square (bicubic, aspect ratio not kept), scales to [0, 1], normalises with CLIP's mean and std.

    `size` is {"height": 448, "width": 448}; stage 1 of the training uses 224. It is saved with the processor. Palettes
    are expanded and alpha is dropped, as PIL's `convert("RGB")` does (transformers would put the picture on white).

    Called with a picture or a list of them, it returns `pixel_values` (num_images, 3, height, width), float32.

    Example:
        >>> QwenVLImageProcessor()(PIL.Image.new("RGB", (640, 427)), return_tensors="pt")["pixel_values"].shape
        torch.Size([1, 3, 448, 448])
    """

    resample = PILImageResampling.BICUBIC
    size = {"height": 448, "width": 448}  # noqa: RUF012
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def process_image(self, image: Any, do_convert_rgb: bool | None = None, **kwargs: Any) -> torch.Tensor:
        if do_convert_rgb and isinstance(image, PIL.Image.Image):
            image = image.convert("RGB")
        return super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)

    def convert_to_rgb(self, image: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return super().convert_to_rgb(image[:3], **kwargs)
