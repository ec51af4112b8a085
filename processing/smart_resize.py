"""The size at which Qwen2-VL and later see a picture: sides are multiples of a factor, the area is near two limits.

What resizes the picture is transformers' image processor, so its own function computes the size here too: the answer
is what really happens. This file refuses what must not reach that function, in words that name the picture's size, and
writes down one behaviour at the edges:

| picture and limits (factor 28)                        | transformers 5.23    | qwen_vl_utils 0.0.14 | here       |
|-------------------------------------------------------|----------------------|----------------------|------------|
| a side of 0 pixels                                    | ZeroDivisionError    | ZeroDivisionError    | ValueError |
| one side more than 200 times the other                | ValueError           | ValueError           | ValueError |
| `min_pixels` > `max_pixels`                           | one of them wins     | AssertionError       | ValueError |
| `max_pixels` below one tile (factor x factor)         | one tile             | 0x0                  | ValueError |
| a side below half a factor: 10x2000                   | squeezed to 28x812   | 28x1988              | 28x812     |
| too thin for `max_pixels`: 100x5000 to 3136           | 28x392, 3.5 times it | 0x392                | 28x392     |
| nothing fits between the limits: 60x80, both 3136     | 28x56                | 28x56                | 28x56      |

In the last three rows each side is less than one factor away from where the limit would be met exactly. A squeezed
picture is legal: each axis has its own scale, and boxes follow it.
"""

from __future__ import annotations

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as transformers_smart_resize

MAX_RATIO = 200  # of the longer to the shorter side, as in transformers and qwen_vl_utils


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The (height, width) that transformers' Qwen2-VL image processors resize a picture of `height` x `width` to.

    factor: sides are multiples of it: patch size times merge size (28 for Qwen2-VL and Qwen2.5-VL, 32 for Qwen3-VL).
    min_pixels, max_pixels: limits of the resized area, kept to within one factor per side.

    Raises:
        ValueError: as the table above says; the message holds the numbers and what to do.

    Example:
        >>> smart_resize(600, 800, factor=28, min_pixels=3136, max_pixels=1_003_520)
        (588, 812)
    """
    check_limits(factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
    if height < 1 or width < 1:
        raise ValueError(f"a picture of {height}x{width} pixels (height x width) is empty")
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(
            f"a picture of {height}x{width} pixels (height x width) has one side "
            f"{max(height, width) / min(height, width):.1f} times as long as the other, the limit is {MAX_RATIO}: pad "
            f"it or cut it into pieces"
        )
    return transformers_smart_resize(height, width, factor, min_pixels, max_pixels)


def check_limits(*, factor: int, min_pixels: int, max_pixels: int) -> None:
    """ValueError for limits that contradict each other or allow no picture at all."""
    for name, value in (("factor", factor), ("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, it must be a whole number >= 1")
    if min_pixels > max_pixels:
        raise ValueError(f"min_pixels {min_pixels} > max_pixels {max_pixels}")
    if max_pixels < factor**2:
        raise ValueError(f"max_pixels {max_pixels} is less than one tile of {factor}x{factor} = {factor**2} pixels")
