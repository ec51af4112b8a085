"""Which examples make a batch: of similar length, of one modality, or packed into rows of one length.

The samplers are lists of batches that a seed and an epoch decide, the same on every rank; a rank takes every
`world_size`-th. Give them to a DataLoader as `batch_sampler`. Under the Trainer leave `rank` and `world_size` alone:
accelerate does the sharding there (and calls `set_epoch`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from .packing import pack


class _Batches(Sampler[list[int]]):
    """Batches of indices, reshuffled each epoch; subclasses say which batches an epoch has.

    Every rank gets the same number of batches, so that no rank waits for another: the last few batches that do not go
    round are left out of the epoch (fewer than `world_size`; another epoch leaves out others).
    """

    def __init__(self, seed: int, rank: int, world_size: int):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, it must be in [0, world_size) = [0, {world_size})")
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = 0
        self._made: tuple[int, list[list[int]]] = (-1, [])

    def set_epoch(self, epoch: int) -> None:
        """The next iteration gives the batches of this epoch."""
        self.epoch = epoch

    def all_batches(self) -> list[list[int]]:
        """The batches of the epoch for all ranks together."""
        if self._made[0] != self.epoch:
            self._made = self.epoch, self._make(np.random.default_rng((self.seed, self.epoch)))
        return self._made[1]

    def _make(self, rng: np.random.Generator) -> list[list[int]]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.all_batches()
        whole_rounds = len(batches) - len(batches) % self.world_size
        return iter(batches[self.rank : whole_rounds : self.world_size])

    def __len__(self) -> int:
        return len(self.all_batches()) // self.world_size


class LengthBatchSampler(_Batches):
    """Batches of `batch_size` examples of similar length, so that little is padding; in random order.

    Each epoch is shuffled and cut into windows of `window` batches; a window is sorted by length and cut into batches,
    and the batches are shuffled. Small windows are more random, large ones pad less.

    Args:
        lengths: tokens per example.
        groups: what must not mix in a batch: "text" and "image" for batches of one modality, or the task. One per
            example; None: everything mixes. The last batch of a group may be smaller than `batch_size`.

    Example:
        >>> sampler = LengthBatchSampler([5, 100, 6, 90], batch_size=2, groups=["text", "image", "text", "image"])
        >>> sorted(sorted(batch) for batch in sampler)
        [[0, 2], [1, 3]]
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        groups: Sequence[Hashable] | None = None,
        *,
        window: int = 50,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        super().__init__(seed, rank, world_size)
        if batch_size < 1 or window < 1:
            raise ValueError(f"batch_size is {batch_size} and window {window}: both must be at least 1")
        self.lengths, self.batch_size, self.window = np.asarray(lengths), batch_size, window
        self._members = _members(groups, len(lengths))

    def _make(self, rng: np.random.Generator) -> list[list[int]]:
        batches: list[list[int]] = []
        for members in self._members:
            shuffled = rng.permutation(members)
            for start in range(0, len(shuffled), self.batch_size * self.window):
                window = shuffled[start : start + self.batch_size * self.window]
                window = window[np.argsort(self.lengths[window], kind="stable")]
                batches += [window[i : i + self.batch_size].tolist() for i in range(0, len(window), self.batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]


class PackedBatchSampler(_Batches):
    """Batches that fill one row of `capacity` tokens each, for `PackedCollator`.

    Each epoch is shuffled and cut into windows of `window` examples, and each window is packed by `packing.pack`:
    larger windows fill better, smaller ones are more random. With `tasks`, a row holds one task only (stage 2).

    Raises:
        ValueError: an example is longer than `capacity`.

    Example:
        >>> sorted(sorted(batch) for batch in PackedBatchSampler([5, 7, 3, 2, 3], capacity=10))
        [[0, 3, 4], [1, 2]]
    """

    def __init__(
        self,
        lengths: Sequence[int],
        capacity: int,
        tasks: Sequence[Hashable] | None = None,
        *,
        window: int = 2048,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        super().__init__(seed, rank, world_size)
        if window < 1:
            raise ValueError(f"window is {window}, it must be at least 1")
        self.lengths, self.capacity, self.window = lengths, capacity, window
        self._members = _members(tasks, len(lengths))

    def _make(self, rng: np.random.Generator) -> list[list[int]]:
        rows: list[list[int]] = []
        for members in self._members:
            shuffled = rng.permutation(members).tolist()
            for start in range(0, len(shuffled), self.window):
                window = shuffled[start : start + self.window]
                rows += [[window[i] for i in row] for row in pack([self.lengths[i] for i in window], self.capacity)]
        return [rows[i] for i in rng.permutation(len(rows))]


def _members(groups: Sequence[Hashable] | None, num_examples: int) -> list[list[int]]:
    """The indices of each group, in the order in which the groups first appear."""
    if groups is None:
        return [list(range(num_examples))]
    if len(groups) != num_examples:
        raise ValueError(f"There are {num_examples} lengths but {len(groups)} groups: give one per example")
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    return list(members.values())
