"""transformers' processors of Qwen2-VL, Qwen2.5-VL, Qwen3-VL with the coordinate contract; one loader for the family.

The subclasses bear their parents' names and write no file of their own: what they save, plain `AutoProcessor` loads as
the parent; what the parent or a Hub checkpoint saved, they load. They add two entries to processor_config.json, which
transformers ignores: `convention`, and `pixel_limits`, a second copy of the image processor's size. A folder in which
these two differ was edited by hand or mixed from two checkpoints: its boxes were written for other pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, ClassVar

import transformers
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_utils import get_image_size, infer_channel_dimension_format, make_flat_list_of_images
from transformers.utils import cached_file

from .conversation_pictures import parts_of
from .coordinates import CONVENTIONS
from .grounding_mixin import GroundingMixin, Message, Size
from .parts import VIDEO_KEYS, check_part
from .pictures import ANYTHING, PictureLimits
from .processing_qwenvl import QwenVLProcessor
from .smart_resize import check_limits, smart_resize
from .videos import Clip, open_clip, with_max_frame_pixels


class DynamicResolutionMixin(GroundingMixin):
    """Pictures keep their aspect ratio and are resized to lie between two limits, set here and nowhere else."""

    image_processor: Any
    video_processor: Any
    model_types: ClassVar[tuple[str, ...]]

    @property
    def pixel_limits(self) -> dict[str, int]:
        """The limits of a resized picture's area, in pixels: {"min_pixels", "max_pixels"}."""
        size = self.image_processor.size
        return {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}

    @property
    def factor(self) -> int:
        """What the sides of a resized picture are multiples of, in pixels."""
        return self.image_processor.patch_size * self.image_processor.merge_size

    def set_pixel_limits(self, min_pixels: int | None = None, max_pixels: int | None = None) -> None:
        """Changes the limits that are given; boxes and number of tokens follow, also after saving and loading.

        Raises:
            ValueError: limits that contradict each other, or less than one tile of `factor` x `factor`.
        """
        given = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        limits = {**self.pixel_limits, **{name: value for name, value in given.items() if value is not None}}
        check_limits(factor=self.factor, **limits)
        make_size = type(self.image_processor.size)
        self.image_processor.size = make_size(shortest_edge=limits["min_pixels"], longest_edge=limits["max_pixels"])

    def set_video_limits(
        self, max_pixels: int | None = None, fps: float | None = None, max_frames: int | None = None
    ) -> None:
        """Changes what is given: the largest area of a frame in pixels, frames per second, frames of a video.

        They are saved with the processor. `max_pixels` only lowers what the video processor allows.
        """
        for name, value in (("max_pixels", max_pixels), ("fps", fps), ("max_frames", max_frames)):
            least = {"max_pixels": self.factor**2, "fps": 0.0, "max_frames": 2}[name]
            if value is not None and (value < least or value == 0):
                raise ValueError(f"{name} of videos is {value}, it must be at least {least} and more than 0")
        self.video_processor = copy(self.video_processor)
        if max_pixels is not None:
            self.video_processor = with_max_frame_pixels(self.video_processor, max_pixels)
        if fps is not None:
            self.video_processor.fps = fps
        if max_frames is not None:
            self.video_processor.max_frames = max_frames

    def model_size(self, height: int, width: int) -> Size:
        if not self.image_processor.do_resize:
            if height % self.factor or width % self.factor:
                raise ValueError(
                    f"{height}x{width} pixels (height x width), but do_resize is off and sides must be multiples of "
                    f"{self.factor}"
                )
            return height, width
        return smart_resize(height, width, factor=self.factor, **self.pixel_limits)

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        """Refuses pictures that come out at another size than boxes are written for.

        That happens where a call overrides the size (`size`, `max_pixels`, `do_resize` beside the pictures).
        """
        expected = [self.model_size(*_height_width(picture)) for picture in make_flat_list_of_images(images)]
        inputs, replacements = super()._process_images(images, **kwargs)  # type: ignore[misc]
        patch = self.image_processor.patch_size
        for index, (size, (_, rows, columns)) in enumerate(zip(expected, inputs["image_grid_thw"], strict=True)):
            if size != (actual := (int(rows) * patch, int(columns) * patch)):
                raise ValueError(
                    f"picture {index} became {actual[0]}x{actual[1]} pixels (height x width), but boxes are written "
                    f"for {size[0]}x{size[1]}: set the limits with set_pixel_limits or when loading, not in the call"
                )
        return inputs, replacements

    def apply_chat_template(
        self,
        conversation: list,
        chat_template: str | None = None,
        *,
        picture_limits: PictureLimits = ANYTHING,
        tokenize: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `GroundingMixin`'s; with `tokenize`, the frames of videos are chosen and decoded as in training
        (`videos.py`), and resized once, by the video processor.

        Raises:
            ValueError: besides `GroundingMixin`'s, options of videos in the call: they belong into the video part.
        """
        processor_kwargs = dict(processor_kwargs or {})
        if tokenize:
            is_batch = bool(conversation) and isinstance(conversation[0], list | tuple)
            clips: list[Clip] = []
            loaded = [
                self._with_loaded_videos(messages, picture_limits, clips)
                for messages in (conversation if is_batch else [conversation])
            ]
            if clips:
                if given := sorted(
                    {"fps", "num_frames", "do_sample_frames", "video_metadata"} & set(processor_kwargs)
                ):
                    raise ValueError(f"{given[0]} in the call: say it in the video part, or on the video processor")
                processor_kwargs["do_sample_frames"] = False
                processor_kwargs["video_metadata"] = [clip.metadata(self.video_processor) for clip in clips]
                conversation = list(loaded if is_batch else loaded[0])
        return super().apply_chat_template(
            conversation,
            chat_template,
            picture_limits=picture_limits,
            tokenize=tokenize,
            processor_kwargs=processor_kwargs,
            **kwargs,
        )

    def _with_loaded_videos(
        self, messages: Sequence[Message], limits: PictureLimits, clips: list[Clip]
    ) -> Sequence[Message]:
        """The conversation with the frames that the model sees in each video part; the videos are added to `clips`."""
        if not any(part.get("type") == "video" for part in parts_of(messages)):
            return messages

        def load(part: dict[str, Any], where: str) -> dict[str, Any]:
            if part.get("type") != "video":
                return part
            check_part({key: value for key, value in part.items() if value is not None}, where, 0, 0)
            clips.append(open_clip(part, limits))
            named = {key: value for key, value in part.items() if key not in VIDEO_KEYS}
            return {**named, "video": clips[-1].load(self.video_processor)}

        return [
            {
                **message,
                "content": [load(part, f"message {m} part {p}") for p, part in enumerate(message["content"])],
            }
            if isinstance(message.get("content"), list | tuple)
            else message
            for m, message in enumerate(messages)
        ]

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "pixel_limits": self.pixel_limits}

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict, backend: str | None = None, **kwargs: Any
    ) -> list[Any]:
        """Differs from the base class: `backend` is for the image processor alone; videos have no PIL backend."""
        arguments = super()._get_arguments_from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, processor_dict, **kwargs
        )
        if backend is not None:
            arguments[0] = AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, backend=backend, **kwargs)
        return arguments

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, with the pixel limits of pictures, which are then saved with the processor.

        Raises:
            ValueError: the folder belongs to another family or convention, or holds two different pixel limits.
        """
        if "size" in kwargs:
            raise ValueError(f"size={kwargs['size']}: give min_pixels and max_pixels, the one place for these limits")
        path = pretrained_model_name_or_path
        found = processor_class_of(path, **kwargs)
        if found is not None and not issubclass(cls, found):
            raise ValueError(f"{path} holds a {found.__name__}, not a {cls.__name__}: use load_processor")
        processor = super().from_pretrained(path, **kwargs)
        saved, _ = cls.get_processor_dict(path, **kwargs)  # type: ignore[attr-defined]
        if saved.get("pixel_limits", processor.pixel_limits) != processor.pixel_limits:
            raise ValueError(
                f"{path} was saved with {saved['pixel_limits']}, but its image processor has "
                f"{processor.pixel_limits}, and the model was trained on one of them. Make the two entries of "
                f"processor_config.json equal; min_pixels and max_pixels, given when loading, change both"
            )
        processor.set_pixel_limits(min_pixels, max_pixels)
        if processor.video_processor.cap_pixels_per_frame is None:
            # transformers 5.23 leaves it open and announces another default: what training used is saved with it.
            processor.video_processor.cap_pixels_per_frame = False
        return processor


class Qwen2VLProcessor(DynamicResolutionMixin, transformers.Qwen2VLProcessor):
    """Qwen2-VL: boxes in [0, 1000) between special tokens."""

    convention = CONVENTIONS["qwen2_vl"]
    model_types = ("qwen2_vl",)


class Qwen2_5_VLProcessor(DynamicResolutionMixin, transformers.Qwen2_5_VLProcessor):
    """Qwen2.5-VL: boxes in pixels of the resized picture, as JSON."""

    convention = CONVENTIONS["qwen2_5_vl"]
    model_types = ("qwen2_5_vl",)


class Qwen3VLProcessor(DynamicResolutionMixin, transformers.Qwen3VLProcessor):
    """Qwen3-VL: boxes in [0, 1000], as JSON."""

    convention = CONVENTIONS["qwen3_vl"]
    model_types = ("qwen3_vl", "qwen3_vl_moe")


FAMILIES = (Qwen2VLProcessor, Qwen2_5_VLProcessor, Qwen3VLProcessor)
_BY_PROCESSOR_CLASS = {cls.__name__: cls for cls in (QwenVLProcessor, *FAMILIES)}
# "qwen" is shared with the text-only Qwen; QwenVLProcessor tells them apart.
_BY_MODEL_TYPE = {name: cls for cls in FAMILIES for name in cls.model_types} | {
    "qwen_vl": QwenVLProcessor,
    "qwen": QwenVLProcessor,
}
_DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")


def load_processor(
    path: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None, **kwargs: Any
) -> Any:
    """The processor of any model of the family, with boxes: from a folder or a Hub name.

    Args:
        min_pixels, max_pixels: limits of a resized picture's area for the families with dynamic resolution; by default
            what the folder says. They are saved with the processor.
        kwargs: passed to `from_pretrained`.

    Raises:
        ValueError: no processor of the family there; limits for Qwen-VL, whose pictures have one size.

    Example:
        >>> processor = load_processor("Qwen/Qwen2.5-VL-7B-Instruct", max_pixels=1_003_520)
        >>> processor.convention.name, processor.model_size(600, 800)
        ('qwen2_5_vl', (588, 812))
    """
    cls = processor_class_of(path, **kwargs)
    if cls is None:
        raise ValueError(
            f"{path} holds no processor of the Qwen-VL family: its files name none of "
            f"{', '.join(_BY_PROCESSOR_CLASS)}, and no model type among {', '.join(_BY_MODEL_TYPE)}"
        )
    if issubclass(cls, DynamicResolutionMixin):
        return cls.from_pretrained(path, min_pixels=min_pixels, max_pixels=max_pixels, **kwargs)
    if min_pixels is not None or max_pixels is not None:
        raise ValueError(f"{path} holds a {cls.__name__}, which resizes every picture to one size: it takes no limits")
    return cls.from_pretrained(path, **kwargs)


def processor_class_of(path: str | Path, **kwargs: Any) -> Any | None:
    """Our class for the processor in `path`, as its files name it; None if they name none of the family.

    Raises:
        ValueError: its processor and its model belong to two families: boxes would be written in the wrong convention.
    """
    options = {name: kwargs[name] for name in _DOWNLOAD_OPTIONS if name in kwargs}

    def entry(file: str, key: str) -> Any:
        found = cached_file(path, file, _raise_exceptions_for_missing_entries=False, **options)
        return None if found is None else json.loads(Path(found).read_text(encoding="utf-8")).get(key)

    files = ("processor_config.json", "preprocessor_config.json")
    named = next((name for name in (entry(file, "processor_class") for file in files) if name), None)
    model_type = entry("config.json", "model_type")
    by_name, by_type = _BY_PROCESSOR_CLASS.get(named), _BY_MODEL_TYPE.get(model_type)
    if by_name is not None and by_type is not None and by_name is not by_type:
        raise ValueError(
            f"{path} holds a {named}, but its config.json says model_type {model_type!r}, whose processor is a "
            f"{by_type.__name__}: the two write boxes differently. Were files of two checkpoints mixed?"
        )
    return by_name or by_type


def _height_width(picture: Any) -> Size:
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    return get_image_size(picture, infer_channel_dimension_format(picture, num_channels=(1, 3, 4)))
