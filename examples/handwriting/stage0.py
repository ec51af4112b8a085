"""Stage 0, ours: a tower that can already see digits. It stands for OpenCLIP's ViT, with which Qwen-VL begins.

The paper's tower had two billion pictures behind it; a random one learns nothing through a language model in minutes.
So every patch of it first says which digit and which colour it lies on, and where that digit's box is, through a
linear layer that is thrown away. (Digits alone are not enough: a tower trained to name them forgets their places.)

Legend: B scenes, P patches, C width.
"""

from collections.abc import Callable
from math import cos, pi

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.handwriting.scenes import COLOURS, SIZE, Scene
from modeling_qwenvl import QwenVLVisionModel

NOTHING = 10  # the class of a patch without a digit
IGNORED = -100


def patch_targets(scenes: list[Scene], patch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per patch: digit or NOTHING (B, P), colour or IGNORED (B, P), box in shares of SIZE (B, P, 4); row-major.

    A patch lies on a digit if the digit's box holds its middle.
    """
    grid = SIZE // patch
    middles = (np.arange(grid) + 0.5) * patch
    digits = np.full((len(scenes), grid, grid), NOTHING)
    colours = np.full((len(scenes), grid, grid), IGNORED)
    boxes = np.zeros((len(scenes), grid, grid, 4), dtype=np.float32)
    for index, scene in enumerate(scenes):
        for mark in scene.marks:
            x1, y1, x2, y2 = mark.box
            inside = np.ix_((y1 <= middles) & (middles < y2), (x1 <= middles) & (middles < x2))
            digits[index][inside] = mark.value
            colours[index][inside] = list(COLOURS).index(mark.colour)
            boxes[index][inside] = np.array(mark.box) / SIZE
    flat = (-1, grid * grid)
    return (
        torch.from_numpy(digits.reshape(flat)),
        torch.from_numpy(colours.reshape(flat)),
        torch.from_numpy(boxes.reshape(*flat, 4)),
    )


class PatchHead(nn.Module):
    """Digit (10 and nothing), colour and box of each patch, from the tower's output."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, NOTHING + 1 + len(COLOURS) + 4)

    def forward(self, patches_BPC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        digit, colour, box = self.linear(self.norm(patches_BPC)).split([NOTHING + 1, len(COLOURS), 4], dim=-1)
        return digit, colour, box


def patch_loss(outputs: tuple[Tensor, Tensor, Tensor], targets: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Cross-entropy of digit (nothing counts 0.3) and colour (times 0.5), 5 times the L1 distance of the box."""
    (digit, colour, box), (true_digit, true_colour, true_box) = outputs, targets
    weights = torch.ones(NOTHING + 1)
    weights[NOTHING] = 0.3
    is_digit = true_digit != NOTHING
    return (
        functional.cross_entropy(digit.flatten(0, 1), true_digit.flatten(), weight=weights)
        + 0.5 * functional.cross_entropy(colour.flatten(0, 1), true_colour.flatten(), ignore_index=IGNORED)
        + 5.0 * functional.l1_loss(box[is_digit], true_box[is_digit])
    )


def place_code(grid: int, width: int) -> Tensor:
    """Sines and cosines of row and column (grid**2, width) for the position table to begin with: it is learned.

    With wavelengths from 6 to 600 patches, half as large as the patches' contents.
    """
    rates = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(grid)[:, None] * rates
    code = torch.cat([angles.sin(), angles.cos()], dim=1)
    return 0.5 * torch.cat([code.repeat_interleave(grid, 0), code.repeat(grid, 1)], dim=1)


def train_tower(
    tower: QwenVLVisionModel,
    scenes: list[Scene],
    pixels: Tensor,
    steps: int,
    batch_size: int,
    learning_rate: float,
    on_step: Callable[[int, float], None],
) -> PatchHead:
    """Trains the tower in place, with AdamW, a short warm-up and a cosine; returns the head, for tests only.

    pixels: (len(scenes), 3, SIZE, SIZE), normalised as the processor does. on_step is told the step and its loss.
    """
    patch = tower.config.patch_size
    with torch.no_grad():
        tower.position_embedding.copy_(place_code(tower.config.position_grid, tower.config.hidden_size))
    targets = patch_targets(scenes, patch)
    head = PatchHead(tower.config.hidden_size)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    warm_up = min(50, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warm_up) * (0.51 + 0.49 * cos(pi * step / steps))
    )
    tower.train()
    order: list[int] = []
    for step in range(1, steps + 1):
        if len(order) < batch_size:
            order = torch.randperm(len(scenes)).tolist()
        batch, order = order[:batch_size], order[batch_size:]
        loss = patch_loss(
            head(tower(pixels[batch]).last_hidden_state), (targets[0][batch], targets[1][batch], targets[2][batch])
        )
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        on_step(step, loss.item())
    return head
