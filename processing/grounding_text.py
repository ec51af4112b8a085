"""Shapes -> the text that a family writes, and a model's answer -> shapes, with a report of whatever is malformed.

| shape | qwenvl                        | qwen2_vl                                  | qwen2_5_vl and qwen3_vl      |
|-------|-------------------------------|-------------------------------------------|------------------------------|
| box   | `<box>(x1,y1),(x2,y2)</box>`  | `<|box_start|>(x1,y1),(x2,y2)<|box_end|>` | `{"bbox_2d": [4 numbers]}`   |
| quad  | `<quad>`, 4 pairs             | `<|quad_start|>`, 4 pairs                 | `{"quad_2d": [8 numbers]}`   |
| point | `<box>(x,y)</box>`            | `<|box_start|>(x,y)<|box_end|>`           | `{"point_2d": [2 numbers]}`  |
| label | `<ref>cup</ref>` before them  | `<|object_ref_start|>` before them        | `"label"` in each object     |
| many  | one after the other           | one after the other                       | a list of objects            |

The box forms and "point_2d" are the models' own. They have no form for a quad in JSON, nor for a point in tags: these
are ours, so a model writes them only after training on them.

Parsing takes time linear in the length of the text, whatever the text is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .coordinates import NUM_CORNERS, Convention, Frame, Outside, Pair, Shape, clip_numbers, from_model, make_shape
from .coordinates import to_model as corners_for_model
from .special_tokens import (
    BOX2_END,
    BOX2_START,
    BOX_END,
    BOX_START,
    ENDOFTEXT,
    IM_END,
    OBJECT_REF_END,
    OBJECT_REF_START,
    QUAD2_END,
    QUAD2_START,
    QUAD_END,
    QUAD_START,
    QWEN2_VL_SPECIAL_TOKENS,
    QWEN_VL_SPECIAL_TOKENS,
    REF_END,
    REF_START,
)


@dataclass(frozen=True)
class Problem:
    """A piece of an answer that could not be read as it stands: its first 80 characters, where it starts, and why."""

    piece: str
    start: int
    reason: str


@dataclass(frozen=True)
class ParsedAnswer:
    """What an answer says.

    shapes: in pixels of the original picture, in order of appearance.
    problems: everything that looked like a shape and was not one, or was clipped; nothing is dropped silently.
    text: the answer without tags, JSON shapes and end tokens; a label between tags stays, it is part of the sentence.
    """

    shapes: tuple[Shape, ...]
    problems: tuple[Problem, ...]
    text: str


@dataclass(frozen=True)
class Tags:
    """The tokens, (start, end), around the parts of a marked place."""

    ref: tuple[str, str]
    box: tuple[str, str]
    quad: tuple[str, str]
    reserved: tuple[str, ...]  # what a label must not hold: it would be read as a token

    def around(self, kind: str) -> tuple[str, str]:
        return self.quad if kind == "quad" else self.box


TAGS = {
    "tags": Tags((REF_START, REF_END), (BOX_START, BOX_END), (QUAD_START, QUAD_END), QWEN_VL_SPECIAL_TOKENS),
    "special_tokens": Tags(
        (OBJECT_REF_START, OBJECT_REF_END),
        (BOX2_START, BOX2_END),
        (QUAD2_START, QUAD2_END),
        QWEN2_VL_SPECIAL_TOKENS,
    ),
}
JSON_KEYS = {"bbox_2d": "box", "quad_2d": "quad", "point_2d": "point"}
# Qwen2.5-VL and Qwen3-VL write the text they read in a picture under "text_content".
LABEL_KEYS = ("label", "text_content")


def render_shapes(shapes: Sequence[Shape], frames: Sequence[Frame], convention: Convention) -> str:
    """The text for shapes that follow each other, as the model of this convention writes it.

    frames: one per picture of the conversation; `shape.image_index` points into it. In tags, neighbours with the same
        label share one ref.

    Raises:
        ValueError: a shape outside its picture; in tags, a label that holds a special token of the vocabulary, or a
            shape without a label right after one with a label.

    Example:
        >>> frame = Frame(height=600, width=800, model_height=588, model_width=812)
        >>> cups = [Box(80, 60, 160, 120, label="cup"), Box(400, 300, 480, 360, label="cup")]
        >>> render_shapes(cups, [frame], CONVENTIONS["qwenvl"])
        '<ref>cup</ref><box>(100,100),(200,200)</box><box>(500,500),(600,600)</box>'
        >>> render_shapes(cups[:1], [frame], CONVENTIONS["qwen2_5_vl"])
        '[{"bbox_2d": [81, 59, 162, 118], "label": "cup"}]'
    """
    placed = [(shape, corners_for_model(shape, frames[shape.image_index], convention)) for shape in shapes]
    if convention.text == "json":
        keys = {kind: key for key, kind in JSON_KEYS.items()}
        objects = []
        for shape, corners in placed:
            label = {} if shape.label is None else {"label": shape.label}
            objects.append({keys[shape.kind]: [number for corner in corners for number in corner], **label})
        return json.dumps(objects, ensure_ascii=False)
    tags = TAGS[convention.text]
    pieces = []
    last_label: str | None = None
    for shape, corners in placed:
        if shape.label is None and last_label is not None:
            raise ValueError(
                f"a {shape.kind} without a label right after the label {last_label!r} would be read as one more of "
                f"it: give it a label, or put text between them"
            )
        if shape.label is not None and shape.label != last_label:
            pieces.append(render_ref(shape.label, convention))
        last_label = shape.label
        start, end = tags.around(shape.kind)
        pieces.append(start + ",".join(f"({x},{y})" for x, y in corners) + end)
    return "".join(pieces)


def render_ref(phrase: str, convention: Convention) -> str:
    """A phrase marked as the name of something to find; plain text where the family has no such mark.

    Example:
        >>> render_ref("the ear on a giraffe", CONVENTIONS["qwenvl"])
        '<ref>the ear on a giraffe</ref>'
    """
    if convention.text == "json":
        return phrase
    tags = TAGS[convention.text]
    if held := [token for token in tags.reserved if token in phrase]:
        raise ValueError(
            f"the label {phrase!r} holds {held[0]!r}, which would be read as a special token: take it out"
        )
    return tags.ref[0] + phrase + tags.ref[1]


def parse_shapes(
    text: str,
    frames: Sequence[Frame],
    convention: Convention,
    *,
    image_index: int | None = None,
    outside: Outside = "refuse",
) -> ParsedAnswer:
    """The shapes of an answer in pixels of the original picture.

    Args:
        text: what the model wrote, decoded with `skip_special_tokens=False`: tags are special tokens.
        frames: one per picture of the conversation; without any, every shape is a problem.
        image_index: the picture that the answer is about; the last one by default. No family writes it into the text.
        outside: "refuse" reports a shape with a number out of range and leaves it out; "clip" moves it into range,
            keeps it, and reports it all the same.

    Raises:
        ValueError: no such picture.

    Example:
        >>> frame = Frame(height=600, width=800, model_height=588, model_width=812)
        >>> parse_shapes("A <ref>cup</ref><box>(100,100),(200,200)</box>.<box>(1,2", [frame], CONVENTIONS["qwenvl"])
        ParsedAnswer(shapes=(Box(x1=80.0, y1=60.0, x2=160.0, y2=120.0, label='cup', image_index=0),),
        problems=(Problem(piece='<box>(1,2', start=47, reason='<box> is not closed'),), text='A cup.(1,2')
    """
    index = max(len(frames) - 1, 0) if image_index is None else image_index
    if not 0 <= index < max(len(frames), 1):
        raise ValueError(f"the answer is about picture {index}, but the conversation has {len(frames)} picture(s)")
    reader = _Reader(frames[index] if frames else None, index, convention, outside)
    plain = reader.read_json(text) if convention.text == "json" else reader.read_tags(text, TAGS[convention.text])
    for token in (IM_END, ENDOFTEXT):
        plain = plain.replace(token, "")
    return ParsedAnswer(tuple(reader.shapes), tuple(sorted(reader.problems, key=lambda p: p.start)), plain.strip())


_NUMBER = r"-?[0-9]{1,9}(?:\.[0-9]{1,9})?"
_PAIR = re.compile(rf"\s*\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\)\s*")
_TWO_BARE_PAIRS = re.compile(r"\([0-9]{1,4},[0-9]{1,4}\),\([0-9]{1,4},[0-9]{1,4}\)")
# An object without objects in it. Possessive (+) and with disjoint alternatives: a failed attempt never goes back, and
# fails at the next "{" outside a string, so all attempts together stay linear.
_FLAT_OBJECT = re.compile(r'\{(?:[^{}"\\]|"(?:[^"\\]|\\.)*+")*+\}', re.DOTALL)
_JSON_KEY = re.compile("|".join(JSON_KEYS))
# (how it may begin, how it may end): a list, then the code fence around the list.
_AROUND_OBJECTS = (
    (("[",), re.compile(r"\s*,?\s*\]?")),
    (("```", "```json"), re.compile(r"\s*(?:```)?")),
)


class _Reader:
    """Collects the shapes and problems of one answer."""

    def __init__(self, frame: Frame | None, image_index: int, convention: Convention, outside: Outside):
        self.frame, self.image_index, self.convention, self.outside = frame, image_index, convention, outside
        self.shapes: list[Shape] = []
        self.problems: list[Problem] = []

    def report(self, piece: str, start: int, reason: str) -> None:
        self.problems.append(Problem(piece if len(piece) <= 80 else piece[:77] + "...", start, reason))

    def add(self, kind: str, corners: Sequence[Pair], label: str | None, piece: str, start: int) -> None:
        if len(corners) != NUM_CORNERS[kind]:
            self.report(piece, start, f"a {kind} has {NUM_CORNERS[kind]} corner(s), not {len(corners)}")
            return
        if kind == "box" and (corners[0][0] > corners[1][0] or corners[0][1] > corners[1][1]):
            self.report(piece, start, "the second corner lies left of or above the first")
            return
        if self.frame is None:
            self.report(piece, start, "the conversation has no picture that it could lie in")
            return
        try:
            pixels = from_model(corners, self.frame, self.convention)
        except ValueError as error:
            if self.outside == "refuse":
                self.report(piece, start, str(error))
                return
            self.report(piece, start, f"{error}: clipped")
            pixels = from_model(clip_numbers(corners, self.frame, self.convention), self.frame, self.convention)
        numbers = [value for corner in pixels for value in corner]
        self.shapes.append(make_shape(kind, numbers, label, self.image_index))

    # Tags: the text is cut at every tag; a tag and the piece after it are looked at in order.

    def read_tags(self, text: str, tags: Tags) -> str:
        opening = {tags.ref[0]: "ref", tags.box[0]: "box", tags.quad[0]: "quad"}
        closing = {tags.ref[0]: tags.ref[1], tags.box[0]: tags.box[1], tags.quad[0]: tags.quad[1]}
        cuts = list(re.finditer("|".join(map(re.escape, [*closing, *closing.values()])), text))
        borders = [*(cut.start() for cut in cuts), len(text)]
        kept = [self._free_text(text, 0, borders[0])]
        label: str | None = None
        closed_by_pair = -1  # index of the closing tag that belongs to the pair just read
        for number, (cut, end) in enumerate(zip(cuts, borders[1:], strict=True)):
            tag, inner = cut.group(), text[cut.end() : end]
            if tag in closing:
                if number + 1 == len(cuts) or cuts[number + 1].group() != closing[tag]:
                    self.report(text[cut.start() : end], cut.start(), f"{tag} is not closed")
                    kept.append(inner)
                    label = None
                    continue
                closed_by_pair = number + 1
                if opening[tag] == "ref":
                    label = inner.strip()
                    kept.append(inner)
                else:
                    piece = text[cut.start() : cuts[number + 1].end()]
                    self._read_pairs(opening[tag], inner, label, piece, cut.start())
            else:
                if number != closed_by_pair:
                    self.report(text[cut.start() : end], cut.start(), f"{tag} closes nothing")
                    label = None
                # A label belongs to the boxes that follow it, also after a blank, until there is other text.
                if inner.strip():
                    label = None
                kept.append(self._free_text(text, cut.end(), end))
        return "".join(kept)

    def _free_text(self, text: str, start: int, end: int) -> str:
        for match in _TWO_BARE_PAIRS.finditer(text, start, end):
            reason = "a box without its tags: was the answer decoded with skip_special_tokens=True?"
            self.report(match.group(), match.start(), reason)
        return text[start:end]

    def _read_pairs(self, kind: str, inner: str, label: str | None, piece: str, start: int) -> None:
        corners: list[Pair] = []
        position = 0
        while match := _PAIR.match(inner, position):
            corners.append((float(match.group(1)), float(match.group(2))))
            position = match.end()
            if position == len(inner):
                one_corner = kind == "box" and len(corners) == 1
                self.add("point" if one_corner else kind, corners, label, piece, start)
                return
            if inner[position] != ",":
                break
            position += 1
        self.report(piece, start, f"cannot read {inner[position : position + 20]!r} as (x,y)")

    # JSON: every flat object that holds one of our keys, wherever it stands (list, fence, wrapper, prose).

    def read_json(self, text: str) -> str:
        spans: list[tuple[int, int]] = []
        for match in _FLAT_OBJECT.finditer(text):
            if _JSON_KEY.search(match.group()):
                spans.append(match.span())
                self._read_object(match.group(), match.start())
        next_span = 0
        for key in _JSON_KEY.finditer(text):
            while next_span < len(spans) and spans[next_span][1] <= key.start():
                next_span += 1
            if next_span == len(spans) or key.start() < spans[next_span][0]:
                brace = text.rfind("{", max(0, key.start() - 80), key.start())
                start = key.start() if brace < 0 else brace
                self.report(text[start : key.end() + 80], start, "not a complete JSON object: was the answer cut?")
        return _without(text, spans)

    def _read_object(self, piece: str, start: int) -> None:
        try:
            value: dict[str, Any] = json.loads(piece)
        except (json.JSONDecodeError, RecursionError) as error:  # RecursionError: [[[[...
            self.report(piece, start, f"not JSON: {error}")
            return
        keys = [key for key in JSON_KEYS if key in value]
        if len(keys) != 1:
            self.report(piece, start, f"an object must have one of {', '.join(JSON_KEYS)}, this one has {len(keys)}")
            return
        label = next((value[key] for key in LABEL_KEYS if key in value), None)
        if not isinstance(label, str | None):
            self.report(piece, start, f"the label is {label!r}, not a text")
            return
        numbers = value[keys[0]]
        several = isinstance(numbers, list) and bool(numbers) and all(isinstance(item, list) for item in numbers)
        for shape in numbers if several else [numbers]:
            if not isinstance(shape, list) or not all(type(number) in (int, float) for number in shape):
                self.report(piece, start, f"{keys[0]} must be a list of numbers")
            elif len(shape) % 2:
                self.report(piece, start, f"{keys[0]} has {len(shape)} numbers, which are not pairs")
            else:
                self.add(JSON_KEYS[keys[0]], list(zip(shape[::2], shape[1::2], strict=True)), label, piece, start)


def _without(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """`text` without the objects at `spans`, the commas between them, and the list and code fence around them."""
    runs: list[tuple[int, int]] = []
    for start, end in spans:
        if runs and not text[runs[-1][1] : start].strip(" \t\r\n,"):
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    kept = []
    position = 0
    for start, end in runs:
        before, position = text[position:start], end
        for openings, closing in _AROUND_OBJECTS:
            stripped = before.rstrip()
            if stripped.endswith(openings):
                before = stripped[: stripped.rindex(openings[0])]
                match = closing.match(text, position)
                assert match is not None, "every part of the pattern is optional"
                position = match.end()
        kept.append(before)
    return "".join([*kept, text[position:]])
