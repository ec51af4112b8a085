"""What is done with an example that is longer than the model may read; a picture's run of tokens is never cut.

A policy is a list of steps, tried in order until the example fits:

| step     | what it does                                                                                         |
|----------|------------------------------------------------------------------------------------------------------|
| "shrink" | fewer pixels per picture and frame, down to the processor's own minimum, then fewer frames per       |
|          | video, down to `min_frames`; boxes follow, the text stays (families with a dynamic resolution only)  |
| "trim"   | leaves out the last turns: what remains is the longest beginning that ends with a trained answer     |
| "drop"   | leaves the example out; `Supervision.counts` says how many                                           |
| "raise"  | RowError naming the row and both lengths                                                             |

Why the last turns and not the first: a turn refers to those before it, and the picture nearly always comes with the
first, so the beginning of a conversation is a conversation and its end is not. An answer is never cut in the middle:
it would teach the model to stop, or not to stop, at a random place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .chat_spans import Span
from .span_encoding import EncodedSpans
from .videos import Clip, with_max_frame_pixels

Step = Literal["shrink", "trim", "drop", "raise"]


@dataclass(frozen=True)
class LengthPolicy:
    """Longest example in tokens, pictures included, and the steps for longer ones, tried in order.

    Raises:
        ValueError: unknown steps, or steps that can never be reached or never decide: the last must be "drop" or
            "raise", and only the last.

    Example:
        >>> LengthPolicy(2048, ("shrink", "trim", "drop"))
        LengthPolicy(max_length=2048, steps=('shrink', 'trim', 'drop'))
    """

    max_length: int
    steps: tuple[Step, ...] = ("shrink", "trim", "raise")

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}, it must be at least 1")
        if unknown := [step for step in self.steps if step not in get_args(Step)]:
            raise ValueError(f"Unknown step {unknown[0]!r}; known are {', '.join(get_args(Step))}")
        final = [step for step in self.steps if step in ("drop", "raise")]
        if not self.steps or final != [self.steps[-1]] or len(set(self.steps)) != len(self.steps):
            raise ValueError(
                f"steps are {self.steps}: name each once, and end with 'drop' or 'raise', which always decides"
            )


@dataclass(frozen=True)
class Draft:
    """The text of the first `num_messages` messages as ids, before any pixel is touched.

    processor: the one that decides the size of the pictures and how many frames of a video are seen.
    picture_sizes: (height, width) of the originals. clips: the videos.
    num_picture_tokens: how many of the ids stand for pictures and frames.
    """

    processor: Any
    num_messages: int
    encoded: EncodedSpans
    spans: Sequence[Span]
    picture_sizes: Sequence[tuple[int, int]]
    num_picture_tokens: int
    clips: Sequence[Clip] = ()

    @property
    def length(self) -> int:
        return len(self.encoded.input_ids)


Drafter = Callable[[Any, int], Draft]  # (processor, num_messages) -> Draft


def fit(
    whole: Draft, draft: Drafter, endings: Sequence[int], policy: LengthPolicy
) -> tuple[Draft, tuple[Step, ...]] | None:
    """The draft that `policy` makes of `whole`, and the steps it took; None if no step helps.

    Each step is tried alone, in the order of the policy, then "trim" and "shrink" together.

    Args:
        draft: makes a draft of a beginning of the conversation with a given processor.
        endings: numbers of leading messages that end with a trained answer: where a trimmed conversation may end.
    """
    shorter = sorted((count for count in endings if count < whole.num_messages), reverse=True)
    for step in policy.steps:
        if step == "shrink" and (found := _shrunk(whole, draft, policy.max_length)):
            return found, ("shrink",)
        if step == "trim":
            for count in shorter:
                if whole.encoded.message_ends[count - 1] <= policy.max_length:
                    found = draft(whole.processor, count)
                    if found.length <= policy.max_length:
                        return found, ("trim",)
    if {"shrink", "trim"} <= set(policy.steps):
        for count in shorter:
            if found := _shrunk(draft(whole.processor, count), draft, policy.max_length):
                return found, ("trim", "shrink")
    return None


def _shrunk(full: Draft, draft: Drafter, max_length: int) -> Draft | None:
    """`full` with the largest pictures, and after that the most frames, that make it fit; None if nothing does."""
    if not (full.picture_sizes or full.clips) or not has_dynamic_resolution(full.processor):
        return None
    while True:
        if found := _with_smaller_pictures(full, draft, max_length):
            return found
        if not full.clips or (fewer := with_fewer_frames(full.processor, full.clips)) is None:
            return None
        full = draft(fewer, full.num_messages)
        if full.length <= max_length:
            return full


def _with_smaller_pictures(full: Draft, draft: Drafter, max_length: int) -> Draft | None:
    budget = max_length - (full.length - full.num_picture_tokens)
    while budget > 0:
        smaller = shrink_to(full.processor, full.picture_sizes, budget, full.clips)
        if smaller is None:
            return None
        found = draft(smaller, full.num_messages)
        if found.length <= max_length:
            return found
        budget -= found.length - max_length  # coordinates in a smaller picture may take other digits
    return None


def picture_tokens(processor: Any, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Tokens of each picture of (height, width) pixels, as `processor` will make them."""
    if not sizes:
        return []
    return list(processor._get_num_multimodal_tokens(image_sizes=[list(size) for size in sizes])["num_image_tokens"])


def video_tokens(processor: Any, clips: Sequence[Clip]) -> list[int]:
    """Tokens of the frames of each video, as `processor` will make them; time stamps are not among them."""
    if not clips:
        return []
    sizes = [[len(clip.frames_seen(processor.video_processor)), clip.height, clip.width] for clip in clips]
    return list(processor._get_num_multimodal_tokens(video_sizes=sizes)["num_video_tokens"])


def has_dynamic_resolution(processor: Any) -> bool:
    """True if a picture's number of tokens follows its size, within limits on its pixels (Qwen2-VL and later)."""
    size = processor.image_processor.size
    return size.get("longest_edge") is not None and size.get("shortest_edge") is not None


def with_max_pixels(processor: Any, max_pixels: int, max_frame_pixels: int | None = None) -> Any:
    """A copy of `processor`, sharing its tokenizer, whose pictures have at most `max_pixels` pixels, and whose videos
    at most `max_frame_pixels` per frame (None: as the pictures), if they have not less already.

    Everything that depends on the limit (size of the picture, number of tokens, coordinates of boxes) follows from it.
    """
    limited = copy(processor)
    limited.image_processor = copy(processor.image_processor)
    limited.image_processor.size = type(processor.image_processor.size)(
        shortest_edge=min(max_pixels, processor.image_processor.size["shortest_edge"]), longest_edge=max_pixels
    )
    limited.video_processor = with_max_frame_pixels(
        processor.video_processor, max_pixels if max_frame_pixels is None else max_frame_pixels
    )
    return limited


def with_fewer_frames(processor: Any, clips: Sequence[Clip]) -> Any | None:
    """A copy of `processor` that sees half as many frames of the longest video as now; None at its `min_frames`."""
    most = max(len(clip.frames_seen(processor.video_processor)) for clip in clips)
    at_most = max(most // 4 * 2, processor.video_processor.min_frames)
    if at_most >= most:
        return None
    limited = copy(processor)
    limited.video_processor = copy(processor.video_processor)
    limited.video_processor.max_frames = at_most
    return limited


def shrink_to(processor: Any, sizes: Sequence[tuple[int, int]], budget: int, clips: Sequence[Clip] = ()) -> Any | None:
    """`processor` with the largest pixel limit at which pictures of these sizes, and the frames of these videos, have
    at most `budget` tokens together.

    None if even its `shortest_edge` (its minimum of pixels per picture) gives more. The limit is one for all pictures
    and frames, so the largest give way first.
    """
    kinds = ([processor.image_processor] if sizes else []) + ([processor.video_processor] if clips else [])
    limits = [(kind.size["shortest_edge"], kind.size["longest_edge"]) for kind in kinds]
    cell = _cell(processor.image_processor)
    low, high = -(-min(low for low, _ in limits) // cell), max(high for _, high in limits) // cell

    def limited_to(tokens_per_picture: int) -> Any:
        within = [min(max(tokens_per_picture * cell, low), high) for low, high in limits]
        return with_max_pixels(processor, within[0], within[-1])

    def fits(tokens_per_picture: int) -> bool:
        limited = limited_to(tokens_per_picture)
        return sum(picture_tokens(limited, sizes)) + sum(video_tokens(limited, clips)) <= budget

    if low > high or not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return limited_to(low)


def _cell(image_processor: Any) -> int:
    """Pixels that become one token."""
    return (image_processor.patch_size * image_processor.merge_size) ** 2
