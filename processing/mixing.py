"""Several sources of rows -> one stream by weight; seeded, resumable, and sharded row by row over ranks and workers.

The stream is one sequence that the seed and the epoch decide; consumer c of n takes its rows c, c + n, c + 2n, ... So
all consumers together have every row of the sequence once, whatever their number, also where a source is a single
file. (datasets' `interleave_datasets` with `split_dataset_by_node` shards by file: with fewer files than workers the
others idle, and its probabilities need rows of equal columns.) Rows of other consumers are not decoded; of a source
without length they are read over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from itertools import islice
from operator import getitem
from typing import Any, Literal, get_args

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

Stop = Literal["once", "first", "all"]


class Mixture(IterableDataset):
    """A weighted mixture of sources, such as {"grounding": rows, "text": rows} with pure text against forgetting.

    Args:
        sources: name -> rows. A sequence (with length and index) is shuffled anew each time it is gone through;
            anything else that can be iterated again is read in its own order.
        weights: name -> how often its rows are drawn, relative to the others; None: in proportion to the lengths.
        stop: when an epoch ends. "once": every row of every source once; sources that are used up no longer take part.
            "first": when a source is used up. "all": when each has been used up; shorter ones start again.
        rank, world_size: the consumer among processes; workers of a DataLoader are found by themselves. Under the
            Trainer             leave them alone: accelerate shards there.

    Raises:
        ValueError: unknown or missing names in `weights`, a weight that is not above 0, no lengths to weigh by, a
            source without rows.

    Example:
        >>> list(Mixture({"a": ["a1", "a2", "a3"], "b": ["b1"]}, {"a": 1, "b": 1}, stop="once", seed=2))
        ['a3', 'a1', 'b1', 'a2']
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[Any] | Iterable[Any]],
        weights: Mapping[str, float] | None = None,
        *,
        stop: Stop = "once",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if not sources:
            raise ValueError("A mixture needs at least one source")
        if weights is None:
            if unsized := [name for name, rows in sources.items() if not isinstance(rows, Sized)]:
                raise ValueError(f"The length of {', '.join(unsized)} is not known: give weights")
            weights = {name: len(rows) for name, rows in sources.items() if isinstance(rows, Sized)}
        if set(weights) != set(sources):
            raise ValueError(f"weights are for {sorted(weights)}, sources are {sorted(sources)}: give one for each")
        if wrong := {name: weight for name, weight in weights.items() if not weight > 0}:
            raise ValueError(f"Weights must be above 0 (leave the source out, or it has no rows): {wrong}")
        if stop not in get_args(Stop):
            raise ValueError(f"stop is {stop!r}; known are {', '.join(get_args(Stop))}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, it must be in [0, world_size) = [0, {world_size})")
        self.sources, self.stop, self.seed = dict(sources), stop, seed
        self.weights = np.array([weights[name] for name in sources], dtype=float)
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self._num_batches, self._batch_size = 0, 1  # handed out of this epoch

    def set_epoch(self, epoch: int) -> None:
        """The next iteration gives this epoch, from its start."""
        if epoch != self.epoch:
            self.epoch, self._num_batches = epoch, 0

    def state_dict(self, num_batches: int | None = None, batch_size: int = 1) -> dict[str, int]:
        """Where this rank is. With workers, which read ahead, say how many batches of which size have been used."""
        if num_batches is None:
            num_batches, batch_size = self._num_batches, self._batch_size
        return {"epoch": self.epoch, "seed": self.seed, "num_batches": num_batches, "batch_size": batch_size}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """The next iteration goes on after the rows of `state`, with the same number of ranks and workers."""
        if state["seed"] != self.seed:
            raise ValueError(f"The state is of a mixture with seed {state['seed']}, this one has seed {self.seed}")
        self.epoch, self._num_batches, self._batch_size = state["epoch"], state["num_batches"], state["batch_size"]

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        # A DataLoader takes batches from its workers in turn and starts with worker 0, also when it resumes.
        share = (worker + self._num_batches) % num_workers
        done = len(range(share, self._num_batches, num_workers)) * self._batch_size
        consumer, num_consumers = self.rank + self.world_size * share, self.world_size * num_workers
        before = self._num_batches * self._batch_size
        mine = islice(self._rows(), consumer, None, num_consumers)
        for number, get_row in enumerate(islice(mine, done, None), start=1):
            row = get_row()
            self._num_batches, self._batch_size = before + number, 1
            yield row
        self._num_batches = 0

    def _rows(self) -> Iterator[Callable[[], Any]]:
        """The whole sequence of the epoch, each row as a function that fetches it."""
        rng = np.random.default_rng((self.seed, self.epoch))
        walks = [self._walk(number, 0) for number in range(len(self.sources))]
        passes = [0] * len(walks)
        active = self.weights.copy()
        while active.any():
            shares = np.cumsum(active)
            number = int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))
            get_row = next(walks[number], None)
            if get_row is None:
                passes[number] += 1
                if self.stop == "first" or (self.stop == "all" and all(passes)):
                    return
                if self.stop == "once":
                    active[number] = 0
                    continue
                walks[number] = self._walk(number, passes[number])
                get_row = next(walks[number], None)
                if get_row is None:
                    raise ValueError(f"Source {list(self.sources)[number]!r} has no rows, or cannot be iterated twice")
            yield get_row

    def _walk(self, number: int, num_passes: int) -> Iterator[Callable[[], Any]]:
        """Once through a source."""
        rows: Any = list(self.sources.values())[number]
        if isinstance(rows, Sized):
            order = np.random.default_rng((self.seed, self.epoch, number, num_passes)).permutation(len(rows))
            return (partial(getitem, rows, int(index)) for index in order)
        return (partial(_itself, row) for row in rows)


def _itself(row: Any) -> Any:
    return row
