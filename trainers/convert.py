"""A folder in the layout of the 2023 Qwen-VL -> a folder in ours, or back: every tensor checked, little memory.

Tensors pass one by one from the shards of one folder to those of the other, number for number, so that no more is held
than one mapped shard and one tensor. Then the new files are read, taken back to the old layout, and compared with what
was read first, by hash. The folder gets its name only after that: an interrupted conversion leaves a hidden folder
beside it, which the next one removes.
"""

import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from modeling_qwenvl import QwenVLConfig
from trainers.convert_companions import write_native_companions, write_original_companions
from trainers.convert_files import SafetensorsWriter, TensorFolder, TensorInfo, tensor_bytes
from trainers.convert_layout import Group, Layouts

REPORT = "conversion.json"
OnTensor = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        direction: "to native" or "to original".
        hashes: BLAKE2b (16 bytes) of every tensor of the source, by its name there; the files written give the same
            when they are taken back.
        num_bytes: of the weights.
        notes: what the reader of the new folder should know, one sentence each.
    """

    direction: str
    hashes: dict[str, str]
    num_bytes: int
    notes: tuple[str, ...]


def convert(source: str | Path, output: str | Path, on_tensor: OnTensor | None = None) -> Conversion:
    """Writes `output`: the weights of `source` in the other layout as safetensors, with config, tokenizer, processor.

    Args:
        source: a folder with an original Qwen-VL (`.bin` or `.safetensors`) or one of ours, as its config.json says.
        output: must not exist, or be empty. `conversion.json` there lists the hash of each tensor.
        on_tensor: called with "convert" or "check", the bytes done and the bytes in all, after each tensor.

    Raises ValueError, with nothing written to `output`, for a folder of another model, for tensors that are missing,
    unknown or of another shape, and if a tensor does not come back as it was.
    """
    source, output = Path(source), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty: give another folder.")
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} has no config.json: give the folder of a whole model.")
    model_type = json.loads((source / "config.json").read_text()).get("model_type")
    if model_type not in ("qwen", "qwen_vl"):
        raise ValueError(
            f"{source} has model_type {model_type!r}: only Qwen-VL has two layouts, 'qwen' (of 2023) and 'qwen_vl' "
            "(this package's)."
        )
    to_native = model_type == "qwen"
    layouts = Layouts(QwenVLConfig.from_pretrained(source))
    weights = TensorFolder(source)
    _check_complete(weights, layouts, to_native)

    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with ExitStack() as cleaning:
        cleaning.callback(shutil.rmtree, unfinished, ignore_errors=True)
        hashes = _convert_weights(weights, layouts, to_native, unfinished, on_tensor)
        _check_round_trip(unfinished, layouts, to_native, hashes, on_tensor)
        write = write_native_companions if to_native else write_original_companions
        notes = write(source, unfinished, layouts.model, next(iter(weights.infos.values())).dtype)
        found = Conversion("to native" if to_native else "to original", hashes, _num_bytes(weights), tuple(notes))
        report = {"direction": found.direction, "hash": "blake2b-128 of the source's tensors", "tensors": hashes}
        (unfinished / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        if output.exists():
            output.rmdir()
        unfinished.replace(output)
        cleaning.pop_all()
    return found


def _check_complete(weights: TensorFolder, layouts: Layouts, to_native: bool) -> None:
    expected = layouts.original_shapes if to_native else layouts.native_shapes
    tied = {"lm_head.weight"} if layouts.config.tie_word_embeddings else set()
    missing = sorted(expected.keys() - weights.infos.keys() - tied)
    unknown = sorted(weights.infos.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"{weights.folder} has {len(weights.infos)} tensors, its config.json describes {len(expected)}; missing: "
            f"{', '.join(missing[:3]) or 'none'}; unknown: {', '.join(unknown[:3]) or 'none'}. If it is an adapter or "
            "a checkpoint of a wrapped model, merge it first."
        )
    for name, info in weights.infos.items():
        if info.shape != expected[name]:
            raise ValueError(f"{name} has shape {info.shape}, but config.json asks for {expected[name]}.")


def _groups(weights: TensorFolder, layouts: Layouts, to_native: bool) -> dict[int, list[Group]]:
    """The groups to convert, by the shard where their first tensor lies, in the order of the shards."""
    by_shard: dict[int, list[Group]] = defaultdict(list)
    order = {name: place for place, name in enumerate(weights.infos)}
    groups = [group for group in layouts.groups if _inputs(group, to_native)[0] in weights.infos]
    for group in sorted(groups, key=lambda group: order[_inputs(group, to_native)[0]]):
        by_shard[weights.shard_of[_inputs(group, to_native)[0]]].append(group)
    return by_shard


def _inputs(group: Group, to_native: bool) -> tuple[str, ...]:
    return (group.original,) if to_native else group.natives


def _outputs(group: Group, to_native: bool) -> tuple[str, ...]:
    return _inputs(group, not to_native)


def _converted(group: Group, tensors: dict[str, Tensor], to_native: bool) -> dict[str, Tensor]:
    return group.to_native(tensors) if to_native else group.to_original(tensors)


def _read(weights: TensorFolder, names: tuple[str, ...]) -> dict[str, Tensor]:
    # Parts of one tensor may lie in different shards: copies let the first shard go.
    return {name: weights.read(name).clone() if len(names) > 1 else weights.read(name) for name in names}


def _convert_weights(
    weights: TensorFolder, layouts: Layouts, to_native: bool, folder: Path, on_tensor: OnTensor | None
) -> dict[str, str]:
    """Writes the shards and their index; returns the hashes of the source's tensors."""
    shapes = layouts.native_shapes if to_native else layouts.original_shapes
    by_shard = _groups(weights, layouts, to_native)
    hashes: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    done = 0
    for number, (_, groups) in enumerate(by_shard.items(), start=1):
        name = SAFE_WEIGHTS_NAME if len(by_shard) == 1 else f"model-{number:05d}-of-{len(by_shard):05d}.safetensors"
        infos = {
            output: TensorInfo(shapes[output], weights.infos[_inputs(group, to_native)[0]].dtype)
            for group in groups
            for output in _outputs(group, to_native)
        }
        weight_map |= dict.fromkeys(infos, name)
        with SafetensorsWriter(folder / name, infos) as file:
            for group in groups:
                tensors = _read(weights, _inputs(group, to_native))
                hashes |= {key: _hash(tensor) for key, tensor in tensors.items()}
                converted = _converted(group, tensors, to_native)
                for output in _outputs(group, to_native):
                    file.write(output, converted[output])
                    done += infos[output].num_bytes
                if on_tensor is not None:
                    on_tensor("convert", done, _num_bytes(weights))
                del tensors, converted
    weights.close()
    if len(by_shard) > 1:
        index = {"metadata": {"total_size": _num_bytes(weights)}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return hashes


def _check_round_trip(
    folder: Path, layouts: Layouts, to_native: bool, hashes: dict[str, str], on_tensor: OnTensor | None
) -> None:
    """Reads what was written and takes it back: each tensor of the source must come out, bit for bit."""
    written = TensorFolder(folder)
    done = 0
    for groups in _groups(written, layouts, not to_native).values():
        for group in groups:
            for name, found in _hashes_taken_back(written, group, to_native).items():
                if hashes[name] != found:
                    raise ValueError(
                        f"{name} did not come back as it was: the files in {folder.parent} were changed while they "
                        "were written, or the disk is at fault. Nothing was kept; run the conversion again."
                    )
            done += sum(written.infos[name].num_bytes for name in _outputs(group, to_native))
            if on_tensor is not None:
                on_tensor("check", done, _num_bytes(written))


def _hashes_taken_back(written: TensorFolder, group: Group, to_native: bool) -> dict[str, str]:
    # A function of its own, so that no tensor outlives it: each keeps its whole shard mapped.
    tensors = _read(written, _outputs(group, to_native))
    return {name: _hash(tensor) for name, tensor in _converted(group, tensors, not to_native).items()}


def _hash(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor_bytes(tensor), digest_size=16).hexdigest()


def _num_bytes(weights: TensorFolder) -> int:
    return sum(info.num_bytes for info in weights.infos.values())
