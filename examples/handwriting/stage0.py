"""Stage 0, ours: a tower that can already see digits. It stands for OpenCLIP's ViT, with which Qwen-VL begins.

The paper's tower had two billion pictures behind it; a random one learns nothing through a language model in minutes.
So every patch of it first says which digit and which colour it lies on, and where that digit's box is, through a
linear layer that is thrown away. (Digits alone are not enough: a tower trained to name them forgets their places.)

Legend: B scenes, P patches, C width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.handwriting.scenes import COLOURS, SIZE, Scene
from modeling_qwenvl import QwenVLVisionModel

NOTHING = 10  # the digit of a patch without one
PAPER = len(COLOURS)  # the colour of a patch without a digit
NO_EDGE = SIZE + 1  # an edge of a box is told as its column or row, 0 to SIZE
COLOUR_SOFTNESS = 0.5  # colours are easily told apart: their directions must be twice as strong for the same certainty


@dataclass(frozen=True)
class PatchTargets:
    """What every patch should say: digit or NOTHING (B, P), colour or PAPER (B, P), edges or NO_EDGE (B, P, 4)."""

    digit: Tensor
    colour: Tensor
    edges: Tensor

    def __getitem__(self, batch: list[int]) -> "PatchTargets":
        return PatchTargets(self.digit[batch], self.colour[batch], self.edges[batch])


def patch_targets(scenes: list[Scene], patch: int) -> PatchTargets:
    """A patch, in row-major order, lies on a digit if the digit's box holds its middle; edges are x1, y1, x2, y2."""
    grid = SIZE // patch
    middles = (np.arange(grid) + 0.5) * patch
    digit = np.full((len(scenes), grid, grid), NOTHING)
    colour = np.full((len(scenes), grid, grid), PAPER)
    edges = np.full((len(scenes), grid, grid, 4), NO_EDGE)
    for index, scene in enumerate(scenes):
        for mark in scene.marks:
            x1, y1, x2, y2 = mark.box
            inside = np.ix_((y1 <= middles) & (middles < y2), (x1 <= middles) & (middles < x2))
            digit[index][inside] = mark.value
            colour[index][inside] = list(COLOURS).index(mark.colour)
            edges[index][inside] = mark.box
    flat = (len(scenes), grid * grid)
    return PatchTargets(
        torch.from_numpy(digit.reshape(flat)),
        torch.from_numpy(colour.reshape(flat)),
        torch.from_numpy(edges.reshape(*flat, 4)),
    )


class PatchHead(nn.Module):
    """Logits of digit (10 and nothing), colour (4 and paper) and edges (4 times SIZE + 1 and none) of each patch.

    The directions that are read have length 1, and a place is a direction and not an amount: what a patch shows must
    fill its vector, so that it survives the averages over patches that the resampler takes. With free weights, colours
    hid in a direction so faint that the language model hardly found it, and places as four amounts were blurred.
    """

    SIZES = (NOTHING + 1, PAPER + 1, 4 * (NO_EDGE + 1))

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.directions = nn.Parameter(torch.randn(sum(self.SIZES), width))

    def forward(self, patches_BPC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Digit (B, P, 11), colour (B, P, 5), edges (B, P, 4, SIZE + 2)."""
        logits = functional.linear(self.norm(patches_BPC), functional.normalize(self.directions))
        digit, colour, edges = logits.split(self.SIZES, dim=-1)
        return digit, colour, edges.unflatten(-1, (4, NO_EDGE + 1))


def patch_loss(logits: tuple[Tensor, Tensor, Tensor], targets: PatchTargets) -> Tensor:
    """Cross-entropy of digit, colour and the mean of the edges; a patch of paper counts 0.3."""
    digit, colour, edges = logits
    weight = torch.where(targets.digit == NOTHING, 0.3, 1.0)

    def entropy(some: Tensor, true: Tensor) -> Tensor:
        return functional.cross_entropy(some.flatten(0, -2), true.flatten(), reduction="none").view(true.shape)

    losses = entropy(digit, targets.digit) + entropy(COLOUR_SOFTNESS * colour, targets.colour)
    losses = losses + entropy(edges, targets.edges).mean(-1)
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
        loss = patch_loss(head(tower(pixels[batch]).last_hidden_state), targets[batch])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        on_step(step, loss.item())
    return head
