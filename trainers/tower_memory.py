"""A frozen tower sees each picture of a batch of rollouts once: while generating. Scoring and learning reuse it.

What is kept is the output of the tower's blocks, so that adapters may train; policy, old policy and reference, which
have the same tower, all read it. It lives as long as the prompt it belongs to.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trainers.feature_cache import Features, blocks_that_are_read, recording, replaying
from trainers.freezing import Freeze
from trainers.rollouts import Prompt


class TowerMemory:
    """Serves the tower of the model that `freeze` was made for, and of copies of it; does nothing if the tower trains.

    Example:
        >>> memory = TowerMemory(freeze)
        >>> with memory.around(policy, prompts):  # the tower runs
        ...     policy.generate(...)
        >>> with memory.around(reference, prompts[:2]):  # it does not
        ...     reference(...)
    """

    def __init__(self, freeze: Freeze) -> None:
        parts = freeze.parts
        self.is_used = not any(freeze.trains[name] for name, _ in parts.parameters("tower"))
        self._path = parts.blocks_path
        self._kept = blocks_that_are_read(parts)
        self._known: WeakKeyDictionary[Prompt, Features] = WeakKeyDictionary()

    @contextmanager
    def around(self, model: nn.Module, prompts: Sequence[Prompt]) -> Iterator[None]:
        """Inside, one pass of `model` (unwrapped) over the pictures of `prompts`, each prompt once, in this order."""
        shown = [prompt for prompt in prompts if prompt.pictures]
        if not self.is_used or not shown:
            yield
            return
        blocks = model.get_submodule(self._path)
        if all(prompt in self._known for prompt in shown):
            known = [self._known[prompt] for prompt in shown]
            with replaying(blocks, {index: torch.cat([one[index] for one in known]) for index in self._kept}):
                yield
            return
        with recording(blocks, self._kept) as outputs:
            yield
        for index, output in outputs.items():
            for prompt, part in zip(shown, output.split([_rows(prompt, output) for prompt in shown]), strict=True):
                self._known.setdefault(prompt, {})[index] = part


def _rows(prompt: Prompt, output: Tensor) -> int:
    """How many rows of a block's output are the prompt's: patches where it is (patches, width), else pictures."""
    grid = prompt.vision.get("image_grid_thw")
    if output.ndim == 2 and grid is not None:
        return int(grid.prod(dim=1).sum())
    return len(prompt.vision["pixel_values"])
