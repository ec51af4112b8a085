"""One training step without numbers: the model's real code on PyTorch's meta device, and every allocation counted.

Tensors on the meta device have a shape and no memory, so a 7B model's step takes seconds on a laptop. What a GPU does
differently from the meta device is put in by `GpuBehaviour`.

Letters: B rows, H heads, L tokens, D head width.
"""

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

WEIGHT_CASTS = "bfloat16 copies of weights"


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors that live, by label, from the moment an operation returns them.

    `label` names what is allocated next; `at_peak` holds the bytes of each label when their sum, with `constant` bytes
    that are there throughout, was largest. Storages of `known` tensors are not counted.

    Example:
        >>> with Allocations() as memory:
        ...     x = torch.zeros(250)
        ...     y = x + 1
        ...     del x
        >>> memory.now["other"], sum(memory.at_peak.values())
        (1000, 2000)
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.label = "other"
        self.now: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self._peak = 0
        self._labels: dict[int, str] = {}
        self._references: dict[int, Any] = {}
        self._known = [tensor.untyped_storage() for tensor in known]
        self._known_keys = {storage._cdata for storage in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Counts what `tensor` occupies under another label from now on."""
        storage = tensor.untyped_storage()
        self._add(storage)
        key = storage._cdata
        if key in self._labels:
            self.now[self._labels[key]] -= storage.nbytes()
            self._labels[key] = label
            self.now[label] += storage.nbytes()

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._labels or key in self._known_keys:
            return
        self._labels[key] = self.label
        self.now[self.label] += size
        # A storage outlives its Python object while C++ still uses it; the callback comes when it really ends.
        self._references[key] = weakref.ref(storage, lambda _: self._free(key, size))
        if (total := sum(self.now.values())) > self._peak:
            self._peak, self.at_peak = total, Counter(self.now)

    def _free(self, key: int, size: int) -> None:
        self.now[self._labels.pop(key)] -= size
        del self._references[key]


class GpuBehaviour(TorchFunctionMode):
    """Makes the meta device behave as a GPU does, where that changes what is kept.

    - sdpa keeps queries, keys, values, result and one log-sum per query, not the attention matrix.
    - Autocast (`autocast=True`): matrix products in bfloat16, norms and softmax in float32, as PyTorch's lists say.
      Copies of weights are counted in `memory` under their own label.
    - A quantised weight (`quantized`) is unpacked for each product and dropped after it.
    - What is on the CPU (grids, indices) goes to the meta device where the two meet.
    """

    _IN_BFLOAT16 = (functional.linear, torch.matmul, torch.bmm, torch.einsum, functional.conv2d, functional.conv3d,
                    Tensor.matmul, Tensor.__matmul__)  # fmt: skip
    _IN_FLOAT32 = (functional.layer_norm, functional.softmax, functional.log_softmax, torch.softmax, Tensor.softmax)

    def __init__(
        self, autocast: bool = False, quantized: Iterable[nn.Parameter] = (), memory: Allocations | None = None
    ) -> None:
        super().__init__()
        self.autocast = autocast
        self.memory = memory
        self.caches_casts = True
        self._quantized = {id(weight) for weight in quantized}
        self._casts: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(leaf.is_meta for leaf in leaves) and not all(leaf.is_meta for leaf in leaves):
            args, kwargs = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
        if func is functional.scaled_dot_product_attention:
            if self.autocast:
                args = tree_map(lambda x: self._cast(x, torch.bfloat16), args)
            return _flash_attention(*args, **kwargs)
        if self.autocast and func in self._IN_BFLOAT16:
            args, kwargs = tree_map(lambda x: self._cast(x, torch.bfloat16), (args, kwargs))
        if self.autocast and func in self._IN_FLOAT32:
            args, kwargs = tree_map(lambda x: self._cast(x, torch.float32), (args, kwargs))
        if func is functional.linear and id(args[1]) in self._quantized:
            return _QuantizedProduct.apply(*args[:2])
        return func(*args, **kwargs)

    def leave_autocast(self) -> None:
        """The end of the forward pass: autocast drops its casts, and layers that are run again make their own."""
        self.caches_casts = False
        self._casts.clear()

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (self.caches_casts and value.is_leaf and value.requires_grad):
            return value.to(dtype)
        # Autocast keeps the cast of a weight that learns until it is left, after the loss.
        if id(value) not in self._casts:
            self._casts[id(value)] = value.to(dtype)
            if self.memory is not None:
                self.memory.relabel(self._casts[id(value)], WEIGHT_CASTS)
        return self._casts[id(value)]


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, log_sums)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **settings: Any) -> Tensor:
    """The result of scaled dot-product attention, (B, H, L, D), keeping what flash attention keeps."""
    return _FlashAttention.apply(query, key, value)


class _QuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return functional.linear(x, torch.empty_like(weight, dtype=x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ torch.empty_like(ctx.weight, dtype=gradient.dtype), None


def nf4_bytes(num_weights: int) -> int:
    """Bytes of `num_weights` weights in NF4 with double quantisation (arXiv 2305.14314, section 3).

    Half a byte each; one byte of scale per block of 64; a float32 per 256 scales, and one more per tensor.

    Example:
        >>> nf4_bytes(64 * 256)
        8456
    """
    blocks = math.ceil(num_weights / 64)
    return math.ceil(num_weights / 2) + blocks + 4 * math.ceil(blocks / 256) + 4


@contextmanager
def gradients_labelled(parameters: Iterable[nn.Parameter], memory: Allocations) -> Iterator[None]:
    """Inside, what becomes the gradient of a parameter is counted as "gradients"."""

    def label(parameter: Tensor) -> None:
        assert parameter.grad is not None
        memory.relabel(parameter.grad, "gradients")

    handles = [p.register_post_accumulate_grad_hook(label) for p in parameters if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
