"""Something trained -> the folder to publish: a model, an adapter or a processor, with nothing else in it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForImageTextToText

import modeling_qwenvl  # noqa: F401 -- registers Qwen-VL with AutoModelForImageTextToText
from trainers.checkpoints import FILE_LIST, what_is_missing
from trainers.merge import copy_processor, merge
from trainers.publish_card import Kind
from trainers.publish_files import plan_upload

NATIVE_TYPES = ("qwen_vl", "qwen")


def kind_of(source: Path) -> Kind:
    """What lies in `source`: an adapter, a model, or a processor alone.

    Raises ValueError if it is none of them.
    """
    names: dict[str, Kind] = {
        "adapter_config.json": "adapter",
        "config.json": "model",
        "processor_config.json": "processor",
        "preprocessor_config.json": "processor",
    }
    for name, kind in names.items():
        if (source / name).is_file():
            return kind
    raise ValueError(f"{source} holds none of {', '.join(names)}: it is no saved model, adapter or processor.")


def base_of(adapter: Path) -> str:
    """The model that an adapter was trained from, as its settings name it."""
    return str(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])


def is_native(source: Path) -> bool:
    """Whether the model in `source`, or under the adapter there, is of this package's own family.

    A processor alone is known by its class.
    """
    folder = Path(base_of(source)) if kind_of(source) == "adapter" else source
    if (folder / "config.json").is_file():
        return json.loads((folder / "config.json").read_text()).get("model_type") in NATIVE_TYPES
    settings = source / "processor_config.json"
    return settings.is_file() and json.loads(settings.read_text()).get("processor_class") == "QwenVLProcessor"


def build_folder(
    source: Path, folder: Path, merged: bool = False, has_code: bool = False, base_name: str | None = None
) -> Kind:
    """Writes what is to be published of `source` into `folder`, an empty one, and says what it is.

    merged: of an adapter, the whole model with the adapter merged. has_code: with the Python files that load it where
    this package is not installed. base_name: what an adapter's settings call its base from now on.

    Raises ValueError for a checkpoint that is not whole, and for wishes that do not fit what lies in `source`.
    """
    kind = kind_of(source)
    if merged and kind != "adapter":
        raise ValueError(f"{source} is a {kind}, there is nothing to merge: leave --merge out.")
    if has_code and (not is_native(source) or (kind != "model" and not merged)):
        raise ValueError(
            f"{source} needs no code of this package: transformers has its classes, or its base model brings them. "
            "Leave --code out."
        )
    if (source / FILE_LIST).is_file() and (problems := what_is_missing(source)):
        raise ValueError(f"{source} is not a whole checkpoint: {'; '.join(problems)}.")
    folder.mkdir(parents=True, exist_ok=True)
    if merged:
        merge(source, folder)
        kind = "model"
        if has_code:
            _rewrite(folder, folder)
    elif has_code:
        _rewrite(source, folder)
    elif kind == "model" and (source / FILE_LIST).is_file():
        # Checkpoints bear the names of the modules; what is published bears the names that others look for.
        model = AutoModelForImageTextToText.from_pretrained(source, dtype="auto")
        model._weight_conversions = None  # else transformers would write the names that it read
        model.save_pretrained(folder)
        copy_processor(source, folder)
    else:
        for name in plan_upload(source).files:
            # Its card, if there is one, is not about this model: trainers write one of their own.
            if name != "README.md":
                shutil.copy2(source / name, folder / name)
    if kind == "adapter" and base_name is not None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base_name}, indent=2))
    return kind


def _rewrite(source: Path, folder: Path) -> None:
    """In a process of its own; see trainers/publish_code.py."""
    command = [sys.executable, "-m", "trainers.publish_code", str(source.resolve()), str(folder.resolve())]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"The model could not be written with its code:\n{done.stderr[-2000:]}")
