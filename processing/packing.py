"""Which examples share a row, and the positions that keep them apart in it.

A packed row is several examples one after the other without padding. Attention is kept inside each example by
positions
that start again at 0: transformers reads them (and only them: no attention mask, no cache) and builds a block mask for
eager, sdpa and flex attention, or the sequence boundaries for flash attention.

Letters: L tokens of one example or row, G pictures or videos.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from .encoded_example import EncodedExample


def pack(lengths: Sequence[int], capacity: int, tasks: Sequence[Hashable] | None = None) -> list[list[int]]:
    """First-fit decreasing: indices of the examples in each row, so that no row is longer than `capacity` tokens.

    The longest example goes first, each into the first row that has room. It needs at most 11/9 of the fewest possible
    rows, plus one (Johnson, 1973). With `tasks`, a row holds examples of one task only, as stage 2 of Qwen-VL does.

    Raises:
        ValueError: an example is longer than `capacity`; the lengths of the arguments differ.

    Example:
        >>> pack([5, 7, 3, 2, 3], capacity=10)
        [[1, 2], [0, 4, 3]]
    """
    if tasks is not None:
        if len(tasks) != len(lengths):
            raise ValueError(f"There are {len(lengths)} lengths but {len(tasks)} tasks: give one per example")
        rows: list[list[int]] = []
        for task in dict.fromkeys(tasks):
            members = [index for index, other in enumerate(tasks) if other == task]
            rows += [[members[i] for i in row] for row in pack([lengths[index] for index in members], capacity)]
        return rows
    longest = max(range(len(lengths)), key=lengths.__getitem__, default=None)
    if longest is not None and lengths[longest] > capacity:
        raise ValueError(
            f"Example {longest} has {lengths[longest]} tokens, a packed row holds {capacity}: give the examples a "
            f"max_length of {capacity} or less before packing"
        )
    rows = []
    room = np.zeros(len(lengths), dtype=np.int64)  # left in each row; 0 where there is no row yet
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = room[: len(rows)] >= lengths[index]
        row = int(fits.argmax()) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
            room[row] = capacity
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def fill(rows: Sequence[Sequence[int]], lengths: Sequence[int], capacity: int) -> float:
    """Share of the slots of packed rows that hold a token, in [0, 1]."""
    return sum(lengths[index] for row in rows for index in row) / (capacity * len(rows)) if rows else 1.0


def mrope_positions(
    mm_token_type_ids: Sequence[int],
    *,
    merge_size: int,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    seconds_per_grid: Sequence[float] | None = None,
    tokens_per_second: float = 1.0,
) -> Tensor:
    """Time, height and width positions of one example, int64 of shape (3, L) (Qwen2-VL paper, section 2.1).

    The same numbers as `get_rope_index` of transformers' Qwen2-VL, Qwen2.5-VL and Qwen3-VL, which are methods of the
    models and not aware of packing; a collator has no model. Text counts up alike in all three; the tokens of a
    picture get their cell in its grid; the text after it goes on from the larger side of the grid.

    Args:
        mm_token_type_ids: per token 0 for text, 1 for picture, 2 for video, as the processors give it.
        merge_size: patches of the tower that become one token, per side.
        image_grid_thw, video_grid_thw: int (G, 3), patches before merging, in the order of appearance. A video whose
            frames stand apart in the text, each after its time (Qwen3-VL), takes one run of tokens per frame.
        seconds_per_grid: per video, seconds between two temporal patches; with `tokens_per_second` of the Qwen2.5-VL
            vision config they space the frames of its videos. Leave both for the other families.

    Raises:
        ValueError: the grids do not fit the runs of picture and video tokens.

    Example:
        >>> mrope_positions([0, 1, 1, 0], merge_size=2, image_grid_thw=torch.tensor([[1, 2, 4]]))
        tensor([[0, 1, 1, 3],
                [0, 1, 1, 3],
                [0, 1, 2, 3]])
    """
    grids = {1: _as_list(image_grid_thw), 2: _as_list(video_grid_thw)}
    seconds = list(seconds_per_grid or [])
    pieces: list[Tensor] = []
    start = 0
    for kind, group in groupby(mm_token_type_ids):
        length = len(list(group))
        if kind == 0:
            pieces.append(torch.arange(start, start + length).expand(3, -1))
            start += length
            continue
        if not grids[kind]:
            raise ValueError(f"A run of {length} {_KINDS[kind]} tokens has no grid: more runs than grids were given")
        frames, height, width = grids[kind].pop(0)
        height, width = height // merge_size, width // merge_size
        interval = 1.0
        if kind == 2:
            if length == height * width and frames > 1:
                grids[2].insert(0, [frames - 1, height * merge_size, width * merge_size])
                frames = 1
            elif seconds:
                interval = tokens_per_second * seconds.pop(0)
        if length != frames * height * width:
            raise ValueError(
                f"A run of {length} {_KINDS[kind]} tokens meets a grid of {frames} x {height} x {width} = "
                f"{frames * height * width} tokens (after merging {merge_size} x {merge_size} patches)"
            )
        time = (torch.arange(frames) * interval).long()
        cells = torch.meshgrid(time, torch.arange(height), torch.arange(width), indexing="ij")
        pieces.append(torch.stack(cells).reshape(3, -1) + start)
        start += max(height, width)
    if left := {_KINDS[kind]: len(grid) for kind, grid in grids.items() if grid}:
        raise ValueError(f"Grids without tokens are left over: {left}")
    return torch.cat(pieces, dim=1) if pieces else torch.zeros(3, 0, dtype=torch.long)


_KINDS = {1: "picture", 2: "video"}


def _as_list(grid: Tensor | None) -> list[list[int]]:
    return [] if grid is None else grid.tolist()


def pack_stream(
    examples: Iterable[EncodedExample], capacity: int, *, window: int = 256, by_task: bool = False
) -> Iterator[list[EncodedExample]]:
    """Packed rows of a stream whose lengths are not known beforehand; every example is in one row.

    It waits for `window` examples, packs them, and hands out all rows but the emptiest (with `by_task`: of each task),
    whose examples wait for the next window.

    Example:
        >>> for row in pack_stream(supervise.stream(mixture), capacity=2048):
        ...     batch = PackedCollator.for_processor(processor)(row)
    """
    waiting: list[EncodedExample] = []

    def packed(is_last: bool) -> Iterator[list[EncodedExample]]:
        rows = pack([e.length for e in waiting], capacity, [e.task for e in waiting] if by_task else None)
        emptiest: dict[str | None, list[int]] = {}
        for row in () if is_last else rows:
            task = waiting[row[0]].task if by_task else None
            emptiest[task] = min(emptiest.get(task, row), row, key=lambda r: sum(waiting[i].length for i in r))
        full = [[waiting[i] for i in row] for row in rows if row not in emptiest.values()]
        waiting[:] = [waiting[i] for row in emptiest.values() for i in row]
        yield from full

    for example in examples:
        waiting.append(example)
        if len(waiting) >= window:
            yield from packed(is_last=False)
    yield from packed(is_last=True)
