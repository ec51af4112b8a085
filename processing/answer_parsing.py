"""A model's answer -> shapes in original pixels, with a report of whatever is malformed (forms: grounding_text.py).

Of the JSON families, `<points x1=".." y1="..">..</points>` is read too, which Qwen2.5-VL writes when it is asked for
points without a form. Parsing takes time linear in the length of the text, whatever the text is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from .coordinates import NUM_CORNERS, Convention, Frame, Outside, Pair, Shape, clip_numbers, from_model, make_shape
from .grounding_text import JSON_KEYS, TAGS, ParsedAnswer, Problem, Tags
from .special_tokens import ENDOFTEXT, IM_END

# Qwen2.5-VL and Qwen3-VL write the text they read in a picture under "text_content".
LABEL_KEYS = ("label", "text_content")


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
# An object without objects in it, or the element that Qwen2.5-VL writes for points. Possessive (+) and with disjoint
# alternatives: a failed attempt never goes back, and fails at the next "{" outside a string (the next "<"), so all
# attempts together stay linear.
_OBJECT_OR_POINTS = re.compile(
    r'(?P<object>\{(?:[^{}"\\]|"(?:[^"\\]|\\.)*+")*+\})|<points\s(?P<places>[^<>]*+)>(?P<label>[^<>]*+)</points>',
    re.DOTALL,
)
_PLACE = re.compile(rf'([xy])([0-9]{{0,4}})\s*=\s*"({_NUMBER})"')
_KEY = re.compile("|".join((*JSON_KEYS, "<points")))
# (how it may begin, how it may end): a list, then the code fence around the list.
_AROUND_OBJECTS = (
    (("[",), re.compile(r"\s*,?\s*\]?")),
    (("```", "```json", "```xml"), re.compile(r"\s*(?:```)?")),
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
        for match in _OBJECT_OR_POINTS.finditer(text):
            if _KEY.search(match.group()):
                spans.append(match.span())
                if match["object"] is not None:
                    self._read_object(match.group(), match.start())
                else:
                    self._read_points(match["places"], match["label"], match.group(), match.start())
        next_span = 0
        for key in _KEY.finditer(text):
            while next_span < len(spans) and spans[next_span][1] <= key.start():
                next_span += 1
            if next_span == len(spans) or key.start() < spans[next_span][0]:
                brace = text.rfind("{", max(0, key.start() - 80), key.start())
                start = key.start() if brace < 0 or key.group().startswith("<") else brace
                self.report(text[start : key.end() + 80], start, "not complete: was the answer cut?")
        return _without(text, spans)

    def _read_points(self, places: str, label: str, piece: str, start: int) -> None:
        found = _PLACE.findall(places)
        axes = [(axis, number) for axis, number, _ in found]
        if not found or axes != [(axis, number) for _, number in axes[::2] for axis in "xy"]:
            self.report(piece, start, 'points are pairs such as x1="1" y1="2"')
            return
        values = [float(value) for _, _, value in found]
        for corner in zip(values[::2], values[1::2], strict=True):
            self.add("point", [corner], label.strip() or None, piece, start)

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
