"""Which files of a folder may leave the machine: a list of what a published model consists of, all else refused.

Only names on the list go. Optimizer states, data sets, keys and whatever the list does not know stay behind, and the
plan names them. A file that is on the list but whose text holds an access token stops everything.
"""

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
MODEL = ("config.json", "generation_config.json", *WEIGHTS)
ADAPTER = ("adapter_config.json", *WEIGHTS)
PROCESSOR = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "qwen.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
)
LEGAL = ("LICENSE*", "NOTICE*")
CARD = "README.md"
CONFIGS = ("config.json", "adapter_config.json", "processor_config.json", "preprocessor_config.json")
SECRET_NAMES = ("*token.txt", "*secret*", "*credential*", "*password*", "*.pem", "*.key", "id_rsa*", "*.env")
# Access tokens of the Hub (hf_...), of OpenAI and Anthropic (sk-...), of GitHub, of AWS, and private keys.
SECRET_TEXT = re.compile(
    rb"\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{32,}|\bgh[pousr]_[A-Za-z0-9]{36}|\bAKIA[0-9A-Z]{16}\b"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


@dataclass(frozen=True)
class UploadPlan:
    """What of `folder` would be sent (`files`, names relative to it) and what is refused (`refused`)."""

    folder: Path
    files: tuple[str, ...]
    refused: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum((self.folder / name).stat().st_size for name in self.files)


def plan_upload(folder: str | Path, has_code: bool = False) -> UploadPlan:
    """Sort the files of `folder` into those a model consists of and all others.

    `has_code`: Python files lie there for people without this package; without it they are refused like other files.

    Raises ValueError where the folder is none, holds no model, adapter or processor, lacks a weight shard that its
    index names, or where a file that would be sent holds an access token.

    Example:
        >>> plan_upload("runs/demo/model").files
        ('chat_template.jinja', 'config.json', 'model.safetensors', ...)
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give the folder that save_pretrained wrote.")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    patterns = (*MODEL, *ADAPTER, *PROCESSOR, *LEGAL, CARD, *(("*.py",) if has_code else ()))
    files = tuple(name for name in names if "/" not in name and is_named(name, patterns))
    if not set(CONFIGS) & set(files):
        raise ValueError(f"{folder} holds none of {', '.join(CONFIGS)}: it is no saved model, adapter or processor.")
    for index in (name for name in files if name.endswith(".index.json")):
        shards = set(json.loads((folder / index).read_text())["weight_map"].values())
        missing = sorted(shards - set(files))
        if missing:
            raise ValueError(
                f"{folder / index} names {len(shards)} shards, {len(shards) - len(missing)} are here; "
                f"missing: {', '.join(missing)}. Save the model again."
            )
    for name in files:
        # A vocabulary is text of anyone's, and weights are noise: only what people and programs wrote is searched.
        if not is_named(name, (*WEIGHTS, "tokenizer.json", "vocab.json", "merges.txt", "qwen.tiktoken")) and (
            found := SECRET_TEXT.search((folder / name).read_bytes())
        ):
            raise ValueError(
                f"{folder / name} holds what looks like an access token ({found[0][:6].decode()}...): remove it, and "
                "revoke it if others could have seen the file."
            )
    return UploadPlan(folder, files, tuple(sorted(set(names) - set(files))))


def is_named(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether `name` fits a pattern, and no pattern of names that secrets bear."""
    return any(fnmatch(name, pattern) for pattern in patterns) and not any(
        fnmatch(name.lower(), pattern) for pattern in SECRET_NAMES
    )
