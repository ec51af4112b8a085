"""The pictures of a row: where its paths start, and how they meet the places in the text that stand for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .example import Message
from .parts import IMAGE_KEYS, Part, shorten

PLACEHOLDER = "<image>"
_NOT_A_PATH = re.compile(r"^(https?://|file://|data:)", re.IGNORECASE)


class PictureRoot:
    """The folder that relative picture paths start from; None leaves paths as they are written.

    Example:
        >>> PictureRoot("/data")("a.png"), PictureRoot("/data")("https://x.org/a.png"), PictureRoot(None)("a.png")
        ('/data/a.png', 'https://x.org/a.png', 'a.png')
    """

    def __init__(self, root: str | Path | None):
        self.root = None if root is None else Path(root)

    def __call__(self, picture: Any) -> Any:
        """`picture` with a relative path joined to the root; of Arrow's {"bytes", "path"}, the one that is there."""
        if isinstance(picture, Mapping):
            if set(picture) - {"bytes", "path"}:
                raise ValueError(
                    f"a picture is given as {shorten(dict(picture))}; a dictionary may hold bytes and path"
                )
            picture = picture.get("path") if picture.get("bytes") is None else picture["bytes"]
        if picture is None or picture == "":
            raise ValueError("a picture is empty: its path or bytes are missing")
        if isinstance(picture, str | Path) and self.root is not None and not _NOT_A_PATH.match(str(picture)):
            return str(self.root / picture)
        return picture


def pictures_of_row(row: Mapping[str, Any], root: PictureRoot) -> list[Any]:
    """The pictures in a row's "image" or "images" column, each a single picture or a list."""
    given = [key for key in ("image", "images") if row.get(key) is not None]
    if len(given) > 1:
        raise ValueError("the row has both 'image' and 'images': put all pictures into 'images'")
    pictures = row[given[0]] if given else []
    return [root(picture) for picture in (pictures if isinstance(pictures, list | tuple) else [pictures])]


def with_pictures(
    messages: Any, pictures: list[Any], root: PictureRoot, *, placeholders_required: bool
) -> list[Message]:
    """Copies of `messages` in which every placeholder holds its picture, in order of appearance.

    A placeholder is `<image>` in a text content, or an image part that holds nothing. One line break on either side of
    `<image>` separates it from the text and is dropped: the chat template decides what stands there. Where there is no
    placeholder at all, the pictures go before the text of the first user message, as TRL does; where there is no
    picture, `<image>` is plain text. Both are errors if `placeholders_required`.

    Raises:
        ValueError: the numbers of placeholders and of pictures differ.
    """
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(f"a conversation must be a list of messages with role and content, it is {shorten(messages)}")
    contents = [_parts(message.get("content"), root, bool(pictures) or placeholders_required) for message in messages]
    empty = [part for content in contents if isinstance(content, list) for part in content if _is_placeholder(part)]
    if pictures and not empty and not placeholders_required:
        first = next((index for index, message in enumerate(messages) if message.get("role") == "user"), None)
        if first is None:
            raise ValueError(f"{len(pictures)} picture(s) but no user message to show them in")
        empty = [{"type": "image"} for _ in pictures]
        content = contents[first]
        given = content if isinstance(content, list) else [{"type": "text", "text": content}]
        contents[first] = [*empty, *given]
    if len(empty) != len(pictures):
        raise ValueError(
            f"{len(empty)} {PLACEHOLDER} but {len(pictures)} picture(s): give one placeholder per picture, in the "
            f"order of the pictures"
        )
    for part, picture in zip(empty, pictures, strict=True):
        part["image"] = picture
    return [
        {**_without_nones(message), "content": content} for message, content in zip(messages, contents, strict=True)
    ]


def _parts(content: Any, root: PictureRoot, has_placeholders: bool) -> Any:
    """A content as fresh parts; text without a placeholder stays text; Example refuses what is malformed."""
    if isinstance(content, str):
        return split_placeholders(content) if has_placeholders and PLACEHOLDER in content else content
    if not isinstance(content, list | tuple):
        return content
    return [_part(part, root) for part in content]


def _part(part: Any, root: PictureRoot) -> Any:
    if not isinstance(part, Mapping):
        return part
    part = _without_nones(part)  # Arrow gives every part the keys of all parts and fills them with None
    for key in ("image", "path"):
        if part.get("type") == "image" and key in part:
            part[key] = root(part[key])
    return part


def split_placeholders(text: str) -> list[Part]:
    """`text` cut at each `<image>` into text parts and empty image parts.

    Example:
        >>> split_placeholders("<image>\\nWhat is this?")
        [{'type': 'image'}, {'type': 'text', 'text': 'What is this?'}]
    """
    parts: list[Part] = []
    pieces = re.split(rf"\n?{PLACEHOLDER}\n?", text)
    for index, piece in enumerate(pieces):
        if index > 0:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _is_placeholder(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image" and not any(key in part for key in IMAGE_KEYS)


def _without_nones(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if value is not None}
