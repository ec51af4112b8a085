"""Words that stop being true when a picture is flipped: swapped where that is certain, refused where it is not."""

from __future__ import annotations

import re
from typing import Literal

from .grounding_text import JSON_KEYS
from .special_tokens import BOX2_START, BOX_START, QUAD2_START, QUAD_START

Axis = Literal["horizontal", "vertical"]


class CannotAugment(ValueError):
    """The picture could be changed, but its text or its shapes would no longer be true of it."""


def _both_ways(pairs: dict[str, str]) -> dict[str, str]:
    return pairs | {second: first for first, second in pairs.items()}


_OPPOSITES: dict[Axis, dict[str, str]] = {
    "horizontal": _both_ways(
        {
            "left": "right",
            "leftmost": "rightmost",
            "lefthand": "righthand",
            "leftward": "rightward",
            "leftwards": "rightwards",
        }
    ),
    "vertical": _both_ways(
        {"above": "below", "top": "bottom", "topmost": "bottommost", "upper": "lower", "uppermost": "lowermost"}
    ),
}
# Words of the other axis' kind, or of a turn, whose opposite depends on the sentence.
_REFUSED: dict[Axis, str] = {
    "horizontal": r"clockwise|counterclockwise|anticlockwise|mirror\w*|east\w*|west\w*|o'clock",
    "vertical": r"clockwise|counterclockwise|anticlockwise|mirror\w*|north\w*|south\w*|o'clock|up|down|upwards?"
    r"|downwards?|over|under|beneath|underneath|overhead|upside|higher|highest|lowest|on top",
}
# "right" that is correct and "left" that is what remains or went away. Also refuses some that are directions: a flip
# that is left out costs nothing.
_NO_DIRECTION = re.compile(
    r"\bright (?:now|away|after|angles?|answer|triangle)\b"
    r"|\b(?:all|that's|that is|you're|you are|is that|is this|am i|quite) right\b"
    r"|(?<!\bor )(?<!\bthe )(?<!\byour )\bright\s*\?"
    r"|\b(?:is|are|was|were|be|been|has|have|had) (?:left|right)\b(?! of\b| and\b| or\b| side\b| to the\b| from\b|-)"
    r"|\bleft (?:over|behind|out|alone|him|her|them|it|for)\b",
    re.IGNORECASE,
)
_INNOCENT = re.compile(
    r"(?:bright|brighter|brightest|brightly|brightness|upright|copyright|copyrighted|fright\w*|cleft|wright)\Z",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]+")
_CHINESE: dict[Axis, tuple[dict[str, str], str]] = {
    # 左右 after a number is "about", and nobody says 右左.
    "horizontal": ({"左": "右", "右": "左"}, r"左右|东|西|顺时针|逆时针|镜"),
    # 上 and 下 are in countless words that mean no direction, such as 上午 and 桌子上.
    "vertical": ({}, r"[上下顶底高低南北]|顺时针|逆时针|镜"),
}
_COORDINATES = re.compile(
    "|".join(map(re.escape, (BOX_START, QUAD_START, BOX2_START, QUAD2_START, *JSON_KEYS, "data-bbox")))
    + r"|[\[(]\s*\d+(?:\.\d+)?\s*,\s*\d+(?:\.\d+)?\s*[,)\]]"
)


def refuse_written_coordinates(text: str) -> None:
    """CannotAugment for a text that holds coordinates: they would stay where they are while the picture changes.

    Example:
        >>> refuse_written_coordinates("The dog at (12, 40)")
        Traceback (most recent call last):
        CannotAugment: the text holds coordinates, '(12, 40)': write them as box parts, which follow the picture
    """
    if match := _COORDINATES.search(text):
        raise CannotAugment(
            f"the text holds coordinates, {match.group()!r}: write them as box parts, which follow the picture"
        )


def swap_directions(text: str, axis: Axis) -> str:
    """The text as it is true of the flipped picture.

    axis: "horizontal" swaps left and right (左 and 右), "vertical" above and below, top and bottom, upper and lower.

    Raises:
        CannotAugment: a word whose opposite depends on the sentence ("right now", "over", "clockwise", 左右, 上).

    Example:
        >>> swap_directions("The LEFT cup is on the upper-right shelf.", "horizontal")
        'The RIGHT cup is on the upper-left shelf.'
    """
    opposites = _OPPOSITES[axis]
    chinese, refused_chinese = _CHINESE[axis]
    refused = re.search(rf"(?<![^\W_])(?:{_REFUSED[axis]})(?![^\W_])|{refused_chinese}", text, re.IGNORECASE)
    if axis == "horizontal":
        refused = refused or _NO_DIRECTION.search(text)
    if refused:
        raise CannotAugment(
            f"cannot tell what {refused.group()!r} becomes in a picture flipped {axis}ly: {text[:80]!r}"
        )

    def swap(match: re.Match[str]) -> str:
        word = match.group()
        opposite = opposites.get(word.lower())
        if opposite is not None:
            return opposite.upper() if word.isupper() else opposite.capitalize() if word[0].isupper() else opposite
        if axis == "horizontal" and re.search("left|right", word, re.IGNORECASE) and not _INNOCENT.search(word):
            raise CannotAugment(f"cannot tell what {word!r} becomes in a picture flipped {axis}ly: {text[:80]!r}")
        return "".join(chinese.get(letter, letter) for letter in word)

    return _WORD.sub(swap, text)
