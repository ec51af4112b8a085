"""The pictures of a conversation: their parts, their sizes, and the conversation with each picture loaded, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .parts import IMAGE_KEYS, SHAPES, Part
from .pictures import PictureLimits, load_picture, picture_size

Message = dict[str, Any]
Size = tuple[int, int]  # (height, width)


def sizes_of_pictures(messages: Sequence[Message], limits: PictureLimits) -> list[Size] | None:
    """(height, width) of the pictures in a conversation; None where no shape asks for them."""
    if not has_shapes(messages):
        return None
    sources = [_source(part) for part in parts_of(messages) if is_picture(part)]
    if missing := [index for index, source in enumerate(sources) if source is None]:
        raise ValueError(
            f"picture {missing[0]} is not in the conversation, and its size decides where boxes lie: put it into its "
            f"image part, or give image_sizes"
        )
    return [picture_size(source, limits) for source in sources]


def with_loaded_pictures(messages: Sequence[Message], limits: PictureLimits) -> list[Message]:
    """The conversation with a PIL picture in every image part that names a picture."""

    def load(part: Part) -> Part:
        source = _source(part) if is_picture(part) else None
        if source is None:
            return part
        named = {key: value for key, value in part.items() if key not in (*IMAGE_KEYS, "image_url")}
        return {**named, "type": "image", "image": load_picture(source, limits)}

    return [
        {**message, "content": [load(part) for part in message["content"]]}
        if isinstance(message.get("content"), list | tuple)
        else message
        for message in messages
    ]


def _source(part: Part) -> Any:
    """What an image part holds; None for a placeholder, whose picture is given beside the conversation."""
    if part["type"] == "image_url":  # the OpenAI form
        address = part["image_url"]
        return address["url"] if isinstance(address, dict) else address
    given = [key for key in IMAGE_KEYS if part.get(key) is not None]
    if len(given) > 1:
        raise ValueError(f"an image part holds {' and '.join(given)}: give one of them")
    if not given:
        return None
    source = part[given[0]]
    if given[0] == "base64" and not source.startswith("data:"):
        return f"data:image/*;base64,{source}"
    return source


def is_picture(part: Part) -> bool:
    return part.get("type") in ("image", "image_url")


def has_shapes(messages: Sequence[Message]) -> bool:
    return any(part.get("type") in (*SHAPES, "document") for part in parts_of(messages))


def parts_of(messages: Sequence[Message]) -> list[Part]:
    contents = [message.get("content") for message in messages]
    return [part for content in contents if isinstance(content, list | tuple) for part in content]


def without_nones(part: Part) -> Part:
    return {key: value for key, value in part.items() if value is not None}
