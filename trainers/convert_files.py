"""Weights on disk, one tensor at a time: the shards of a folder as a table, and safetensors files written in pieces.

Nothing here holds more than one shard in memory, and of a mapped shard only the pages that were read.
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

# The names of https://github.com/huggingface/safetensors#format.
DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class TensorInfo:
    """What a file's table of contents says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorFolder:
    """The weights of a folder, `.safetensors` or `.bin`, in one file or in shards with an index.

    `infos`: every tensor, in the order of the shards; `shard_of`: the index in `shards` of the file it lies in.

    Raises ValueError if there are no weights, or if shards and index contradict each other.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.shards, listed = _shards(self.folder)
        self.infos: dict[str, TensorInfo] = {}
        self.shard_of: dict[str, int] = {}
        self._open: tuple[int, Mapping[str, Tensor] | _Mapped] | None = None
        for number in range(len(self.shards)):
            for name, tensor in self._contents(number):
                if name in self.infos:
                    raise ValueError(f"{name} is in {self.shards[self.shard_of[name]]} and in {self.shards[number]}.")
                self.infos[name] = tensor
                self.shard_of[name] = number
        if listed is not None and listed != self.infos.keys():
            missing, extra = sorted(listed - self.infos.keys()), sorted(self.infos.keys() - listed)
            raise ValueError(
                f"The index of {self.folder} names {len(listed)} tensors, its shards hold {len(self.infos)}; "
                f"missing: {', '.join(missing[:3]) or 'none'}; not in the index: {', '.join(extra[:3]) or 'none'}."
            )

    def read(self, name: str) -> Tensor:
        """One tensor, a view of its mapped file; opening another shard closes this one, once no tensor uses it."""
        number = self.shard_of[name]
        if self._open is None or self._open[0] != number:
            self._open = None
            self._open = number, _open_shard(self.shards[number])
        return self._open[1][name]

    def close(self) -> None:
        self._open = None

    def _contents(self, number: int) -> list[tuple[str, TensorInfo]]:
        shard = _open_shard(self.shards[number])
        if isinstance(shard, _Mapped):
            return shard.contents()
        return [(name, TensorInfo(tuple(tensor.shape), tensor.dtype)) for name, tensor in shard.items()]


class _Mapped:
    """A safetensors file, read where it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = safe_open(path, framework="pt")

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def contents(self) -> list[tuple[str, TensorInfo]]:
        dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
        found = []
        for name in self.file.offset_keys():
            part = self.file.get_slice(name)
            if part.get_dtype() not in dtypes:
                raise ValueError(
                    f"{self.path}: {name} is of type {part.get_dtype()}; only floating-point weights convert, so "
                    "take the checkpoint before quantisation."
                )
            found.append((name, TensorInfo(tuple(part.get_shape()), dtypes[part.get_dtype()])))
        return found


def _open_shard(path: Path) -> Mapping[str, Tensor] | _Mapped:
    if path.suffix == ".safetensors":
        return _Mapped(path)
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _shards(folder: Path) -> tuple[list[Path], set[str] | None]:
    """The weight files of `folder` in order, and the tensors that its index names, if there is one."""
    for index_name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        if (folder / index_name).is_file():
            weight_map = json.loads((folder / index_name).read_text())["weight_map"]
            shards = [folder / name for name in sorted(set(weight_map.values()))]
            if missing := [path.name for path in shards if not path.is_file()]:
                raise ValueError(
                    f"{folder / index_name} names {len(shards)} shards, {len(shards) - len(missing)} are here; "
                    f"missing: {', '.join(missing)}. Download the checkpoint again."
                )
            return shards, set(weight_map)
    for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / name).is_file():
            return [folder / name], None
    raise ValueError(
        f"{folder} holds no weights: none of {SAFE_WEIGHTS_NAME}, {WEIGHTS_NAME} and their .index.json files."
    )


class SafetensorsWriter:
    """Writes one safetensors file tensor by tensor, in the order of `infos`; safetensors' own `save_file` wants all
    of them at once.

    Example:
        >>> with SafetensorsWriter(path, {"a": TensorInfo((2,), torch.float32)}) as file:
        ...     file.write("a", torch.ones(2))
    """

    def __init__(self, path: Path, infos: Mapping[str, TensorInfo]) -> None:
        self.path, self.infos = path, dict(infos)
        self._left = list(infos)

    def __enter__(self) -> Self:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, info in self.infos.items():
            end = start + info.num_bytes
            header[name] = {
                "dtype": DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [start, end],
            }
            start = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
        self._file = self.path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        expected = self.infos[name]
        assert name == self._left.pop(0), name
        assert (tuple(tensor.shape), tensor.dtype) == (expected.shape, expected.dtype), name
        self._file.write(tensor_bytes(tensor))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())  # else a power cut could leave a folder's name but not what it names
        self._file.close()
        assert kind is not None or not self._left, self._left


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's memory in row-major order, without a copy where it has that order."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
