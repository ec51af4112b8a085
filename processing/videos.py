"""A video part -> which of its frames the model sees, without decoding it; then those frames, decoded once.

Which frames is decided by qwen-vl-utils' own rule (`smart_nframes`: `fps` frames per second, at least `min_frames`, at
most `max_frames`, an even number, evenly spaced), so a model sees in training what `process_vision_info` shows it. The
defaults stand on the video processor and are saved with it. Files are read by PyAV: torchvision no longer reads any,
and decord and torchcodec, the other readers of qwen-vl-utils, need not be installed.

Sizes are not decided here: frames are resized once, by the family's video processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import av
import numpy as np
import torch
from qwen_vl_utils.vision_process import FPS, FRAME_FACTOR, calculate_video_frame_range, smart_nframes
from torch import Tensor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from .parts import Part, video_of
from .picture_sources import ANYTHING, PictureLimits, checked_file, describe, read_source
from .pictures import load_picture


@dataclass(frozen=True)
class Clip:
    """A video and what its head says; nothing is decoded.

    part: the video part; its options ("fps", "nframes", ...) choose frames.
    num_frames, frames_per_second: of the whole video. height, width: of a frame, upright, in pixels.
    """

    part: Part
    num_frames: int
    frames_per_second: float
    height: int
    width: int
    limits: PictureLimits = field(default=ANYTHING, repr=False)

    @property
    def name(self) -> str:
        """How messages call it."""
        return _name(video_of(self.part))

    def frames_seen(self, video_processor: Any) -> list[int]:
        """Numbers of the frames that the model sees, counted from 0; an even number of them, evenly spaced.

        A list of frames is taken whole, up to the `max_frames` of the video processor.

        Args:
            video_processor: its `fps` (None: 2), `min_frames` and `max_frames` are the defaults; its `max_frames` also
                limits what the part asks for.

        Raises:
            ValueError: fewer than 2 frames in the video or in what is cut from it.

        Example:
            >>> clip = Clip({"type": "video", "video": "a.mp4", "fps": 4}, 24, 8.0, 48, 64)
            >>> clip.frames_seen(processor.video_processor)
            [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]
        """
        start, end, total = self._range()
        at_most = video_processor.max_frames // FRAME_FACTOR * FRAME_FACTOR
        if _is_list_of_frames(video_of(self.part)):
            wanted = total
        else:
            wanted = smart_nframes(self._asked(video_processor, total), total, self.frames_per_second)
        if wanted <= at_most and wanted == total:
            return list(range(start, end + 1))
        return torch.linspace(start, end, min(wanted, at_most)).round().long().tolist()

    def metadata(self, video_processor: Any) -> dict[str, Any]:
        """What transformers' processors ask about a video whose frames were chosen beforehand (VideoMetadata)."""
        seen = self.frames_seen(video_processor)
        _, _, total = self._range()
        return {
            "total_num_frames": total,
            "fps": self.frames_per_second,
            "duration": total / self.frames_per_second,
            "frames_indices": seen,
            "height": self.height,
            "width": self.width,
        }

    def load(self, video_processor: Any) -> Tensor:
        """The frames that the model sees, uint8 (T, 3, H, W), RGB in [0, 255].

        Raises:
            ValueError: the video is damaged, or shorter than its head says.
        """
        source, seen = video_of(self.part), self.frames_seen(video_processor)
        if _is_list_of_frames(source):
            pictures = [np.asarray(load_picture(source[index], self.limits)) for index in seen]
            if sizes := {picture.shape[:2] for picture in pictures} - {(self.height, self.width)}:
                height, width = sorted(sizes)[0]
                raise ValueError(
                    f"video {self.name} has frames of {self.height}x{self.width} and of {height}x{width} pixels "
                    f"(height x width): all frames of a video have one size"
                )
        else:
            pictures = _decoded(source, self.name, seen, self.limits)
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

    def _asked(self, video_processor: Any, total: int) -> dict[str, float]:
        """What `smart_nframes` takes: the part's wishes, else the video processor's."""
        if total < FRAME_FACTOR:
            raise ValueError(
                f"video {self.name} has {total} frame(s) to choose from, it needs at least {FRAME_FACTOR}"
            )
        if "nframes" in self.part:
            return {"nframes": min(self.part["nframes"], total)}
        defaults = {
            "fps": FPS if video_processor.fps is None else video_processor.fps,
            "min_frames": video_processor.min_frames,
            "max_frames": video_processor.max_frames,
        }
        asked = {name: self.part.get(name, value) for name, value in defaults.items()}
        # A part's own minimum gives way to the limit; smart_nframes would let the smaller of the two win by chance.
        return asked | {"max_frames": max(FRAME_FACTOR, min(asked["max_frames"], total))}

    def _range(self) -> tuple[int, int, int]:
        """First frame, last frame, number of frames of what `video_start` and `video_end` (seconds) cut out."""
        try:
            return calculate_video_frame_range(self.part, self.num_frames, self.frames_per_second)
        except ValueError as error:
            raise ValueError(f"video {self.name}: {error}") from error


def open_clip(part: Part, limits: PictureLimits = ANYTHING) -> Clip:
    """Reads the head of the video that `part` holds: a path, an address, bytes, or a list of frames.

    Frames may be anything that `load_picture` takes; "sample_fps" (2 where it is missing) says how many there are per
    second.

    Raises:
        ValueError: missing, no video in it, outside the limits' root, ... The message names the video.

    Example:
        >>> open_clip({"type": "video", "video": ["1.png", "2.png"], "sample_fps": 1.0}).frames_per_second
        1.0
    """
    part = {key: value for key, value in part.items() if value is not None}
    source = video_of(part)
    name = _name(source)
    if _is_list_of_frames(source):
        first = load_picture(source[0], limits)
        fps = float(part.get("sample_fps", FPS))
        return Clip(part, len(source), fps, first.height, first.width, limits)
    try:
        with av.open(_file(source, name, limits)) as container:
            if not container.streams.video:
                raise ValueError(f"video {name} holds no pictures, only sound")
            stream = container.streams.video[0]
            rate, num_frames = stream.average_rate, stream.frames
            sides = stream.height, stream.width
            # Some containers (WebM, Matroska) do not say how many frames they hold: their packets are counted.
            num_frames = num_frames or sum(1 for packet in container.demux(stream) if packet.size)
            container.seek(0)
            first_frame = next(container.decode(video=0), None)
    except av.error.FFmpegError as error:
        raise ValueError(f"video {name} cannot be read: {error}") from error
    if not rate or first_frame is None:
        raise ValueError(f"video {name} cannot be read: it holds no frames, or does not say how many per second")
    if first_frame.rotation % 180:
        sides = sides[::-1]
    return Clip(part, num_frames, float(rate), *sides, limits)


def with_max_frame_pixels(video_processor: Any, max_pixels: int) -> Any:
    """A copy of a family's video processor whose frames have at most `max_pixels` pixels, and not more than before."""
    limited = copy(video_processor)
    if isinstance(video_processor, Qwen3VLVideoProcessor):
        # Its `size` limits all frames of a video together; this is its limit on a single one, in tokens.
        cell = (video_processor.patch_size * video_processor.merge_size) ** 2
        before = [video_processor.max_video_tokens] if video_processor.cap_pixels_per_frame else []
        limited.cap_pixels_per_frame = True
        limited.max_video_tokens = max(1, min([max_pixels // cell, *before]))
    else:
        size = video_processor.size
        longest = min(max_pixels, size["longest_edge"])
        limited.size = type(size)(shortest_edge=min(longest, size["shortest_edge"]), longest_edge=longest)
    return limited


def _decoded(source: Any, name: str, wanted: Sequence[int], limits: PictureLimits) -> list[np.ndarray]:
    """The frames `wanted`, upright, uint8 (H, W, 3) each."""
    left = set(wanted)
    frames: dict[int, np.ndarray] = {}
    try:
        with av.open(_file(source, name, limits)) as container:
            container.streams.video[0].thread_type = "AUTO"
            for number, frame in enumerate(container.decode(video=0)):
                if number in left:
                    # Phones store what they film lying down, and how to turn it.
                    frames[number] = np.rot90(frame.to_ndarray(format="rgb24"), k=frame.rotation // 90)
                    left.discard(number)
                if not left:
                    break
    except av.error.FFmpegError as error:
        raise ValueError(f"video {name} is damaged: {error}") from error
    if left:
        raise ValueError(
            f"video {name} ends early: frame {min(left)} is wanted, and its head says there is one, but it cannot be "
            f"decoded"
        )
    return [frames[number] for number in wanted]


def _file(source: Any, name: str, limits: PictureLimits) -> Any:
    """What PyAV opens: a path that the limits allow, or bytes."""
    if isinstance(source, str) and source.lower().startswith("file://"):
        source = Path(unquote(urlsplit(source).path))
    if isinstance(source, Path) or (isinstance(source, str) and "://" not in source[:8]):
        return str(checked_file(Path(source), f"video {name}", limits, max_bytes=None))
    try:
        return BytesIO(read_source(source, name, limits))
    except ValueError as error:
        raise ValueError(f"video: {error}") from error


def _is_list_of_frames(source: Any) -> bool:
    return isinstance(source, list | tuple)


def _name(source: Any) -> str:
    return f"of {len(source)} frames" if _is_list_of_frames(source) else describe(source)
