"""What a model will see of an example: its tokens with their labels, its pictures as resized, its boxes as written.

`inspection_page.py` shows it in a browser, `inspection_terminal.py` in a terminal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .chat_spans import IGNORE
from .coordinates import Box, Pair, Shape, from_model, to_model
from .document_boxes import map_boxes
from .encoded_example import EncodedExample
from .example import Example, Source
from .grounding_mixin import GroundingMixin, shapes_in_pixels
from .length import Draft
from .parts import SHAPES
from .pictures import load_picture
from .supervision import Supervision

Kind = Literal["read", "supervised", "special", "picture", "left_out"]


@dataclass(frozen=True)
class Token:
    """One token, or a run that is shown as one: a picture's placeholders, or bytes that only together are a letter.

    kind: "supervised" is trained; of the rest, "special" is a special token, "picture" a placeholder, "left_out" cut
    off by the length policy, "read" everything else. number: how many tokens it stands for.
    """

    text: str
    kind: Kind
    weight: float
    number: int = 1
    is_special: bool = False


@dataclass(frozen=True)
class SeenShape:
    """A shape as the model reads it, corners in pixels of the resized picture."""

    kind: str
    corners: tuple[Pair, ...]
    label: str | None


@dataclass(frozen=True)
class SeenPicture:
    """A picture as the tower receives it, taken back from the pixel values, and the shapes written for it.

    original_size: (height, width) in pixels. num_tokens: visual tokens of the language model.
    """

    picture: Image.Image
    original_size: tuple[int, int]
    num_tokens: int
    shapes: tuple[SeenShape, ...]


@dataclass(frozen=True)
class Inspection:
    """What becomes of one example.

    outcome: "kept", the length steps that were taken ("shrink", "trim", "trim + shrink"), "drop", or "refused".
    problem: why it is dropped or refused.
    length: tokens that the model sees (0 if none); whole_length: tokens before the length policy.
    """

    source: Source
    task: str | None
    outcome: str
    problem: str | None
    length: int
    whole_length: int
    num_supervised: int
    num_picture_tokens: int
    tokens: tuple[Token, ...]
    pictures: tuple[SeenPicture, ...]


def inspect_example(example: Example, supervise: Supervision) -> Inspection:
    """What `supervise` makes of `example`; problems become part of the result instead of exceptions."""
    processor = supervise.processor
    supervise = copy(supervise)
    supervise.counts = Counter()  # looking is not counted
    try:
        sizes = [load_picture(picture, supervise.limits).size[::-1] for picture in example.pictures]
        clips = supervise.clips(example)
        whole = supervise.draft(example, sizes, processor, len(example.messages), clips)
    except ValueError as error:
        return Inspection(example.source, example.task, "refused", str(error), 0, 0, 0, 0, (), ())
    refused: str | None = None
    encoded: EncodedExample | None = None
    draft = whole
    try:
        if (plan := supervise.plan(example, sizes, clips)) is not None:
            draft = plan[0]
        encoded = supervise(example)
    except ValueError as error:
        refused = str(error).removeprefix(f"{example.source.where}: ")
    if encoded is None:
        dropped = f"{whole.length} tokens are more than {supervise.length.max_length}" if supervise.length else None
        tokens = tuple(_tokens(whole, processor, left_out=True))
        outcome, problem, pictures, length = "refused" if refused else "drop", refused or dropped, [], 0
    else:
        tokens = (*_tokens(draft, processor), *_left_out(whole, draft, processor))
        outcome, problem, length = " + ".join(encoded.fitted) or "kept", None, encoded.length
        pictures = _pictures(example, draft, encoded)
    return Inspection(
        source=example.source,
        task=example.task,
        outcome=outcome,
        problem=problem,
        length=length,
        whole_length=whole.length,
        num_supervised=0 if encoded is None else encoded.num_supervised,
        num_picture_tokens=0 if encoded is None else draft.num_picture_tokens,
        tokens=tokens,
        pictures=tuple(pictures),
    )


def _tokens(draft: Draft, processor: Any, start: int = 0, left_out: bool = False) -> list[Token]:
    encoded, tokenizer = draft.encoded, processor.tokenizer
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    items = list(zip(encoded.input_ids, encoded.labels, encoded.weights, strict=True))[start:]
    tokens: list[Token] = []
    placeholders = {processor.image_token_id: processor.image_token}
    if draft.clips:
        placeholders[processor.video_token_id] = processor.video_token
    for placeholder, group in groupby(items, lambda item: placeholders.get(item[0])):
        run = list(group)
        if placeholder is not None:
            tokens.append(Token(placeholder, "left_out" if left_out else "picture", 0.0, len(run), True))
            continue
        for ids, label, weight in _letters(run, tokenizer, special):
            is_special = ids[0] in special
            kind: Kind = "supervised" if label != IGNORE else "special" if is_special else "read"
            text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            tokens.append(Token(text, "left_out" if left_out else kind, weight, len(ids), is_special))
    return tokens


def _letters(
    run: Sequence[tuple[int, int, float]], tokenizer: Any, special: set[int]
) -> list[tuple[list[int], int, float]]:
    """(ids, label of the first, weight) with ids joined until they are whole letters of equal supervision."""
    joined: list[tuple[list[int], int, float]] = []
    waiting = False
    for id, label, weight in run:
        if waiting and id not in special and (label == IGNORE) == (joined[-1][1] == IGNORE):
            joined[-1][0].append(id)
        else:
            joined.append(([id], label, weight))
        # A character may be spread over several byte-level tokens; at most 4 bytes, so at most 4 tokens.
        text = tokenizer.decode(joined[-1][0], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        waiting = text.endswith("\N{REPLACEMENT CHARACTER}") and len(joined[-1][0]) < 4
    return joined


def _left_out(whole: Draft, draft: Draft, processor: Any) -> list[Token]:
    """The tokens of the turns that were trimmed away."""
    if draft.num_messages == whole.num_messages:
        return []
    start = whole.encoded.message_ends[draft.num_messages - 1]
    # What stands between two messages (a line break) ends the draft and is there already.
    tail = draft.spans[-1]
    if not tail.is_content and not tail.is_target:
        start += len(processor.tokenizer(tail.text, add_special_tokens=False)["input_ids"])
    return _tokens(whole, processor, start=start, left_out=True)


def _pictures(example: Example, draft: Draft, encoded: EncodedExample) -> list[SeenPicture]:
    processor = draft.processor
    if not draft.picture_sizes:
        return []
    seen = pictures_from_pixels(encoded.vision, processor.image_processor)
    shapes = _shapes(example, draft) if isinstance(processor, GroundingMixin) else [()] * len(seen)
    runs = [
        len(list(run))
        for is_pad, run in groupby(encoded.input_ids.tolist(), lambda i: i == processor.image_token_id)
        if is_pad
    ]
    return [
        SeenPicture(picture, size, number, tuple(drawn))
        for picture, size, number, drawn in zip(seen, draft.picture_sizes, runs, shapes, strict=True)
    ]


def _shapes(example: Example, draft: Draft) -> list[list[SeenShape]]:
    """For each picture its shapes, after the rounding that the family's notation brings."""
    processor = draft.processor
    frames = processor.frames(draft.picture_sizes)
    found: list[list[SeenShape]] = [[] for _ in frames]
    num_before = 0
    for message in example.messages[: draft.num_messages]:
        for part in () if isinstance(message["content"], str) else message["content"]:
            num_before += part["type"] == "image"
            shapes: list[Shape] = []
            if part["type"] in SHAPES:
                shapes = shapes_in_pixels(part, frames, num_before, "refuse", None)
            elif part["type"] == "document":
                index = part.get("image_index", num_before - 1)
                shapes = [replace(box, image_index=index) for box in _boxes_of_document(part["html"])]
            for shape in shapes:
                frame = frames[shape.image_index]
                corners = from_model(to_model(shape, frame, processor.convention), frame, processor.convention)
                scale_x, scale_y = frame.model_width / frame.width, frame.model_height / frame.height
                scaled = tuple((x * scale_x, y * scale_y) for x, y in corners)
                found[shape.image_index].append(SeenShape(shape.kind, scaled, shape.label))
    return found


def _boxes_of_document(html: str) -> list[Box]:
    boxes: list[Box] = []

    def note(box: Box) -> tuple[float, ...]:
        boxes.append(box)
        return box.x1, box.y1, box.x2, box.y2

    map_boxes(html, note)
    return boxes


def pictures_from_pixels(vision: dict[str, Tensor] | Any, image_processor: Any) -> list[Image.Image]:
    """The pictures behind `pixel_values`: (G, 3, H, W), or the patches of the Qwen2-VL families with their grid."""
    pixels = vision["pixel_values"].float()
    if "image_grid_thw" in vision:
        planes = []
        m, p, t = image_processor.merge_size, image_processor.patch_size, image_processor.temporal_patch_size
        start = 0
        for frames, height, width in vision["image_grid_thw"].tolist():
            patches = pixels[start : start + frames * height * width]
            start += frames * height * width
            # Patches come in groups of m x m, each as (colour, time, row, column); a picture repeats itself in time.
            blocks = patches.view(frames, height // m, width // m, m, m, 3, t, p, p)[0, ..., 0, :, :]
            planes.append(blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, height * p, width * p))
    else:
        planes = list(pixels)
    mean, std = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
    return [
        Image.fromarray(
            np.ascontiguousarray(((plane.permute(1, 2, 0) * std + mean) * 255).round().clamp(0, 255).byte().numpy())
        )
        for plane in planes
    ]
