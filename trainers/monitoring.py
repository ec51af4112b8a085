"""What passes through a training run between two log lines: tokens and pictures per second, padding, memory, MFU.

Counting adds no synchronisation with the device but at log lines.
"""

import resource
import sys
from time import perf_counter
from typing import Any

import torch

from processing.chat_spans import IGNORE
from trainers.families import PARTS, ModelParts

# Dense bfloat16 peak in FLOP/s, from NVIDIA's data sheets (without sparsity), by part of the device's name. The longer
# name first: "H200" and "H100" share a chip, "L40S" is not "L40".
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "4090": 165e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 peak of a device in FLOP/s; None where it is not in the table.

    Example:
        >>> peak_flops("NVIDIA H100 80GB HBM3")
        989000000000000.0
    """
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device_name), None)


class StepMonitor:
    """Counts micro-batches with `observe`, and turns the counts since the last call into figures with `figures`.

    Figures of one process: with several, multiply rates by their number. FLOPs are those of the weights alone (twice
    their number per token and pass), without attention's; a frozen part that gradient passes through counts one pass
    less, one that no gradient reaches two less. MFU is their rate over the device's dense bfloat16 peak.

    Example:
        >>> monitor = StepMonitor(find_parts(model), trains)
        >>> monitor.observe(batch)
        >>> monitor.figures(device)
        {'tokens_per_second': 5120.0, 'pictures_per_second': 4.0, 'padding_share': 0.12, 'supervised_share': 0.2, ...}
    """

    def __init__(self, parts: ModelParts, trains: dict[str, bool]) -> None:
        self._patch_size = parts.base.config.vision_config.patch_size
        self._flops_per = _flops_per_token(parts, trains)
        self._trained = {part: [p for name, p in parts.parameters(part) if trains[name]] for part in PARTS}
        self._gradient_norms: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """Forgets what was counted; the clock of the rates begins now."""
        self._since = perf_counter()
        self._num_slots = self._num_pictures = self._num_patches = 0
        self._num_tokens: torch.Tensor | int = 0
        self._num_supervised: torch.Tensor | int = 0

    def observe(self, batch: dict[str, Any]) -> None:
        """Counts one micro-batch as the collator made it (`labels` included)."""
        labels, mask = batch["labels"], batch.get("attention_mask")
        self._num_slots += labels.numel()
        # Sums stay on the device until somebody asks.
        # A mask (B, 1, T, T) says who sees whom, and not what is padding.
        self._num_tokens = self._num_tokens + (labels.numel() if mask is None or mask.ndim == 4 else mask.sum())
        self._num_supervised = self._num_supervised + (labels != IGNORE).sum()
        pixels, grid = batch.get("pixel_values"), batch.get("image_grid_thw")
        if grid is not None:
            self._num_pictures += len(grid)
        elif pixels is not None:
            self._num_pictures += len(pixels)
        if pixels is not None:
            # (patches, values) for the Qwen2-VL families, (pictures, 3, height, width) otherwise.
            is_flat = pixels.ndim == 2
            self._num_patches += len(pixels) if is_flat else pixels[:, 0].numel() // self._patch_size**2

    def observe_gradients(self) -> None:
        """Takes the norm of each trained part's gradient as it stands: in a Trainer, after clipping."""
        for part, parameters in self._trained.items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:
                self._gradient_norms[f"grad_norm_{part}"] = float(torch.nn.utils.get_total_norm(gradients))

    def figures(self, device: torch.device) -> dict[str, float]:
        """Figures since the last call; empty where nothing was observed."""
        seconds = perf_counter() - self._since
        if not self._num_slots:
            return {}
        tokens, supervised = int(self._num_tokens), int(self._num_supervised)
        figures = {
            "tokens_per_second": tokens / seconds,
            "pictures_per_second": self._num_pictures / seconds,
            "padding_share": 1 - tokens / self._num_slots,
            "supervised_share": supervised / tokens,
            "memory_gib": _peak_memory(device) / 2**30,
            **self._gradient_norms,
        }
        self._gradient_norms = {}
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        if peak is not None:
            figures["mfu"] = self.flops(self._num_patches, tokens, supervised) / seconds / peak
        self.restart()
        return figures

    def flops(self, num_patches: int, num_tokens: int, num_supervised: int) -> float:
        """Operations of the weights, forward and backward, for so many patches, tokens and supervised positions."""
        per = self._flops_per
        vision = num_patches * (per["tower"] + per["adapter"])
        return vision + num_tokens * per["language_model"] + num_supervised * per["head"]


def _flops_per_token(parts: ModelParts, trains: dict[str, bool]) -> dict[str, float]:
    """FLOPs per token (tower and adapter: per patch) of forward and backward through each part's weights."""

    def count(part: str) -> tuple[int, int]:
        sizes = [(p.numel(), trains[name]) for name, p in parts.parameters(part)]
        return sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)

    head = parts.base.get_output_embeddings()
    head_size = 0 if head is None else head.weight.numel()
    sizes = {part: count(part) for part in ("tower", "adapter", "language_model")}
    sizes["head"] = (head_size, head_size if head is not None and head.weight.requires_grad else 0)
    embeddings_train = count("embeddings")[1] > 0
    flops, has_gradient = {}, False
    for part, (size, trained) in sizes.items():
        # In the order of the forward pass: gradient flows through a part if it, or what comes before it, trains.
        has_gradient = has_gradient or trained > 0 or (part == "language_model" and embeddings_train)
        flops[part] = 2.0 * size + 2.0 * size * has_gradient + 2.0 * trained
    return flops


def _peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on CUDA, the process's largest resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
