"""Runs a card's code sample and saves what came out; a script of its own, which imports nothing of this package.

    python publish_probe.py SAMPLE.py OUTPUT.safetensors [--without-package]

In the working directory lies picture.png. With --without-package the packages of this project cannot be imported,
as on a machine that has transformers alone.
"""

import contextlib
import io
import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

PACKAGES = ("modeling_qwenvl", "processing", "trainers")


class Absent(MetaPathFinder):
    """Finds none of this project's packages, whatever is installed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in PACKAGES:
            raise ModuleNotFoundError(f"No module named {fullname!r} (left out on purpose)", name=fullname)


def main(sample: str, output: str, *flags: str) -> None:
    if "--without-package" in flags:
        sys.meta_path.insert(0, Absent())
    import torch
    from safetensors.torch import save_file

    namespace: dict = {}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(Path(sample).read_text(encoding="utf-8"), sample, "exec"), namespace)
    tensors = {
        f"inputs/{name}": value.contiguous()
        for name, value in namespace["inputs"].items()
        if isinstance(value, torch.Tensor)
    }
    dtype = ""
    if "model" in namespace:
        model = namespace["model"].eval()
        with torch.no_grad():
            tensors["logits"] = model(**namespace["inputs"]).logits.float().contiguous()
        tensors["answer_ids"] = namespace["output"].contiguous()
        dtype = str(model.dtype).removeprefix("torch.")
    save_file(tensors, output, metadata={"said": json.dumps(said.getvalue()), "dtype": dtype})


if __name__ == "__main__":
    main(*sys.argv[1:])
