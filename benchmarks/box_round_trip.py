"""How far a box moves on its way into a model's text and back, for each family; and without the contract.

    python benchmarks/box_round_trip.py

Random pictures (1 to 8000 pixels a side, ratio up to 200), random pixel limits for the families with dynamic
resolution, random boxes, of whose edges three in ten lie on the picture's. Each box is written as text and parsed
again by the code that training and answers use. Errors are per coordinate, in the unit that the family writes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from processing.answer_parsing import parse_shapes
from processing.coordinates import CONVENTIONS, Box, Convention, Frame, from_model
from processing.grounding_text import render_shapes
from processing.smart_resize import smart_resize

FACTORS = {"qwen2_vl": 28, "qwen2_5_vl": 28, "qwen3_vl": 32}
QWEN_VL_SIDE = 448
Pair = tuple[float, float]


def random_frame(rng: random.Random, convention: Convention) -> Frame:
    """A picture and its size for the model: log-uniform sides, limits between one tile and 16 million pixels."""
    while True:
        height, width = (round(8000 ** rng.random()) for _ in range(2))
        if max(height, width) <= 200 * min(height, width):
            break
    if convention.name not in FACTORS:
        return Frame(height, width, QWEN_VL_SIDE, QWEN_VL_SIDE)
    factor = FACTORS[convention.name]
    low, high = sorted(round(factor**2 * 16_000 ** rng.random()) for _ in range(2))
    return Frame(height, width, *smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high))


def random_box(rng: random.Random, frame: Frame) -> Box:
    def side(length: int) -> list[float]:
        first, second = sorted(rng.uniform(0, length) for _ in range(2))
        return [0 if rng.random() < 0.3 else first, length if rng.random() < 0.3 else second]

    (x1, x2), (y1, y2) = side(frame.width), side(frame.height)
    return Box(x1, y1, x2, y2)


def through_text(box: Box, frame: Frame, convention: Convention) -> tuple[Pair, ...]:
    answer = parse_shapes(render_shapes([box], [frame], convention), [frame], convention)
    assert not answer.problems, answer.problems
    return answer.shapes[0].corners


def rounded_down(box: Box, frame: Frame, convention: Convention) -> tuple[Pair, ...]:
    """The usual `int(x / width * 1000)`."""
    steps_x, steps_y = (convention.steps or frame.model_width), (convention.steps or frame.model_height)
    corners = [(int(x / frame.width * steps_x), int(y / frame.height * steps_y)) for x, y in box.corners]
    last_x, last_y = (convention.last or frame.model_width), (convention.last or frame.model_height)
    return from_model([(min(x, last_x), min(y, last_y)) for x, y in corners], frame, convention)


def not_rescaled(box: Box, frame: Frame, convention: Convention) -> tuple[Pair, ...]:
    """Original pixels written into the text, as most scripts do; read back as what the model means by them."""
    steps_x, steps_y = (convention.steps or frame.model_width), (convention.steps or frame.model_height)
    return tuple((round(x) * frame.width / steps_x, round(y) * frame.height / steps_y) for x, y in box.corners)


Way = Callable[[Box, Frame, Convention], tuple[Pair, ...]]


def shifts(way: Way, convention: Convention, samples: int, seed: int) -> list[float]:
    """How far every coordinate moves, with its sign, in units of the convention."""
    rng = random.Random(seed)
    found = []
    for _ in range(samples):
        frame = random_frame(rng, convention)
        box = random_box(rng, frame)
        for before, after in zip(box.corners, way(box, frame, convention), strict=True):
            sides = ((frame.width, frame.model_width), (frame.height, frame.model_height))
            for old, new, (side, seen) in zip(before, after, sides, strict=True):
                found.append((new - old) * (convention.steps or seen) / side)
    return found


def table(samples: int, seed: int) -> str:
    """One row per family as a Markdown table."""
    lines = [
        "| family | unit | contract: largest, mean error | rounded down: largest, mean error, mean shift "
        "| not rescaled: mean error |",
        "|---|---|---|---|---|",
    ]
    for convention in CONVENTIONS.values():
        cells = []
        for way in (through_text, rounded_down, not_rescaled):
            moved = shifts(way, convention, samples, seed)
            sizes = [abs(shift) for shift in moved]
            cells.append((max(sizes), sum(sizes) / len(sizes), sum(moved) / len(moved)))
        contract, down, plain = cells
        unit = "1/1000 of the side" if convention.is_normalized else "pixel of the resized picture"
        lines.append(
            f"| {convention.name} | {unit} | {contract[0]:.3f}, {contract[1]:.3f} "
            f"| {down[0]:.3f}, {down[1]:.3f}, {down[2]:+.3f} | {plain[1]:.0f} |"
        )
    return "\n".join(lines)


def main(
    samples: Annotated[int, typer.Option(help="Boxes per family and way.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Of the pictures, limits and boxes.")] = 0,
    output: Annotated[Path, typer.Option(help="File that the table is written to.")] = Path("runs/box_round_trip.md"),
) -> None:
    """Prints the table and writes it."""
    text = table(samples, seed)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text + "\n", encoding="utf-8")
    Console(width=140).print(Markdown(text))
    print(f"{4 * samples} coordinates per row, seed {seed}; written to {output}")


if __name__ == "__main__":
    typer.run(main)
