"""Which tensors of the 2023 Qwen-VL layout are which of ours, and the values of one from those of the other.

The table is the model's own (modeling_qwenvl/original_checkpoint.py), which `from_pretrained` reads by; here it is
taken apart into groups that can be converted one at a time: a fused tensor there, its parts here.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from modeling_qwenvl import QwenVLConfig, QwenVLForConditionalGeneration, to_original_state_dict
from modeling_qwenvl.original_checkpoint import transforms


@dataclass(frozen=True)
class Group:
    """One tensor of the original layout and the native ones that hold the same numbers, in fused order."""

    original: str
    natives: tuple[str, ...]
    config: QwenVLConfig
    converter: WeightConverter | None

    def to_native(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` by original name -> by native name. Bit for bit: values only change places."""
        if self.converter is None:
            return {self.natives[0]: tensors[self.original]}
        return _apply(self.converter, {_renamed(self.original): tensors[self.original]}, self.config)

    def to_original(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `to_native`."""
        if self.converter is None:
            return {self.original: tensors[self.natives[0]]}
        in_order = {name: tensors[name] for name in self.natives}
        (fused,) = _apply(self.converter.reverse_transform(), in_order, self.config).values()
        return {self.original: fused}


@dataclass(frozen=True)
class Layouts:
    """Both layouts of the model that `config` describes: names, shapes and groups; no weights.

    Raises ValueError if the original layout cannot hold this model (see `original_config`).
    """

    config: QwenVLConfig

    @cached_property
    def model(self) -> QwenVLForConditionalGeneration:
        with torch.device("meta"):
            return QwenVLForConditionalGeneration(self.config)

    @cached_property
    def native_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}

    @cached_property
    def original_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in to_original_state_dict(self.model).items()}

    @cached_property
    def groups(self) -> list[Group]:
        converters = _converters()
        groups = []
        for name in self.original_shapes:
            native, pattern = rename_source_key(_renamed(name), [], converters)
            if pattern is None:
                groups.append(Group(name, (native,), self.config, None))
                continue
            (converter,) = (converter for converter in converters if pattern in converter.source_patterns)
            # The first target stands in `native`; the others differ from it only there.
            first = converter.target_patterns[0]
            natives = tuple(native.replace(first, target) for target in converter.target_patterns)
            groups.append(Group(name, natives, self.config, converter))
        assert sorted(name for group in groups for name in group.natives) == sorted(self.native_shapes)
        return groups


def _renamed(original: str) -> str:
    renamings = [transform for transform in transforms() if isinstance(transform, WeightRenaming)]
    return rename_source_key(original, renamings, [])[0]


def _converters() -> list[WeightConverter]:
    return [transform for transform in transforms() if isinstance(transform, WeightConverter)]


def _apply(converter: WeightConverter, tensors: Mapping[str, Tensor], config: QwenVLConfig) -> dict[str, Tensor]:
    converter = deepcopy(converter)
    for name, tensor in tensors.items():
        target, pattern = converter.rename_source_key(name)
        assert pattern is not None, name
        converter.add_tensor(target, name, pattern, tensor)
    found = converter.convert(target, config=config)
    return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}
