"""A frozen tower's features on disk: computed in the first epoch, read in the later ones.

What is kept is the output of the tower's blocks that anything reads (the last one; for Qwen3-VL also those of its
deepstack; with `vision_feature_layer` that layer's), before any adapter, which may therefore train. Replayed, the
blocks cost nothing; what surrounds them (patch embedding, adapter) runs as ever.

    cache_dir/<fingerprint of the tower>/<first two letters>/<key of the picture>.safetensors

The key is the picture as the processor made it, with its rows and columns of patches, so another resolution or
augmentation is another entry; the fingerprint covers the tower's weights and configuration, so another tower is
another folder.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainers.families import ModelParts

Features = dict[int, Tensor]  # index of a block -> its output for one picture: (patches, width)


class FeatureCache:
    """Serves `parts`' frozen tower from `cache_dir`.

    `hits` and `misses` count pictures. A batch is served from disk only if all its pictures are there; a batch with
    videos always runs through the tower.

    Raises ValueError for a tower of which anything trains.

    Example:
        >>> cache = FeatureCache(find_parts(model), "features")
        >>> with cache.serving(batch):
        ...     loss = model(**batch).loss
    """

    def __init__(self, parts: ModelParts, cache_dir: str | Path) -> None:
        trained = [name for name, p in parts.parameters("tower") if p.requires_grad]
        if trained:
            raise ValueError(
                f"The feature cache needs a frozen tower, but {len(trained)} of its tensors train (first {trained[0]}"
                "): leave feature_cache_dir out, or freeze the tower."
            )
        self.blocks = parts.blocks
        self.kept = blocks_that_are_read(parts)
        self.folder = Path(cache_dir) / _fingerprint(parts)
        self.hits = 0
        self.misses = 0

    @contextmanager
    def serving(self, batch: dict[str, Any]) -> Iterator[None]:
        """Inside, one forward pass of the model on `batch` takes the blocks' outputs from disk, or puts them there."""
        pixels = batch.get("pixel_values")
        if pixels is None or "pixel_values_videos" in batch:
            yield
            return
        grid = batch.get("image_grid_thw")
        pictures = _split(pixels, grid)
        shapes = [list(picture.shape) for picture in pictures] if grid is None else grid.tolist()
        paths = [self._path(picture, shape) for picture, shape in zip(pictures, shapes, strict=True)]
        missing = [path for path in paths if not path.exists()]
        self.misses += len(missing)
        self.hits += len(paths) - len(missing)
        if missing:
            with recording(self.blocks, self.kept) as outputs:
                yield
            self._store(paths, outputs, grid)
        else:
            loaded = [_load(path) for path in paths]
            join = torch.cat if pixels.ndim == 2 else torch.stack
            with replaying(self.blocks, {index: join([picture[index] for picture in loaded]) for index in self.kept}):
                yield

    def _path(self, picture: Tensor, shape: list[int]) -> Path:
        # The shape besides the bytes: patches of a blank page are the same ones, however they lie.
        digest = hashlib.blake2b(f"{picture.dtype}{shape}".encode(), digest_size=16)
        digest.update(_bytes(picture))
        key = digest.hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def _store(self, paths: Sequence[Path], outputs: Features, grid: Tensor | None) -> None:
        per_block = {index: _split(output, grid) for index, output in outputs.items()}
        for picture, path in enumerate(paths):
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {str(index): parts[picture].cpu().contiguous() for index, parts in per_block.items()}
            # Renamed when whole: a run that is killed here, or a neighbour, never sees half a file.
            unfinished = path.with_suffix(f".{os.getpid()}.tmp")
            save_file(tensors, unfinished)
            unfinished.replace(path)


@contextmanager
def recording(blocks: nn.ModuleList, kept: Collection[int]) -> Iterator[Features]:
    """Inside, one forward pass of the tower puts the outputs of the `kept` blocks, detached, into the dictionary."""
    outputs: Features = {}

    def keep(index: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if index in outputs:
                raise ValueError("The tower ran twice on one batch: the feature cache cannot tell the runs apart.")
            outputs[index] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    with ExitStack() as hooks:
        for index in kept:
            handle = blocks[index].register_forward_hook(keep(index))
            hooks.callback(handle.remove)
        yield outputs


@contextmanager
def replaying(blocks: nn.ModuleList, outputs: Features) -> Iterator[None]:
    """Inside, blocks give what was recorded; those whose output nobody reads pass their input on."""

    def replay(index: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return outputs[index].to(hidden_states.device) if index in outputs else hidden_states

        return forward

    with ExitStack() as overrides:
        for index, block in enumerate(blocks):
            # On the instance, so that hooks around the block still fire, and only until the end of this step.
            block.forward = replay(index)
            overrides.callback(delattr, block, "forward")
        yield


def blocks_that_are_read(parts: ModelParts) -> frozenset[int]:
    """Indices of the blocks whose output somebody reads."""
    num_blocks = len(parts.blocks)
    config = parts.base.config.to_dict()
    read = {num_blocks - 1, *config["vision_config"].get("deepstack_visual_indexes", ())}
    layers = config.get("vision_feature_layer")
    for layer in [layers] if isinstance(layers, int) else layers or ():
        # Hidden state 0 is the first block's input, hidden state i the output of block i - 1.
        read.add((layer if layer >= 0 else num_blocks + 1 + layer) - 1)
    return frozenset(read - {-1})


def _fingerprint(parts: ModelParts) -> str:
    """Of the tower's weights and configuration, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(parts.base.config.vision_config.to_dict(), sort_keys=True, default=str).encode())
    digest.update(str(parts.base.config.to_dict().get("vision_feature_layer")).encode())
    for name, parameter in parts.parameters("tower"):
        digest.update(f"{name}{parameter.dtype}{tuple(parameter.shape)}".encode())
        digest.update(_bytes(parameter))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return memoryview(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())


def _split(values: Tensor, grid: Tensor | None) -> Sequence[Tensor]:
    """Per picture: rows of a flat (patches, width) by `grid` (pictures, 3), else entries of (pictures, ...)."""
    if grid is None or values.ndim != 2:
        return values.unbind()
    return values.split(grid.prod(dim=1).tolist())


def _load(path: Path) -> Features:
    try:
        return {int(index): tensor for index, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it, it will be computed again.") from error
