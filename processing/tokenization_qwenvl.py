"""Text -> ids of Qwen-VL: byte-pair ranks from `qwen.tiktoken` or `tokenizer.json`, then 217 special tokens.

The ids equal those of the original tokenizer for every text without a picture. Where the original packed a file name
into ids between `<img>` and `</img>`, the text here holds `<imgpad>` and the picture is given beside the text.
"""

import base64
import re
import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import BatchEncoding, PreTrainedTokenizerBase, TokenizersBackend
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils.chat_template_utils import mark_control_tokens

from .special_tokens import ENDOFTEXT, EXTRAS, GROUNDING_TOKENS, QWEN_VL_SPECIAL_TOKENS

# Digits are split one by one: 12 and 345 never share a token, so coordinates keep a place value.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The two characters with which transformers marks the text of users: a special token between them is text.
MARK_START, _, MARK_END = mark_control_tokens("x", re.compile("x"))
# A mark that stands alone: what is before it and what is behind it are encoded apart.
PIECE_BREAK = MARK_END


class _RankFile(TikTokenConverter):
    """Ranks -> vocabulary and merges; reads the file itself so that tiktoken need not be installed."""

    @staticmethod
    def load_tiktoken_bpe(path: str) -> dict[bytes, int]:
        lines = Path(path).read_bytes().splitlines()
        return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


def _set_pipeline(tokenizer: Tokenizer) -> None:
    """Gives a byte-pair model the normalisation, the splitting and the byte alphabet of the family."""
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)


def _add_special_tokens(tokenizer: Tokenizer) -> None:
    """Appends the special tokens behind the last id."""
    # normalized=True: they are looked for after NFC, as in the original. `<img>` + U+0338 is `<img≯`, no token.
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=True) for t in QWEN_VL_SPECIAL_TOKENS])


class QWenTokenizer(TokenizersBackend):
    """Tokenizer of Qwen-VL and Qwen-VL-Chat.

    `from_pretrained` takes a folder with `qwen.tiktoken` (the original repositories, no remote code) or one that
    `save_pretrained` wrote. Nothing is added in front of or behind a text. `eos_token` and `pad_token` are
    `<|endoftext|>`, which the original uses for both without declaring it; there is no bos token.

    Calling it reads every special string in the text as its token, as the original's tokenizer does. Text from users
    goes through `encode_text`, where special strings stay text unless allowed.
    """

    # The class has the name that the original tokenizer_config.json asks for: AutoTokenizer finds it by that name.
    # It has no __init__: transformers would rebuild the tokenizer from bare vocab and merges, without NFC and splits.
    vocab_files_names = {"vocab_file": "qwen.tiktoken", "tokenizer_file": "tokenizer.json"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        # Points to tokenization_qwen.py, which is neither here nor beside what save_pretrained writes.
        kwargs.pop("auto_map", None)
        for name in ("eos_token", "pad_token"):
            if kwargs.get(name) is None:
                kwargs[name] = ENDOFTEXT
        tokenizer_file, vocab_file = kwargs.get("tokenizer_file"), kwargs.get("vocab_file")
        if tokenizer_file is None and vocab_file is not None:
            tokenizer = _RankFile(vocab_file, pattern=SPLIT_PATTERN).converted()
            _set_pipeline(tokenizer)
            _add_special_tokens(tokenizer)
            return {**kwargs, "tokenizer_object": tokenizer}
        return super().convert_to_native_format(trust_remote_code=trust_remote_code, **kwargs)

    def encode_text(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Ids of `text`, where only the strings in `allowed_special` are read as tokens and all others stay text.

        The original's chat reads `IMAGE_SPECIAL_TOKENS`, so that a user who types `<|im_end|>` cannot end the turn.

        Raises:
            ValueError: an allowed string is no special token of this vocabulary.

        Example (ids of the real vocabulary):
            >>> tokenizer.encode_text("<box>")
            [27, 2011, 29]
            >>> tokenizer.encode_text("<box>", allowed_special=["<box>"])
            [151853]
        """
        special = self._special_ids()
        if unknown := sorted(set(allowed_special) - special.keys()):
            raise ValueError(f"{unknown} are no special tokens of this vocabulary; it has {len(special)} of them")
        ids: list[int] = []
        for piece in _split_at(unicodedata.normalize("NFC", text), allowed_special):
            ids += [special[piece]] if piece in allowed_special else self._encode_as_text(piece)["input_ids"]
        return ids

    def _special_ids(self) -> dict[str, int]:
        return {token.content: index for index, token in self.added_tokens_decoder.items() if token.special}

    def _encode_as_text(self, text: str) -> BatchEncoding:
        return self(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)

    def _encode_plus(self, text: str | list[str], **kwargs: Any) -> BatchEncoding:
        """Adds to the base class: text with marks (`sanitize_control_tokens`) keeps its offsets and its word borders.

        The base class encodes the text before and after a marked token apart; the original encodes `a <|im_end|>` of a
        user as one text, which gives other ids (` <|` is one token).
        """
        if not kwargs.get("sanitize_control_tokens"):
            return super()._encode_plus(text, **kwargs)
        rows = [self._encode_marked(row) for row in ([text] if isinstance(text, str) else text)]
        max_length = kwargs.get("max_length")
        if kwargs["truncation_strategy"] != TruncationStrategy.DO_NOT_TRUNCATE and max_length is not None:
            kept = slice(max_length) if self.truncation_side == "right" else slice(-max_length, None)
            rows = [(ids[kept], offsets[kept]) for ids, offsets in rows]
        padding_side = kwargs.get("padding_side") or self.padding_side
        batch = self.pad(
            {"input_ids": [ids for ids, _ in rows]},
            padding=kwargs["padding_strategy"],
            max_length=max_length,
            pad_to_multiple_of=kwargs.get("pad_to_multiple_of"),
            padding_side=padding_side,
            return_attention_mask=kwargs.get("return_attention_mask"),
        )
        if kwargs.get("return_offsets_mapping"):
            padding = [
                [(0, 0)] * (len(padded) - len(ids)) for padded, (ids, _) in zip(batch["input_ids"], rows, strict=True)
            ]
            batch["offset_mapping"] = [
                pad + offsets if padding_side == "left" else offsets + pad
                for pad, (_, offsets) in zip(padding, rows, strict=True)
            ]
        if isinstance(text, str) and kwargs.get("return_tensors") is None:
            return BatchEncoding({name: values[0] for name, values in batch.items()})
        return batch.convert_to_tensors(kwargs.get("return_tensors"))

    def _encode_marked(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text with marks, and for each the characters (start, end) of `text` that it came from."""
        special = self._special_ids()
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        run: list[int] = []  # positions in `text` of the characters that are encoded together, marks left out

        def encode_run() -> None:
            if not run:
                return
            encoding = self._encode_as_text("".join(text[position] for position in run))
            ids.extend(encoding["input_ids"])
            offsets.extend((run[start], run[end - 1] + 1) for start, end in encoding["offset_mapping"])
            run.clear()

        position = 0
        for piece in _split_at(text, [MARK_START + t + MARK_END for t in special] + [*special, MARK_START, MARK_END]):
            end = position + len(piece)
            if piece in special:
                encode_run()
                ids.append(special[piece])
                offsets.append((position, end))
            elif piece in (MARK_START, MARK_END):
                encode_run()
            elif piece[0] == MARK_START:
                run.extend(range(position + 1, end - 1))
            else:
                run.extend(range(position, end))
            position = end
        encode_run()
        return ids, offsets

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        keep_image_special: bool = False,
        **kwargs: Any,
    ) -> str:
        """Adds to the base class: with `keep_image_special`, skipping leaves the six grounding tokens in the text."""
        if skip_special_tokens and keep_image_special:
            dropped = {index for token, index in self._special_ids().items() if token not in GROUNDING_TOKENS}
            token_ids = [i for i in ([token_ids] if isinstance(token_ids, int) else token_ids) if i not in dropped]
            skip_special_tokens = False
        return super()._decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)


def _split_at(text: str, separators: Iterable[str]) -> list[str]:
    """`text` cut before and after each separator, longest first, without empty pieces.

    Example:
        >>> _split_at("a<box>b", ["<box>"])
        ['a', '<box>', 'b']
    """
    longest_first = sorted(separators, key=len, reverse=True)
    if not longest_first:
        return [text] if text else []
    return [piece for piece in re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if piece]


def train_qwenvl_tokenizer(texts: Iterable[str], vocab_size: int) -> QWenTokenizer:
    """A tokenizer of the same kind with a small vocabulary, for demonstrations and tests.

    Args:
        texts: the corpus from which the merges are learned.
        vocab_size: largest number of ids, counting the 256 bytes and the 217 special tokens; a small corpus gives
            fewer. Special tokens come last, in their usual order.

    Raises:
        ValueError: `vocab_size` is below 473.

    Example:
        >>> tokenizer = train_qwenvl_tokenizer(["three and three"], vocab_size=500)
        >>> len(tokenizer), tokenizer.convert_tokens_to_ids("<|endoftext|>"), tokenizer.tokenize("three and three")
        (481, 264, ['three', 'Ġand', 'Ġthree'])
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(QWEN_VL_SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}, but bytes and special tokens alone take {smallest}")
    tokenizer = Tokenizer(models.BPE())
    _set_pipeline(tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(QWEN_VL_SPECIAL_TOKENS), initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    _add_special_tokens(tokenizer)
    return QWenTokenizer(tokenizer_object=tokenizer, eos_token=ENDOFTEXT, pad_token=ENDOFTEXT)


def add_qwenvl_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Appends to another model's tokenizer those of Qwen-VL's special tokens that it lacks, but the 205 reserved ones.

    Returns:
        how many were added: the model's embeddings need as many new rows (`resize_token_embeddings`).
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in QWEN_VL_SPECIAL_TOKENS if token not in vocabulary and token not in EXTRAS]
    return tokenizer.add_tokens([AddedToken(token, special=True, normalized=True) for token in missing])
