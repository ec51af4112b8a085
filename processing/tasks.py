"""The seven tasks of stage 2 and pure text: typed fields -> Example in the "plain" style (Qwen-VL, appendix B.1).

| task                   | prompt, no loss; `<img>p</img>` before it           | answer, loss; then `<|endoftext|>` |
|------------------------|-----------------------------------------------------|------------------------------------|
| caption                | `Generate the caption in English:`                  | ` the beautiful flowers`           |
| vqa                    | ` What color is it? Answer:`                        | ` Red`                             |
| ocr_vqa                | ` What is the title of this book? Answer:`          | ` Asi Se Dice!`                    |
| caption_with_grounding | `Generate the caption in English with grounding:`   | ` Shot of <ref>bees</ref><box>..`  |
| referring_grounding    | `<ref>the ear on a giraffe</ref>`                   | `<box>(176,106),(232,160)</box>`   |
| grounded_captioning    | `<ref>This</ref><box>(360,542),(476,705)</box> is`  | ` Yellow gloves`                   |
| ocr_with_quads         | `OCR with grounding:`                               | ` <ref>It is</ref> <quad>(568,..`  |
| pure_text              | nothing, no picture either                          | the text                           |

The English prompts are the paper's. Its Chinese ones are not known to us: those here are ours.

What cannot be told from the printed appendix is a setting (`Settings`): whether the blank between prompt and answer is
trained (the prompts of the original's evaluation end in `Answer:` without a blank, so here the answer begins with it),
whether a blank follows `</img>` in the VQA tasks, and what stands between two lines of OCR.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, Literal

from .example import Example
from .parts import Part, refuse_unknown_keys, shorten

Language = Literal["en", "zh"]

PROMPTS: dict[str, dict[str, str]] = {
    "caption": {"en": "Generate the caption in English:", "zh": "用中文生成图片描述："},
    "vqa": {"en": "{question} Answer:", "zh": "{question}回答："},
    "caption_with_grounding": {
        "en": "Generate the caption in English with grounding:",
        "zh": "用中文生成带定位的图片描述：",
    },
    "grounded_captioning": {"en": " is", "zh": "是"},
    "ocr_with_quads": {"en": "OCR with grounding:", "zh": "带定位的文字识别："},
}
_POINTED_AT = {"en": "This", "zh": "这"}  # the phrase in front of the box of grounded captioning


@dataclass(frozen=True)
class Settings:
    """What the paper leaves open.

    blank_in: "answer": the blank between prompt and answer is the answer's first character, and trained; "prompt": it
        ends the prompt. Chinese has no blank there.
    blank_after_picture: a blank between `</img>` and the question of vqa and ocr_vqa, in English.
    blank_before_quad: a blank between `</ref>` and `<quad>`, as printed. Without it, the line is the quad's label.
    between_lines: text between two lines of ocr_with_quads.
    """

    blank_in: Literal["answer", "prompt"] = "answer"
    blank_after_picture: bool = True
    blank_before_quad: bool = True
    between_lines: str = ""

    def __post_init__(self) -> None:
        if self.blank_in not in ("answer", "prompt"):
            raise ValueError(f"blank_in is {self.blank_in!r}, it must be 'answer' or 'prompt'")


PAPER = Settings()


def caption(image: Any, text: str, language: Language = "en", settings: Settings = PAPER) -> Example:
    """Describe the picture.

    Example:
        >>> prompt, answer = caption("a.png", "a dog").messages
        >>> prompt["content"][1]["text"] + "|" + answer["content"][0]["text"]
        'Generate the caption in English:| a dog'
    """
    return _example("caption", image, [_text(_prompt("caption", language))], [_text(text)], language, settings)


def vqa(image: Any, question: str, answer: str, language: Language = "en", settings: Settings = PAPER) -> Example:
    """Answer a question about the picture."""
    return _vqa("vqa", image, question, answer, language, settings)


def ocr_vqa(image: Any, question: str, answer: str, language: Language = "en", settings: Settings = PAPER) -> Example:
    """Answer a question about the writing in the picture: the prompt of vqa, counted and mixed as its own task."""
    return _vqa("ocr_vqa", image, question, answer, language, settings)


def _vqa(task: str, image: Any, question: str, answer: str, language: Language, settings: Settings) -> Example:
    blank = " " if settings.blank_after_picture and language == "en" else ""
    prompt = blank + _prompt("vqa", language).format(question=_checked("question", question))
    return _example(task, image, [_text(prompt)], [_text(_checked("answer", answer))], language, settings)


def caption_with_grounding(
    image: Any,
    pieces: Sequence[str | Mapping[str, Any]],
    language: Language = "en",
    normalized: int | None = None,
    settings: Settings = PAPER,
) -> Example:
    """Describe the picture and say where things are.

    pieces: the caption in order, text as str, and `{"label": phrase, "bbox": [x1, y1, x2, y2] or a list of them}`.
    normalized: units of the boxes, see parts.py.
    """
    answer: list[Part] = []
    for piece in _list_of("pieces", pieces):
        if isinstance(piece, str):
            answer.append(_text(piece))
        else:
            answer.append(_shape("box", _fields("pieces", piece, ("label", "bbox")), normalized))
    prompt = [_text(_prompt("caption_with_grounding", language))]
    return _example("caption_with_grounding", image, prompt, answer, language, settings)


def referring_grounding(
    image: Any, phrase: str, bbox: Sequence[Any], normalized: int | None = None, settings: Settings = PAPER
) -> Example:
    """Find what a phrase means: one box, or a list of them. The phrase may be in any language."""
    prompt = [{"type": "ref", "text": _checked("phrase", phrase)}]
    return _example("referring_grounding", image, prompt, [_shape("box", {"bbox": bbox}, normalized)], None, settings)


def grounded_captioning(
    image: Any,
    bbox: Sequence[Any],
    phrase: str,
    language: Language = "en",
    normalized: int | None = None,
    settings: Settings = PAPER,
) -> Example:
    """Say what is in a box."""
    after = _prompt("grounded_captioning", language)
    prompt = [_shape("box", {"label": _POINTED_AT[language], "bbox": bbox}, normalized), _text(after)]
    return _example("grounded_captioning", image, prompt, [_text(_checked("phrase", phrase))], language, settings)


def ocr_with_quads(
    image: Any,
    lines: Sequence[Mapping[str, Any]],
    language: Language = "en",
    normalized: int | None = None,
    settings: Settings = PAPER,
) -> Example:
    """Read every line and say where it stands.

    lines: `{"text": "It is managed", "quad": [x1, y1, ..., x4, y4]}`, in reading order.
    """
    answer: list[Part] = []
    for number, line in enumerate(_list_of("lines", lines)):
        fields = _fields("lines", line, ("text", "quad"))
        if number > 0 and settings.between_lines:
            answer.append(_text(settings.between_lines))
        if settings.blank_before_quad:
            answer += [{"type": "ref", "text": fields["text"]}, _text(" ")]
            answer.append(_shape("quad", {"quad": fields["quad"]}, normalized))
        else:
            answer.append(_shape("quad", {"label": fields["text"], "quad": fields["quad"]}, normalized))
    prompt = [_text(_prompt("ocr_with_quads", language))]
    return _example("ocr_with_quads", image, prompt, answer, language, settings)


def pure_text(text: str) -> Example:
    """Text alone, all of it trained, as the language model was: it keeps what the language model can do."""
    messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": _checked("text", text)}]
    return Example(messages, style="plain", task="pure_text")


TASKS: dict[str, Callable[..., Example]] = {
    "caption": caption,
    "vqa": vqa,
    "ocr_vqa": ocr_vqa,
    "caption_with_grounding": caption_with_grounding,
    "referring_grounding": referring_grounding,
    "grounded_captioning": grounded_captioning,
    "ocr_with_quads": ocr_with_quads,
    "pure_text": pure_text,
}


def fields_of(task: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The fields that a task needs, and those it may have.

    Example:
        >>> fields_of("vqa")
        (('image', 'question', 'answer'), ('language',))
    """
    parameters = [p for p in signature(TASKS[task]).parameters.values() if p.name != "settings"]
    needed = tuple(p.name for p in parameters if p.default is Parameter.empty)
    return needed, tuple(p.name for p in parameters if p.default is not Parameter.empty)


def _prompt(task: str, language: str) -> str:
    if not isinstance(language, str) or language not in PROMPTS[task]:
        raise ValueError(f"language is {language!r}, {task} has prompts in {', '.join(PROMPTS[task])}")
    return PROMPTS[task][language]


def _example(
    task: str, image: Any, prompt: list[Part], answer: list[Part], language: Language | None, settings: Settings
) -> Example:
    """language None: nothing stands between prompt and answer."""
    if language == "en":
        (answer.insert(0, _text(" ")) if settings.blank_in == "answer" else prompt.append(_text(" ")))
    messages = [
        {"role": "user", "content": _joined([{"type": "image", "image": image}, *prompt])},
        {"role": "assistant", "content": _joined(answer)},
    ]
    return Example(messages, style="plain", task=task)


def _joined(parts: list[Part]) -> list[Part]:
    """Neighbouring texts as one, so that they are tokenized together."""
    joined: list[Part] = []
    for part in parts:
        if joined and part["type"] == joined[-1]["type"] == "text":
            joined[-1] = _text(joined[-1]["text"] + part["text"])
        else:
            joined.append(part)
    return joined


def _text(text: str) -> Part:
    return {"type": "text", "text": _checked("text", text)}


def _shape(kind: str, fields: dict[str, Any], normalized: int | None) -> Part:
    return {"type": kind, **fields} if normalized is None else {"type": kind, **fields, "normalized": normalized}


def _checked(name: str, text: Any) -> str:
    if not isinstance(text, str) or not text:
        raise ValueError(f"{name} must be text that is not empty, it is {shorten(text)}")
    return text


def _list_of(name: str, items: Any) -> Sequence[Any]:
    if not isinstance(items, list | tuple) or not items:
        raise ValueError(f"{name} must be a list that is not empty, it is {shorten(items)}")
    return items


def _fields(name: str, item: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise ValueError(f"{name} may hold dictionaries with {' and '.join(keys)}, this is {shorten(item)}")
    refuse_unknown_keys(item, keys, f"an item of {name}")
    if missing := [key for key in keys if item.get(key) is None]:
        raise ValueError(f"an item of {name} needs {' and '.join(missing)}, it is {shorten(dict(item))}")
    return dict(item)
