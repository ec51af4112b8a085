"""Spans -> token ids, labels and weights, growing together; a placeholder becomes one id per visual token."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from .chat_spans import IGNORE, Span


@dataclass(frozen=True)
class EncodedSpans:
    """One conversation as ids. All lists but `message_ends` have one entry per token.

    labels: the id where it is a target, IGNORE elsewhere; not shifted (the model shifts).
    weights: loss weight, 0.0 where there is no label.
    message_ends: number of tokens up to and with message i and its closing token.
    """

    input_ids: list[int]
    labels: list[int]
    weights: list[float]
    message_ends: list[int]


@dataclass
class _Piece:
    """Text or ids to be appended together, all of them targets of one weight or none."""

    text: str
    ids: list[int] | None
    span: Span


def encode_spans(
    spans: Sequence[Span],
    tokenizer: Any,
    special: re.Pattern[str],
    *,
    placeholders: Mapping[str, Sequence[Sequence[int]]] | None = None,
    never_targets: Collection[int] = (),
    joined: bool = True,
    in_data: re.Pattern[str] | None = None,
) -> EncodedSpans:
    """Tokenizes `spans` and labels each token by the span that it comes from.

    Special tokens are looked up in the spans that allow them; all other text goes through the tokenizer as plain text
    (`split_special_tokens=True`), in one call. (Added tokens that are not special, such as Qwen's `<tool_call>`, are
    text that happens to be one token: they are parsed everywhere.)

    Args:
        special: `chat_spans.special_pattern(tokenizer)`.
        placeholders: special token -> for each of its occurrences, in order, the ids to put there:
            `{"<imgpad>": [[151859] * 256]}`.
        never_targets: ids that get no label even in a trained answer: the placeholders of pictures.
        joined: see `LabelRule.joined`.
        in_data: special tokens to parse in the data's text too (group 1), as the original finetuning code does with
            all of them; None: none.

    Raises:
        ValueError: the number of occurrences of a placeholder differs from the number of replacements.
    """
    placeholders = placeholders or {}
    used = dict.fromkeys(placeholders, 0)
    pieces: list[_Piece] = []
    for span in spans:
        pattern = special if span.allow_special else in_data
        for position, text in enumerate(pattern.split(span.text) if pattern else (span.text,)):
            if not text:
                continue
            if position % 2 == 0:
                pieces.append(_Piece(text, None, span))
            elif text in placeholders and span.allow_special:
                number, used[text] = used[text], used[text] + 1
                replacements = placeholders[text]
                pieces.append(_Piece(text, list(replacements[number]) if number < len(replacements) else [], span))
            else:
                pieces.append(_Piece(text, [tokenizer.convert_tokens_to_ids(text)], span))
    for token, count in used.items():
        if count != len(placeholders[token]):
            raise ValueError(
                f"The text has {count} {token} but {len(placeholders[token])} picture(s) or video(s) came"
            )
    pieces = _joined(pieces, across_frames=joined)

    texts = [piece.text for piece in pieces if piece.ids is None]
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []
    plain = iter(encoded)
    input_ids: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    message_ends = [0] * (1 + max((span.message for span in spans), default=-1))
    for piece in pieces:
        ids = next(plain) if piece.ids is None else piece.ids
        input_ids += ids
        for id in ids:
            is_target = piece.span.is_target and id not in never_targets
            labels.append(id if is_target else IGNORE)
            weights.append(piece.span.weight if is_target else 0.0)
        message_ends[piece.span.message] = len(input_ids)
    return EncodedSpans(input_ids, labels, weights, message_ends)


def _joined(pieces: list[_Piece], across_frames: bool) -> list[_Piece]:
    """Neighbouring texts of equal label and weight as one text; it belongs to the message of its last piece."""
    joined: list[_Piece] = []

    def kind(piece: _Piece) -> tuple[bool, bool, float, bool]:
        return piece.ids is None, piece.span.is_target, piece.span.weight, piece.span.is_content and not across_frames

    for (is_text, *_), group in groupby(pieces, kind):
        members = list(group)
        if is_text:
            members = [_Piece("".join(piece.text for piece in members), None, members[-1].span)]
        joined += members
    return joined
