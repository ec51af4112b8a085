"""What lies beside the weights: config, generation settings, tokenizer and processor, in either layout."""

import base64
import json
import shutil
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from modeling_qwenvl.original_config import original_config
from processing.processing_families import load_processor
from processing.special_tokens import QWEN_VL_SPECIAL_TOKENS
from processing.tokenization_qwenvl import QWenTokenizer

RANK_FILE = "qwen.tiktoken"
LEGAL = ("LICENSE*", "NOTICE*")


def write_native_companions(source: Path, output: Path, model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """Our config.json, generation_config.json with the stop words of the original's chat, and the processor's files.

    `model` is a native model without weights. Returns notes on what could not come along.
    """
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.config.save_pretrained(output)
    if (source / GENERATION_CONFIG_NAME).is_file():
        settings = GenerationConfig.from_pretrained(source)
        # As from_pretrained of the model reads it: Qwen-VL-Chat's stop words.
        if vars(settings).get("chat_format") == "chatml" and isinstance(settings.eos_token_id, int):
            settings.eos_token_id = [settings.eos_token_id + place for place in range(3)]
        settings.save_pretrained(output)
    _copy_legal(source, output)
    if not (source / RANK_FILE).is_file() and not (source / "tokenizer.json").is_file():
        return [f"no tokenizer: {source} holds neither {RANK_FILE} nor tokenizer.json."]
    load_processor(source).save_pretrained(output)
    return []


def write_original_companions(source: Path, output: Path, model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """The original config.json, generation_config.json and qwen.tiktoken. The original's Python files are not ours to
    write: a note says which ones it needs."""
    model.config.dtype = dtype
    _write_json(output / CONFIG_NAME, original_config(model.config))
    if (source / GENERATION_CONFIG_NAME).is_file():
        settings = json.loads((source / GENERATION_CONFIG_NAME).read_text())
        if isinstance(settings.get("eos_token_id"), list):
            settings["eos_token_id"] = min(settings["eos_token_id"])
        _write_json(output / GENERATION_CONFIG_NAME, settings)
    _copy_legal(source, output)
    notes = [
        "the original's code is not written: to load the folder with it, copy configuration_qwen.py, "
        "modeling_qwen.py, qwen_generation_utils.py, visual.py and tokenization_qwen.py from its repository."
    ]
    if not (source / "tokenizer.json").is_file() and not (source / RANK_FILE).is_file():
        return [*notes, f"no tokenizer: {source} holds none."]
    tokenizer = load_processor(source).tokenizer
    if not isinstance(tokenizer, QWenTokenizer):
        return [*notes, f"no tokenizer: the original has no file for a {type(tokenizer).__name__}."]
    (output / RANK_FILE).write_bytes(rank_file(tokenizer))
    _write_json(
        output / "tokenizer_config.json",
        {
            "model_max_length": model.config.text_config.max_position_embeddings,
            "tokenizer_class": "QWenTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
        },
    )
    return notes


def rank_file(tokenizer: QWenTokenizer) -> bytes:
    """The contents of `qwen.tiktoken` for this vocabulary: base64 and rank of each token but the special ones.

    Raises ValueError for a vocabulary whose special tokens do not follow the others in the original's order.

    Example:
        >>> rank_file(tokenizer).splitlines()[0]
        b'IQ== 0'
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    num_ranks = len(vocabulary) - len(QWEN_VL_SPECIAL_TOKENS)
    if [token for token, _ in vocabulary[num_ranks:]] != list(QWEN_VL_SPECIAL_TOKENS):
        raise ValueError(
            f"The tokenizer's last {len(QWEN_VL_SPECIAL_TOKENS)} tokens are not the original's special tokens in "
            "their order: the original's tokenizer could not read it (tokens were added or left out)."
        )
    byte_of = _bytes_of_letters()
    lines = [
        base64.b64encode(bytes(byte_of[letter] for letter in token)) + f" {rank}\n".encode()
        for token, rank in vocabulary[:num_ranks]
    ]
    return b"".join(lines)


def _bytes_of_letters() -> dict[str, int]:
    """Letter of the byte-level alphabet -> byte. Printable bytes stand for themselves, the others follow in order."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    same = {letter: ord(letter) for letter in letters if ord(letter) < 256}
    others = sorted(set(range(256)) - set(same.values()))
    return same | dict(zip(sorted(set(letters) - same.keys()), others, strict=True))


def _copy_legal(source: Path, output: Path) -> None:
    for pattern in LEGAL:
        for path in source.glob(pattern):
            shutil.copy2(path, output / path.name)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
