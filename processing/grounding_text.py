"""Shapes -> the text that a family writes; `answer_parsing.py` is the way back.

| shape | qwenvl                        | qwen2_vl                                  | qwen2_5_vl and qwen3_vl      |
|-------|-------------------------------|-------------------------------------------|------------------------------|
| box   | `<box>(x1,y1),(x2,y2)</box>`  | `<|box_start|>(x1,y1),(x2,y2)<|box_end|>` | `{"bbox_2d": [4 numbers]}`   |
| quad  | `<quad>`, 4 pairs             | `<|quad_start|>`, 4 pairs                 | `{"quad_2d": [8 numbers]}`   |
| point | `<box>(x,y)</box>`            | `<|box_start|>(x,y)<|box_end|>`           | `{"point_2d": [2 numbers]}`  |
| label | `<ref>cup</ref>` before them  | `<|object_ref_start|>` before them        | `"label"` in each object     |
| many  | one after the other           | one after the other                       | a list of objects            |

The box forms and "point_2d" are the models' own. They have no form for a quad in JSON, nor for a point in tags: these
are ours, so a model writes them only after training on them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from .coordinates import Convention, Frame, Shape
from .coordinates import to_model as corners_for_model
from .special_tokens import (
    BOX2_END,
    BOX2_START,
    BOX_END,
    BOX_START,
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
