"""A folder that is to be published, loaded by a stranger: the card's own code, in a fresh process, elsewhere.

The same code runs on what the folder was made from. Inputs, logits and the generated answer must agree.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from trainers import publish_probe

PICTURE = "picture.png"


@dataclass(frozen=True)
class Comparison:
    """What came of it. `largest_difference`: of two logits, relative to the largest; None for a processor."""

    largest_difference: float | None
    answer: str

    def __str__(self) -> str:
        if self.largest_difference is None:
            return "same inputs from the published processor"
        return f"logits differ by at most {self.largest_difference:.1e} of the largest; answer {self.answer!r}"


@dataclass(frozen=True)
class _Probe:
    tensors: dict[str, Tensor]
    said: str
    dtype: str


def compare(published: str, original: str, is_merged: bool = False, without_package: bool = False) -> Comparison:
    """Runs the two code samples and compares what they did with the same picture.

    Args:
        published, original: Python that makes `processor` and `inputs` and, of a model, `model` and `output`.
        is_merged: the weights are sums that were rounded once; then logits may differ by what the dtype rounds, and
            the answer where two tokens are that close.
        without_package: the published one must run where this package is not installed.

    Raises ValueError if a sample does not run, or if they disagree.
    """
    with tempfile.TemporaryDirectory() as folder:
        _test_picture().save(Path(folder) / PICTURE)
        theirs = _run(published, Path(folder), "published", without_package)
        ours = _run(original, Path(folder), "original", False)
    names = sorted(theirs.tensors.keys() ^ ours.tensors.keys())
    inputs = [name for name in ours.tensors if name.startswith("inputs/")]
    differing = [name for name in inputs if name in names or not torch.equal(ours.tensors[name], theirs.tensors[name])]
    if names or differing:
        raise ValueError(
            f"The published processor makes other inputs than the original's: {', '.join(names or differing)}. "
            "Nothing was sent."
        )
    if "logits" not in ours.tensors:
        return Comparison(None, theirs.said.strip())
    theirs_BTV, ours_BTV = theirs.tensors["logits"], ours.tensors["logits"]
    difference = ((theirs_BTV - ours_BTV).abs().max() / ours_BTV.abs().max()).item()
    # Sums of many rounded terms: a merged weight is rounded once more than the parts it was made of.
    allowed = 64 * torch.finfo(getattr(torch, ours.dtype)).eps if is_merged else 1e-6
    if not difference <= allowed:
        raise ValueError(
            f"The published model's logits differ by {difference:.2e} of the largest, {allowed:.2e} is allowed: it is "
            "not the model that it was made from. Nothing was sent."
        )
    same = torch.equal(theirs.tensors["answer_ids"], ours.tensors["answer_ids"]) and theirs.said == ours.said
    if not same and not is_merged:
        raise ValueError(
            f"The published model answers {theirs.said.strip()!r}, the original {ours.said.strip()!r}. Nothing was "
            "sent."
        )
    return Comparison(difference, theirs.said.strip())


def _run(sample: str, folder: Path, name: str, without_package: bool) -> _Probe:
    script, output = folder / f"{name}.py", folder / f"{name}.safetensors"
    script.write_text(sample, encoding="utf-8")
    # -P: the folder of the probe is not searched for modules; nor is the repository, whatever PYTHONPATH says.
    command = [sys.executable, "-P", publish_probe.__file__, str(script), str(output)]
    if without_package:
        command.append("--without-package")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules")}
    if not without_package:
        # From the checkout, where the package is not installed.
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        last = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise ValueError(f"The code sample of the {name} model does not run:\n{sample}\n{last}\nNothing was sent.")
    with safe_open(output, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- no mapping
    return _Probe(tensors, json.loads(metadata["said"]), metadata["dtype"])


def _test_picture() -> Image.Image:
    """96 x 64 pixels: red grows to the right, green downwards, a blue square in a corner."""
    pixels_HWC = np.zeros((64, 96, 3), dtype=np.uint8)
    pixels_HWC[:, :, 0] = np.linspace(0, 255, 96, dtype=np.uint8)
    pixels_HWC[:, :, 1] = np.linspace(0, 255, 64, dtype=np.uint8)[:, None]
    pixels_HWC[8:24, 8:24, 2] = 255
    return Image.fromarray(pixels_HWC)
