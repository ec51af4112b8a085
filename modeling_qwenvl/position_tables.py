"""Position tables of a square grid: the resampler's fixed sines and cosines, and resizing a table to another grid.

Legend: G side of the table's grid, E width.
"""

from math import isqrt

import torch
from torch.nn import functional as F

BASE = 10000.0


def sincos_frequencies(width: int) -> torch.Tensor:
    """The `width // 4` angular frequencies of one axis, highest (1 radian per cell) first, float64.

    Example:
        >>> sincos_frequencies(8).tolist()
        [1.0, 0.01]
    """
    return BASE ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))


def sincos_table(grid_size: int, width: int) -> torch.Tensor:
    """The 2-D table of the Qwen-VL resampler: (grid_size**2, width) float32, cells in row-major order.

    The first half of the channels encodes the column, the second half the row; each half is all sines, then all
    cosines (Qwen-VL paper, section 2.1; the layout is that of MAE's 2-D table, where the column also comes first).

    Example:
        >>> sincos_table(2, 4)[1].tolist()  # column 1, row 0: sin 1, cos 1, sin 0, cos 0
        [0.8414709568023682, 0.5403022766113281, 0.0, 1.0]
    """
    cells = torch.arange(grid_size, dtype=torch.float64)
    angles_GF = cells[:, None] * sincos_frequencies(width)
    axis_GE = torch.cat([angles_GF.sin(), angles_GF.cos()], dim=1)
    columns_GGE = axis_GE[None, :, :].expand(grid_size, -1, -1)
    rows_GGE = axis_GE[:, None, :].expand(-1, grid_size, -1)
    return torch.cat([columns_GGE, rows_GGE], dim=2).flatten(0, 1).float()


def resize_table(table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """A square table (G*G, E) resized to `grid` = (rows, columns): (rows * columns, E), bicubic, in the table's dtype.

    A table that already has that grid is returned as it is. No antialiasing, as in the original.
    """
    side = isqrt(table.shape[0])
    if (side, side) == grid:
        return table
    image_1EGG = table.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(image_1EGG, size=grid, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)
