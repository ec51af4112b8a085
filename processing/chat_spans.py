"""Chat template + conversation -> spans (text, is it a target, its weight, may it hold special tokens) -> token ids.

The label is born with the text. A template is rendered once more with a marker in place of every text that the data
brings. What stands at a marker is data: it is tokenized as plain text, so a user who writes `<|im_end|>` or
"assistant" forges nothing and trains nothing. The rest is the template's: control text, whose special tokens are
parsed. Which message a piece belongs to is known from the markers, so nobody searches ids for a role afterwards.

This works for any template, because it is checked for every conversation: the spans joined must be, character by
character, what the template gives for the conversation itself; a template that looks into the text is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .example import Message

IGNORE = -100  # the label that torch's cross entropy leaves out
SHAPE_TEXTS = ("label", "text", "html")  # text that box, quad, point, ref and document parts bring

Render = Callable[[list[Message]], str]
TrainOn = Literal["answers", "last_answer"] | Callable[[int, Sequence[Message]], bool]


@dataclass(frozen=True)
class Span:
    """A piece of the text that the model reads.

    is_target: the model is trained to write it. weight: factor of its loss, >= 0 (0 where not a target).
    allow_special: special tokens in it are parsed; otherwise `<|im_end|>` is ten or so tokens of plain text.
    is_content: it stands inside a message: its text, or the markup of its pictures and boxes; else it frames messages.
    message: index of the message it belongs to. What a template writes between two messages belongs to the earlier one
    up to its closing token, and to the later one from there.
    """

    text: str
    is_target: bool
    weight: float
    allow_special: bool
    is_content: bool
    message: int


@dataclass(frozen=True)
class LabelRule:
    """What is a target besides the content of the trained messages.

    markers: regular expression for control text that frames a message; None: the special token right after the content
        (`<|im_end|>`, `<|eot_id|>`, `</s>`, with the whitespace before it, which the model must write to get there).
    every_turn: the frame is a target around messages of every role, not only around the trained ones.
    joined: the frame is tokenized together with the content, as a processor does with the whole prompt; False: apart,
        as the original Qwen-VL code does. The two differ only where a text begins or ends in whitespace. What is read
        and what is written are never tokenized together: when the model answers, its prompt is tokenized already.
    """

    markers: str | None = None
    every_turn: bool = False
    joined: bool = True


ANSWERS = LabelRule()

# As the original's finetune.py: every <|im_start|>, every <|im_end|> and the newline after it, but no role.
QWEN_VL = LabelRule(markers=r"<\|im_start\|>|<\|im_end\|>\n?", every_turn=True, joined=False)


def special_pattern(tokenizer: Any, only: Collection[str] | None = None) -> re.Pattern[str]:
    """Matches each special token of `tokenizer`, or those of `only`, as group 1.

    Raises:
        ValueError: a token of `only` is not a special token of `tokenizer`.
        ValueError: a special token eats the blanks around it (lstrip, rstrip) or wants word borders, which splitting
            the text at special tokens would get wrong.
    """
    special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    for token in special:
        if token.lstrip or token.rstrip or token.single_word:
            raise ValueError(
                f"Special token {token.content!r} has lstrip, rstrip or single_word set: spans cannot be cut there. "
                f"Load the tokenizer with these flags off."
            )
    known = {token.content for token in special}
    if unknown := set(only or ()) - known:
        raise ValueError(f"Not special tokens of this tokenizer: {', '.join(sorted(unknown))}")
    texts = sorted(known if only is None else set(only), key=len, reverse=True)  # the longest first
    return re.compile("(" + "|".join(map(re.escape, texts)) + ")" if texts else r"((?!))")


def chat_spans(
    messages: Sequence[Message],
    render: Render,
    special: re.Pattern[str],
    *,
    rule: LabelRule = ANSWERS,
    train_on: TrainOn = "answers",
    weight: float = 1.0,
) -> list[Span]:
    """The conversation as spans; joined, their texts are `render(messages)`.

    Args:
        messages: the conversation; `weight` and `train` of a message are obeyed (see `trained_messages`).
        render: messages -> text, such as `lambda m: processor.apply_chat_template(m, tokenize=False)`. Parts that are
            neither text nor picture (boxes, ...) must have become text in it; what they become is control text.
        special: `special_pattern(tokenizer)`.
        weight: factor on the weights of the messages.

    Raises:
        ValueError: the template looks into the text, drops or repeats a message, or writes no end token after a
            trained message; a label or phrase of a box part holds a special token.

    Example:
        >>> messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
        >>> [(span.text, span.is_target) for span in chat_spans(messages, render, special)]
        [('<|im_start|>user\\n', False), ('1+1?', False), ('<|im_end|>', False),
         ('\\n<|im_start|>assistant\\n', False), ('2', True), ('<|im_end|>', True), ('\\n', False)]
    """
    _refuse_special_labels(messages, special)
    plain = [{key: value for key, value in message.items() if key not in ("weight", "train")} for message in messages]
    expected = render(plain)
    marker = "markedtext"
    while marker in expected:
        marker += "x"
    texts: list[str] = []
    marked = [_with_markers(message, index, marker, texts) for index, message in enumerate(plain)]
    frames, contents = _split_at_markers(render(marked), marker, len(plain), len(texts))
    texts = _texts_as_rendered(texts, frames, contents, expected)

    trained = trained_messages(messages, train_on)
    framed = [
        is_trained or _frame_is_target(rule, m, train_on) for is_trained, m in zip(trained, messages, strict=True)
    ]
    weights = [weight * message.get("weight", 1.0) for message in messages]
    spans: list[Span] = []

    def add(text: str, home: int, is_target: bool, *, is_content: bool = False, allow_special: bool = True) -> None:
        if text:
            is_target = is_target and weights[home] > 0
            spans.append(Span(text, is_target, weights[home] if is_target else 0.0, allow_special, is_content, home))

    closing = re.compile(rule.markers if rule.markers else rf"\s*{special.pattern}")
    for index, frame in enumerate(frames):  # frames[i] stands before message i, the last one after the last message
        if index > 0:
            match = closing.match(frame)
            if match is None and trained[index - 1]:
                raise ValueError(
                    f"The chat template writes no end token after message {index - 1}, but {frame[:40]!r}: a model "
                    f"trained on it would not learn to stop."
                )
            end = match.end() if match else 0
            add(frame[:end], index - 1, framed[index - 1])
            frame = frame[end:]
        home = min(index, len(messages) - 1)
        start = 0
        for match in re.finditer(rule.markers, frame) if rule.markers else ():
            add(frame[start : match.start()], home, False)
            add(match.group(), home, framed[home])
            start = match.end()
        add(frame[start:], home, False)
        for piece in contents[index] if index < len(contents) else ():
            if isinstance(piece, int):
                add(texts[piece], index, trained[index], is_content=True, allow_special=False)
            else:
                add(piece, index, trained[index], is_content=True)
    return spans


def trained_messages(messages: Sequence[Message], train_on: TrainOn) -> list[bool]:
    """Whose content is a target: what the message's own `train` says, else `train_on`.

    "answers": all of the assistant; "last_answer": its last; a function gets (index, messages).
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "answers":
        chosen = set(answers)
    elif train_on == "last_answer":
        chosen = set(answers[-1:])
    elif callable(train_on):
        chosen = {index for index in range(len(messages)) if train_on(index, messages)}
    else:
        raise ValueError(f"train_on is {train_on!r}; known are 'answers', 'last_answer' and a function")
    return [message.get("train", index in chosen) for index, message in enumerate(messages)]


def _frame_is_target(rule: LabelRule, message: Message, train_on: TrainOn) -> bool:
    return rule.every_turn and train_on == "answers" and message.get("train", True)


def _refuse_special_labels(messages: Sequence[Message], special: re.Pattern[str]) -> None:
    for index, message in enumerate(messages):
        for part in message["content"] if not isinstance(message["content"], str) else ():
            for key in SHAPE_TEXTS:
                text = part.get(key) if part["type"] != "text" else None
                if isinstance(text, str) and (match := special.search(text)):
                    raise ValueError(
                        f"Message {index} has a part of type {part['type']!r} whose {key} holds the special token "
                        f"{match.group()!r}: it would be read as a control token. Take it out of the {key}."
                    )


def _with_markers(message: Message, index: int, marker: str, texts: list[str]) -> Message:
    """`message` with a marker for each text, and one where its content begins and ends; the texts go to `texts`."""

    def slot(text: str) -> str:
        texts.append(text)
        return f"{marker}t{len(texts) - 1}."

    begin, end = f"{marker}b{index}.", f"{marker}e{index}."
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": begin + slot(content) + end}
    parts = [{**part, "text": slot(part["text"])} if part["type"] == "text" else dict(part) for part in content]
    # Into a neighbouring text where there is one: a template may treat a further part differently.
    if not parts or parts[0]["type"] != "text":
        parts.insert(0, {"type": "text", "text": ""})
    if parts[-1]["type"] != "text":
        parts.append({"type": "text", "text": ""})
    parts[0]["text"] = begin + parts[0]["text"]
    parts[-1]["text"] += end
    return {**message, "content": parts}


def _split_at_markers(
    rendered: str, marker: str, num_messages: int, num_texts: int
) -> tuple[list[str], list[list[str | int]]]:
    """The template's text before, between and after the messages (num_messages + 1 pieces), and for each message its
    pieces: a number stands for a text of the data, a string is the template's (the markup of a picture)."""
    first, *rest = re.split(rf"{marker}([bte]\d+)\.", rendered)
    names, controls = rest[::2], rest[1::2]
    wanted = [f"{side}{i}" for i in range(num_messages) for side in "be"], [f"t{i}" for i in range(num_texts)]
    if ([name for name in names if name[0] != "t"], [name for name in names if name[0] == "t"]) != wanted:
        raise ValueError(
            f"The chat template must write each of the {num_messages} messages and {num_texts} texts once and in "
            f"order; it wrote {', '.join(names)} (b, e: begin and end of a message, t: a text)."
        )
    frames: list[str] = [first]
    contents: list[list[str | int]] = []
    for name, control in zip(names, controls, strict=True):
        if name[0] == "e":
            frames.append(control)
            continue
        if name[0] == "b":
            contents.append([])
        else:
            contents[-1].append(int(name[1:]))
        if control:
            contents[-1].append(control)
    return frames, contents


def _texts_as_rendered(
    texts: list[str], frames: list[str], contents: list[list[str | int]], expected: str
) -> list[str]:
    """The texts as the template writes them: unchanged, or stripped as Llama's template does; ValueError otherwise."""
    for candidates in (texts, [text.strip() for text in texts]):
        filled = ["".join(candidates[p] if isinstance(p, int) else p for p in pieces) for pieces in contents]
        joined = "".join(frame + content for frame, content in zip(frames, [*filled, ""], strict=True))
        if joined == expected:
            return candidates
    raise ValueError(
        "The chat template changes the texts of the messages in another way than stripping them, so it cannot be told "
        f"which text is the data's and which is the template's. It gives: {expected[:300]!r}"
    )
