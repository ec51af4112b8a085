"""Checkpoints that are whole or not there, and that load every tensor or refuse.

A checkpoint is written into a folder beside its final place, which gets its name by one rename once everything is on
the disk, with a list of its files and their sizes. A process killed at any moment leaves the checkpoints before it as
they were; a folder that lacks a file (killed while it was deleted, copied in part) is told by its list.

The weights keep the names of the modules. transformers' Trainer writes the names of the published checkpoint instead
and reads them back without translating, so that resuming a model with a name mapping (Qwen2.5-VL has one) goes on from
the initial weights with only a warning.
"""

import json
import logging
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

logger = logging.getLogger(__name__)

FILE_LIST = "checkpoint_files.json"
_UNFINISHED = ".unfinished"


def unfinished_run_dir(run_dir: Path) -> Path:
    """Folder inside `run_dir`, on the same file system, in which checkpoints are written."""
    return run_dir / _UNFINISHED


def finish(run_dir: Path, name: str) -> None:
    """Lists the files of the unfinished checkpoint `name`, makes sure they are on the disk, and moves it to `run_dir`.

    A checkpoint that has the name already (of a run that was started again from an earlier one) is replaced.
    """
    unfinished, final = unfinished_run_dir(run_dir) / name, run_dir / name
    sizes = {str(path.relative_to(unfinished)): path.stat().st_size for path in _files(unfinished)}
    (unfinished / FILE_LIST).write_text(json.dumps(sizes, indent=1, sort_keys=True))
    for path in [*_files(unfinished), unfinished]:
        _flush(path)
    if final.exists():
        os.replace(final, unfinished.with_name(f"replaced-{name}"))
    os.replace(unfinished, final)
    _flush(run_dir)
    remove_leftovers(run_dir)


def remove_leftovers(run_dir: Path) -> None:
    """Deletes what a run that was stopped while saving has left in `run_dir`."""
    if unfinished_run_dir(run_dir).is_dir():
        shutil.rmtree(unfinished_run_dir(run_dir))


def what_is_missing(checkpoint: Path) -> list[str]:
    """What keeps a checkpoint folder from being whole, in words; empty for a whole one."""
    if not (checkpoint / FILE_LIST).is_file():
        return [f"{FILE_LIST} is missing"]
    problems = []
    for name, size in json.loads((checkpoint / FILE_LIST).read_text()).items():
        path = checkpoint / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != size:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {size}")
    return problems


def find_last_checkpoint(run_dir: Path) -> Path | None:
    """The whole checkpoint with the highest step in `run_dir`; None if there is none.

    Those that are not whole are reported with what they lack, and left alone.
    """
    for folder in unfinished_run_dir(run_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        logger.warning("Ignoring %s: the run was stopped while writing it.", folder)
    for folder in reversed([Path(name) for name in sort_checkpoints(str(run_dir))]):
        problems = what_is_missing(folder)
        if not problems:
            return folder
        logger.warning("Ignoring the checkpoint %s: %s.", folder, "; ".join(problems))
    return None


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Copies a checkpoint's weights into `model`, each tensor in its own dtype, shard by shard.

    Raises ValueError if one tensor of the model is not in the checkpoint (tied ones aside), or the other way round.
    """
    if (checkpoint / SAFE_WEIGHTS_INDEX_NAME).is_file():
        weight_map = json.loads((checkpoint / SAFE_WEIGHTS_INDEX_NAME).read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
    else:
        shards = [SAFE_WEIGHTS_NAME]
    loaded: set[str] = set()
    unexpected: list[str] = []
    for shard in shards:
        state_dict = load_file(checkpoint / shard)
        unexpected += model.load_state_dict(state_dict, strict=False).unexpected_keys
        loaded |= set(state_dict)

    # Of tensors that share their memory, only one is on the disk.
    state = model.state_dict()
    filled = {state[name].data_ptr() for name in loaded if name in state}
    missing = [name for name, tensor in state.items() if name not in loaded and tensor.data_ptr() not in filled]
    if missing or unexpected:
        raise ValueError(
            f"{checkpoint} does not fit {type(model).__name__}: {len(missing)} of its {len(state)} tensors are not in "
            f"the checkpoint ({', '.join(missing[:3])}...), and {len(unexpected)} of the checkpoint's are not in the "
            f"model ({', '.join(unexpected[:3])}...). If another program wrote it, start from it with "
            "from_pretrained instead of resuming."
        )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    """Waits until `path` is on the disk: else a power cut could leave the rename but not what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
