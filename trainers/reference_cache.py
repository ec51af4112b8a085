"""Reference log-probabilities on disk: computed once per row, and refused when data, model or processor differ.

    cache_dir/<name of the dataset>.safetensors

holds the two sums of each row, a key of each row's contents, and fingerprints of what they were computed with.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import ProcessorMixin

from processing.example import Example, Message, RowError
from processing.parts import IMAGE_KEYS
from processing.picture_sources import ANYTHING, describe, read_source
from trainers.families import unwrap

KEY_BYTES = 16
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
RUN_DEPENDENT = ("_name_or_path", "transformers_version")  # of a configuration


def load_or_compute(
    path: str | Path,
    rows: Sequence[Example],
    fingerprints: dict[str, str],
    compute: Callable[[], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The reference log-probabilities of `rows`, from `path`, or computed and written there.

    Args:
        fingerprints: what the numbers depend on besides the rows, by a name for messages ("model", ...).
        compute: gives `COLUMNS`, each float32 (rows,).

    Raises:
        ValueError: the file was made from other rows (names the first that differs), with another model, processor or
            setting (says which), or cannot be read.
    """
    path = Path(path)
    keys = torch.stack([torch.frombuffer(bytearray(row_key(row)), dtype=torch.uint8) for row in rows])
    if path.exists():
        return _load(path, rows, keys, fingerprints)
    columns = compute()
    assert {name: len(column) for name, column in columns.items()} == dict.fromkeys(COLUMNS, len(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when whole: a run that is killed here leaves no half a file.
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(columns | {"keys": keys}, unfinished, metadata=fingerprints)
    unfinished.replace(path)
    return columns


def _load(path: Path, rows: Sequence[Example], keys: Tensor, fingerprints: dict[str, str]) -> dict[str, Tensor]:
    again = f"Delete {path}, or set another reference_cache_dir, to compute them again."
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata()
            columns = {name: file.get_tensor(name) for name in (*COLUMNS, "keys")}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}). {again}") from error
    differing = [name for name, value in fingerprints.items() if stored.get(name) != value]
    if differing:
        raise ValueError(
            f"The reference log-probabilities in {path} were made with another {', '.join(differing)}. {again}"
        )
    stored_keys = columns.pop("keys")
    if len(stored_keys) != len(keys):
        raise ValueError(
            f"{path} holds reference log-probabilities of {len(stored_keys)} rows, the data has {len(keys)}. {again}"
        )
    changed = (stored_keys != keys).any(dim=1).nonzero()[:, 0].tolist()
    if changed:
        raise ValueError(
            f"{len(changed)} of {len(keys)} rows differ from those in {path}, the first is row {changed[0]}, "
            f"{rows[changed[0]].source.where}. {again}"
        )
    return columns


def row_key(example: Example) -> bytes:
    """16 bytes for the contents of a preference row: its messages, both answers, and its pictures (the bytes of the
    file, not its name: a moved folder holds the same data; of a web address, the address)."""
    if not isinstance(example, Example):
        raise ValueError(
            f"the reference cache knows rows by their texts and pictures: give Examples, not {type(example).__name__}s"
        )
    if example.videos:
        raise RowError(
            example.source,
            "the reference cache knows rows by their texts and pictures, and this one has a video: take reference "
            "'adapter_off' or 'copy'",
        )
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    texts = [
        list(map(_without_pictures, turns or ())) for turns in (example.messages, example.chosen, example.rejected)
    ]
    digest.update(json.dumps(texts, sort_keys=True).encode())
    for picture in example.pictures:
        digest.update(_picture_bytes(picture))
    return digest.digest()


def _without_pictures(message: Message) -> Message:
    content = message["content"]
    if isinstance(content, str):
        return message
    return {**message, "content": [{k: v for k, v in part.items() if k not in IMAGE_KEYS} for part in content]}


def _picture_bytes(picture: Any) -> bytes:
    if isinstance(picture, Image.Image):
        return f"{picture.mode}{picture.size}".encode() + picture.tobytes()
    if isinstance(picture, np.ndarray | Tensor):
        array = np.asarray(picture)
        return f"{array.dtype}{array.shape}".encode() + array.tobytes()
    if isinstance(picture, str) and picture.startswith(("http://", "https://")):
        return picture.encode()
    return read_source(picture, describe(picture), ANYTHING)


def fingerprint_of_model(model: nn.Module, with_adapters: bool) -> str:
    """Of the configuration and all weights, 32 hexadecimal digits; with or without what PEFT added."""
    base = unwrap(model)
    added = set(model.peft_config) if isinstance(model, PeftModel) and not with_adapters else set()
    config = {key: value for key, value in base.config.to_dict().items() if key not in RUN_DEPENDENT}
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(base.state_dict().items()):
        # PEFT names a module of its own by the adapter (lora_A.default), and puts the original one level down.
        if added.isdisjoint(name.split(".")):
            name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint_of_processor(processor: ProcessorMixin) -> str:
    """Of vocabulary, chat template and picture settings, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    digest.update(processor.tokenizer.backend_tokenizer.to_str().encode())
    digest.update(str(processor.chat_template).encode())
    digest.update(processor.image_processor.to_json_string().encode())
    return digest.hexdigest()
