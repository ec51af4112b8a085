"""Pictures -> `pixel_values`, on PIL: bit for bit the pixels that the original Qwen-VL sees."""

from typing import Any

import numpy as np
import PIL.Image
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format

from .image_processing_qwenvl import QwenVLImageProcessor


class QwenVLImageProcessorPil(PilBackend):
    """The same as `QwenVLImageProcessor` (settings, result), computed with PIL and numpy."""

    resample = QwenVLImageProcessor.resample
    size = QwenVLImageProcessor.size
    image_mean = QwenVLImageProcessor.image_mean
    image_std = QwenVLImageProcessor.image_std
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def process_image(self, image: Any, do_convert_rgb: bool | None = None, **kwargs: Any) -> np.ndarray:
        if do_convert_rgb and isinstance(image, PIL.Image.Image):
            image = image.convert("RGB")
        return super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)

    def convert_to_rgb(self, image: Any, input_data_format: str | ChannelDimension | None = None) -> np.ndarray:
        if isinstance(image, np.ndarray) and image.ndim == 3:
            layout = input_data_format or infer_channel_dimension_format(image, num_channels=(1, 3, 4))
            image = image[..., :3] if layout == ChannelDimension.LAST else image[:3]
        return super().convert_to_rgb(image, input_data_format=input_data_format)
