"""The pictures and videos of a row: where their paths start, and how they meet the places that stand for them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .example import Message
from .parts import IMAGE_KEYS, VIDEO_KEYS, Part, shorten

PLACEHOLDER = "<image>"
PLACEHOLDERS = {"image": PLACEHOLDER, "video": "<video>"}
_KEYS = {"image": IMAGE_KEYS, "video": VIDEO_KEYS}
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


def videos_of_row(row: Mapping[str, Any], root: PictureRoot) -> list[Any]:
    """The videos in a row's "video" column, one, or in its "videos" column, a list; a list in the place of a video is
    a list of its frames."""
    if row.get("video") is not None and row.get("videos") is not None:
        raise ValueError("the row has both 'video' and 'videos': put all videos into 'videos'")
    videos = [row["video"]] if row.get("video") is not None else row.get("videos") or []
    if not isinstance(videos, list | tuple):
        raise ValueError(f"videos must be a list of videos, it is {shorten(videos)}; a single one goes into 'video'")
    return [rooted_video(video, root) for video in videos]


def rooted_video(video: Any, root: PictureRoot) -> Any:
    return [root(frame) for frame in video] if isinstance(video, list | tuple) else root(video)


def with_pictures(
    messages: Any,
    pictures: list[Any],
    root: PictureRoot,
    *,
    placeholders_required: bool,
    videos: list[Any] | None = None,
) -> list[Message]:
    """Copies of `messages` in which every placeholder holds its picture or video, in order of appearance.

    A placeholder is `<image>` or `<video>` in a text content, or an image or video part that holds nothing. One line
    break on either side separates it from the text and is dropped: the chat template decides what stands there. Where
    there is no placeholder at all, pictures, then videos, go before the text of the first user message, as TRL does;
    where there is no picture (or video), `<image>` (or `<video>`) is plain text. Both are errors if
    `placeholders_required`, but for `<video>` in rows without a video.

    Raises:
        ValueError: the numbers of placeholders and of pictures or videos differ.
    """
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(f"a conversation must be a list of messages with role and content, it is {shorten(messages)}")
    given = {"image": pictures, "video": videos or []}
    read = [kind for kind in PLACEHOLDERS if given[kind] or (placeholders_required and kind == "image")]
    contents = [_parts(message.get("content"), root, read) for message in messages]
    for kind in ("video", "image"):  # whatever comes last goes first
        _fill(kind, given[kind], contents, messages, placeholders_required)
    return [
        {**_without_nones(message), "content": content} for message, content in zip(messages, contents, strict=True)
    ]


def _fill(kind: str, sources: list[Any], contents: list[Any], messages: Any, placeholders_required: bool) -> None:
    """Puts the pictures or videos into the empty parts of `contents`."""
    parts = [part for content in contents if isinstance(content, list) for part in content]
    empty = [part for part in parts if _is_placeholder(part, kind)]
    if sources and not empty and not placeholders_required:
        first = next((index for index, message in enumerate(messages) if message.get("role") == "user"), None)
        if first is None:
            raise ValueError(f"{len(sources)} {_PLURALS[kind]} but no user message to show them in")
        empty = [{"type": kind} for _ in sources]
        content = contents[first]
        given = content if isinstance(content, list) else [{"type": "text", "text": content}]
        contents[first] = [*empty, *given]
    if len(empty) != len(sources):
        raise ValueError(
            f"{len(empty)} {PLACEHOLDERS[kind]} but {len(sources)} {_PLURALS[kind]}: give one placeholder per {kind}, "
            f"in their order"
        )
    for part, source in zip(empty, sources, strict=True):
        part[kind] = source


_PLURALS = {"image": "picture(s)", "video": "video(s)"}


def _parts(content: Any, root: PictureRoot, kinds: list[str]) -> Any:
    """A content as fresh parts; text without a placeholder stays text; Example refuses what is malformed."""
    if isinstance(content, str):
        holds = any(PLACEHOLDERS[kind] in content for kind in kinds)
        return split_placeholders(content, kinds) if holds else content
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
    for key in ("video", "path"):
        if part.get("type") == "video" and key in part:
            part[key] = rooted_video(part[key], root)
    return part


def split_placeholders(text: str, kinds: Sequence[str] = ("image",)) -> list[Part]:
    """`text` cut at each `<image>` (and `<video>`, if among the kinds) into text parts and empty parts of that kind.

    Example:
        >>> split_placeholders("<image>\\nWhat is this?")
        [{'type': 'image'}, {'type': 'text', 'text': 'What is this?'}]
    """
    parts: list[Part] = []
    for index, piece in enumerate(re.split(rf"\n?<({'|'.join(kinds)})>\n?", text)):
        if index % 2:
            parts.append({"type": piece})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _is_placeholder(part: Any, kind: str) -> bool:
    return isinstance(part, dict) and part.get("type") == kind and not any(key in part for key in _KEYS[kind])


def _without_nones(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if value is not None}
