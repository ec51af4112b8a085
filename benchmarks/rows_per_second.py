"""Rows per second from disk to a padded batch: this package against transformers' processor with qwen_vl_utils.

    python benchmarks/rows_per_second.py --model DIR

Both read the same .jsonl and the same JPEG files, through the same tokenizer, chat template and image processor, into
batches of the same ids and pixel counts (checked before the clock starts). Ours also makes the labels; the peer masks
nothing but padding, as most scripts do. The two take turns, so that a busy machine slows both; medians are reported.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from torch.utils.data import DataLoader

from processing.collators import PaddedCollator, SupervisedCollator
from processing.example import Example
from processing.processing_families import load_processor
from processing.rows import read_rows
from processing.supervision import Supervision

Collate = Callable[[Sequence[Any]], dict[str, Any]]


def write_rows(folder: Path, num_rows: int, width: int, height: int) -> Path:
    """A .jsonl of conversations of two questions, each with a JPEG of smooth shapes and grain, as large as a photo."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(num_rows):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = rng.normal(0, 6, smooth.shape)
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
        question = [
            {"type": "image", "image": f"{number}.jpg"},
            {"type": "text", "text": f"What is in picture {number}?"},
        ]
        turns = [
            question,
            "A field of colours without a single edge, in soft light.",
            "Anything else?",
            "No, that is all.",
        ]
        roles = ["user", "assistant"] * 2
        lines.append(json.dumps({"messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def our_batches(path: Path, processor: Any) -> tuple[Sequence[Example], Collate]:
    """Rows and collator of this package."""
    return list(read_rows(path)), SupervisedCollator(
        Supervision(processor), PaddedCollator(processor.tokenizer.pad_token_id)
    )


def peer_batches(path: Path, processor: Any) -> tuple[Sequence[Any], Collate]:
    """Rows and collator as the READMEs of Qwen2-VL and later write them, with limits that avoid a second resize."""
    limits = processor.pixel_limits
    rows = []
    for line in path.read_text().splitlines():
        messages = json.loads(line)["messages"]
        part = messages[0]["content"][0]
        messages[0]["content"][0] = {**part, "image": str(path.parent / part["image"]), **limits}
        rows.append(messages)
    return rows, partial(_peer_collate, processor=processor)


def _peer_collate(conversations: Sequence[Any], processor: Any) -> dict[str, Any]:
    from qwen_vl_utils import process_vision_info

    texts = [processor.apply_chat_template(messages, tokenize=False) for messages in conversations]
    pictures, _ = process_vision_info(list(conversations), image_patch_size=processor.image_processor.patch_size)
    batch = processor(text=texts, images=pictures, padding=True, padding_side="right", return_tensors="pt")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def seconds(rows: Sequence[Any], collate: Collate, batch_size: int, num_workers: int) -> float:
    """Once through the rows, workers' start included."""
    start = time.perf_counter()
    for _ in DataLoader(rows, batch_size=batch_size, num_workers=num_workers, collate_fn=collate):
        pass
    return time.perf_counter() - start


def main(
    model: Annotated[Path, typer.Option(help="Folder with the processor of Qwen2-VL, Qwen2.5-VL or Qwen3-VL.")],
    rows: Annotated[int, typer.Option(help="Number of rows.")] = 64,
    size: Annotated[str, typer.Option(help="Pixels of a picture, width x height.")] = "1024x768",
    max_pixels: Annotated[int, typer.Option(help="Largest area of a resized picture, in pixels.")] = 448 * 448,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 8,
    repeats: Annotated[int, typer.Option(help="Runs of each, in turn.")] = 5,
) -> None:
    width, height = map(int, size.split("x"))
    processor = load_processor(model, max_pixels=max_pixels)
    with tempfile.TemporaryDirectory() as folder:
        path = write_rows(Path(folder), rows, width, height)
        ours, peer = our_batches(path, processor), peer_batches(path, processor)
        check_equal(ours[1](ours[0][:2]), peer[1](peer[0][:2]))
        for batches in (ours, peer):
            seconds(*batches, batch_size, num_workers=0)  # imports, caches and the files themselves
        print(f"{rows} rows, {size} JPEG, max_pixels {max_pixels}, batches of {batch_size},")
        print(f"median of {repeats}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
        print("| workers | ours, rows/s | transformers + qwen_vl_utils, rows/s | ratio | ratio per pair of runs |")
        print("|--------:|-------------:|-------------------------------------:|------:|------------------------|")
        for num_workers in (0, 1, 2):
            times: dict[str, list[float]] = {"ours": [], "peer": []}
            for _ in range(repeats):
                times["ours"].append(seconds(*ours, batch_size, num_workers))
                times["peer"].append(seconds(*peer, batch_size, num_workers))
            fast, slow = (rows / statistics.median(times[name]) for name in ("ours", "peer"))
            ratios = [peer / our for our, peer in zip(times["ours"], times["peer"], strict=True)]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(f"| {num_workers} | {fast:.1f} | {slow:.1f} | {fast / slow:.2f} | {spread} |")


def check_equal(ours: dict[str, Any], peer: dict[str, Any]) -> None:
    """Both read the same thing, or the comparison would mean nothing.

    Pixels may differ by rounding: qwen_vl_utils resizes with Pillow, transformers' default image processor with torch.
    """
    for name in ("input_ids", "attention_mask", "image_grid_thw", "mm_token_type_ids"):
        if not torch.equal(ours[name], peer[name]):
            raise ValueError(f"{name} differs between the two: they do not read the same thing")
    apart = (ours["pixel_values"] - peer["pixel_values"]).abs().max().item()
    print(f"largest difference of a pixel value: {apart:.4f} (one grey level is about 0.015)")


if __name__ == "__main__":
    typer.run(main)
