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

NOTHING = 10  # the digit of a patch without one
PAPER = len(COLOURS)  # the colour of a patch without a digit
BOX_SCALE = 8.0  # see PatchHead


def patch_targets(scenes: list[Scene], patch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per patch: digit or NOTHING (B, P), colour or PAPER (B, P), box (B, P, 4); row-major.

    A patch lies on a digit if the digit's box holds its middle. Boxes are xyxy from the scene's middle, in shares of
    SIZE, -0.5 to 0.5; 0 without a digit.
    """
    grid = SIZE // patch
    middles = (np.arange(grid) + 0.5) * patch
    digits = np.full((len(scenes), grid, grid), NOTHING)
    colours = np.full((len(scenes), grid, grid), PAPER)
    boxes = np.zeros((len(scenes), grid, grid, 4), dtype=np.float32)
    for index, scene in enumerate(scenes):
        for mark in scene.marks:
            x1, y1, x2, y2 = mark.box
            inside = np.ix_((y1 <= middles) & (middles < y2), (x1 <= middles) & (middles < x2))
            digits[index][inside] = mark.value
            colours[index][inside] = list(COLOURS).index(mark.colour)
            boxes[index][inside] = np.array(mark.box) / SIZE - 0.5
    flat = (len(scenes), grid * grid)
    return (
        torch.from_numpy(digits.reshape(flat)),
        torch.from_numpy(colours.reshape(flat)),
        torch.from_numpy(boxes.reshape(*flat, 4)),
    )


class PatchHead(nn.Module):
    """Digit (10 and nothing), colour (4 and paper) and box of each patch, from the tower's output.

    The directions that are read have length 1, and boxes are asked for BOX_SCALE times as large: what a patch shows
    must fill its vector, and be 0 where nothing is, so that it survives the averages that the resampler takes. With
    free weights colours hid in a direction so faint that the language model hardly ever found it.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.directions = nn.Parameter(torch.randn(NOTHING + 1 + PAPER + 1 + 4, width))

    def forward(self, patches_BPC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        read = functional.linear(self.norm(patches_BPC), functional.normalize(self.directions))
        digit, colour, box = read.split([NOTHING + 1, PAPER + 1, 4], dim=-1)
        return digit, colour, box / BOX_SCALE


def patch_loss(outputs: tuple[Tensor, Tensor, Tensor], targets: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Cross-entropy of digit and colour (times 0.5) and 5 times the L1 distance of the box; paper counts 0.3."""
    (digit, colour, box), (true_digit, true_colour, true_box) = outputs, targets
    is_paper = true_digit == NOTHING
    weight = torch.where(is_paper, 0.3, 1.0)
    losses = (
        functional.cross_entropy(digit.transpose(1, 2), true_digit, reduction="none")
        + 0.5 * functional.cross_entropy(colour.transpose(1, 2), true_colour, reduction="none")
        + 5.0 * (box - true_box).abs().mean(-1)
    )
    return (losses * weight).sum() / weight.sum()


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
