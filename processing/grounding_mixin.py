"""GroundingMixin: what makes a processor read boxes in original pixels and give them back in original pixels.

Box parts become the text that the family expects, before the chat template is applied; an answer becomes shapes in
pixels of the original picture again. The convention is written into processor_config.json, where plain transformers
leaves it alone, and a folder that names another one is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from transformers.utils.chat_template_utils import mark_control_tokens

from .answer_parsing import parse_shapes
from .conversation_pictures import (
    has_shapes,
    is_picture,
    parts_of,
    sizes_of_pictures,
    with_loaded_pictures,
    without_nones,
)
from .coordinates import Convention, Frame, Outside, Shape, fit, make_shape
from .document_boxes import document_for_model
from .grounding_text import ParsedAnswer, render_ref, render_shapes
from .parts import PART_KEYS, SHAPES, Part, check_part, shapes_of
from .pictures import ANYTHING, PictureLimits

Message = dict[str, Any]
Size = tuple[int, int]  # (height, width)

# transformers' own part types: passed on to the template, which knows them.
_PASSED_ON = {"text", "image", "image_url", "video", "audio"}
_MARKED_KEYS = ("content", "text", "label", "html")


class GroundingMixin:
    """Goes before transformers' class: `class QwenVLProcessor(GroundingMixin, ProcessorMixin)`.

    The subclass sets `convention` and says in `model_size` at which size the model sees a picture; the rest follows.
    """

    convention: ClassVar[Convention]

    def model_size(self, height: int, width: int) -> Size:
        """(height, width) of a picture of `height` x `width` as the model sees it, in pixels.

        Raises:
            ValueError: the picture cannot be shown to the model.
        """
        raise NotImplementedError(f"{type(self).__name__} must say at which size the model sees a picture")

    def frames(self, image_sizes: Sequence[Size]) -> list[Frame]:
        """The sizes (height, width) of original pictures together with the sizes that the model sees."""
        frames = []
        for index, (height, width) in enumerate(image_sizes):
            try:
                frames.append(Frame(height, width, *self.model_size(height, width)))
            except ValueError as error:
                raise ValueError(f"picture {index} of the conversation: {error}") from error
        return frames

    def render_conversation(
        self,
        messages: Sequence[Message],
        image_sizes: Sequence[Size] | None,
        *,
        outside: Outside = "refuse",
        counts: Counter[str] | None = None,
    ) -> list[Message]:
        """A copy of the conversation in which box, quad, point, ref and document parts have become text parts.

        Shape parts that follow each other directly become one text, so that JSON stays one list. Everything else stays
        as it is, but for keys that hold None, which Arrow adds and chat templates misread as pictures.

        Args:
            image_sizes: (height, width) of the original pictures, in order of appearance; None is enough where the
                conversation has no shapes.
            outside: "refuse" or "clip" shapes that leave their picture, see `coordinates.fit`.
            counts: told how many "shapes" there were, and how many were "clipped".

        Raises:
            ValueError: a malformed part, a shape without a picture or outside it; with message and part number.

        Example:
            >>> box = {"type": "box", "bbox": [80, 60, 160, 120], "label": "cup"}
            >>> processor.render_conversation([{"role": "user", "content": [{"type": "image"}, box]}], [(600, 800)])
            [{'role': 'user', 'content': [{'type': 'image'},
             {'type': 'text', 'text': '<ref>cup</ref><box>(100,100),(200,200)</box>'}]}]
        """
        num_pictures = sum(map(is_picture, parts_of(messages)))
        if image_sizes is None:
            if has_shapes(messages):
                raise ValueError(
                    "the conversation has shapes: give image_sizes, (height, width) of each original picture"
                )
            frames = []
        elif num_pictures != len(image_sizes):
            raise ValueError(
                f"the conversation has {num_pictures} picture(s), but {len(image_sizes)} sizes were given"
            )
        else:
            frames = self.frames(image_sizes)
        rendered: list[Message] = []
        num_before = 0
        for number, message in enumerate(messages):
            content = message.get("content")
            if isinstance(content, list | tuple):
                parts = [without_nones(part) for part in content]
                content = self._render_parts(parts, f"message {number}", frames, num_before, outside, counts)
                num_before += sum(map(is_picture, parts))
                message = {**message, "content": content}
            rendered.append(message)
        return rendered

    def _render_parts(
        self,
        parts: Sequence[Part],
        where: str,
        frames: Sequence[Frame],
        num_before: int,
        outside: Outside,
        counts: Counter[str] | None,
    ) -> list[Part]:
        rendered: list[Part] = []
        waiting: list[Shape] = []
        for index, part in enumerate([*parts, None]):
            place = f"{where} part {index}"
            if part is not None and part.get("type") in SHAPES:
                check_part(part, place, num_before, len(frames))
                try:
                    waiting += shapes_in_pixels(part, frames, num_before, outside, counts)
                except ValueError as error:
                    raise ValueError(f"{place}: {error}") from error
                continue
            if waiting:
                try:
                    rendered.append({"type": "text", "text": render_shapes(waiting, frames, self.convention)})
                except ValueError as error:
                    raise ValueError(f"{where} before part {index}: {error}") from error
                waiting = []
            if part is None:
                break
            if part.get("type") in ("ref", "document"):
                check_part(part, place, num_before, len(frames))
                try:
                    if part["type"] == "ref":
                        text = render_ref(part["text"], self.convention)
                    else:
                        frame = frames[part.get("image_index", num_before - 1)]
                        text = document_for_model(part["html"], frame, self.convention, outside, counts)
                except ValueError as error:
                    raise ValueError(f"{place}: {error}") from error
                part = {"type": "text", "text": text}
            elif part.get("type") not in _PASSED_ON:
                known = ", ".join(sorted({*PART_KEYS, *_PASSED_ON}))
                raise ValueError(
                    f"{place} has type {part.get('type')!r}, which nothing would render; known are {known}"
                )
            num_before += is_picture(part)
            rendered.append(part)
        return rendered

    def parse_answer(
        self,
        text: str,
        image_sizes: Sequence[Size],
        *,
        image_index: int | None = None,
        outside: Outside = "refuse",
    ) -> ParsedAnswer:
        """The shapes of an answer in pixels of the original pictures; see `answer_parsing.parse_shapes`.

        text: decoded with `skip_special_tokens=False`. image_sizes: (height, width) of the original pictures.

        Example:
            >>> processor.parse_answer("<ref>cup</ref><box>(100,100),(200,200)</box>", [(600, 800)]).shapes
            (Box(x1=80.0, y1=60.0, x2=160.0, y2=120.0, label='cup', image_index=0),)
        """
        return parse_shapes(text, self.frames(image_sizes), self.convention, image_index=image_index, outside=outside)

    def apply_chat_template(
        self,
        conversation: list,
        chat_template: str | None = None,
        *,
        image_sizes: Sequence[Any] | None = None,
        picture_limits: PictureLimits = ANYTHING,
        tokenize: bool = False,
        sanitize_control_tokens: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """`ProcessorMixin.apply_chat_template` for conversations that may hold box, quad, point and ref parts.

        With `tokenize`, pictures are loaded here, once, by `pictures.load_picture`: boxes and pixels come from the
        same upright picture.

        Args:
            conversation: a conversation, or a list of them.
            image_sizes: (height, width) of the original pictures, per conversation where there are several; needed
                only where there are shapes and the pictures are not in the conversation.
            picture_limits: which pictures may be loaded, from where.
            sanitize_control_tokens: special tokens in the data's text are encoded as plain text; those of boxes stay
                tokens.
        """
        is_batch = bool(conversation) and isinstance(conversation[0], list | tuple)
        batch = list(conversation) if is_batch else [conversation]
        sizes = [image_sizes] if image_sizes is not None and not is_batch else image_sizes
        if sizes is not None and len(sizes) != len(batch):
            raise ValueError(f"{len(batch)} conversation(s), but image_sizes for {len(sizes)}")
        if tokenize:
            batch = [with_loaded_pictures(messages, picture_limits) for messages in batch]
        processor_kwargs = dict(processor_kwargs or {})
        if sanitize_control_tokens and tokenize and not kwargs.get("return_assistant_tokens_mask"):
            # Marked here, before shapes become text: transformers would also mark the tokens of the shapes.
            tokens = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]  # type: ignore[attr-defined]
            batch = [mark_texts(messages, tokens) for messages in batch]
            processor_kwargs["sanitize_control_tokens"] = True
            sanitize_control_tokens = False
        rendered = []
        for index, messages in enumerate(batch):
            given = sizes[index] if sizes is not None else sizes_of_pictures(messages, picture_limits)
            rendered.append(self.render_conversation(messages, given))
        return super().apply_chat_template(  # type: ignore[misc]
            rendered if is_batch else rendered[0],
            chat_template=chat_template,
            tokenize=tokenize,
            sanitize_control_tokens=sanitize_control_tokens,
            processor_kwargs=processor_kwargs,
            **kwargs,
        )

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "convention": self.convention.name}  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: the folder was saved with another convention than this class writes.
        """
        saved, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore[attr-defined]
        if saved.get("convention", cls.convention.name) != cls.convention.name:
            raise ValueError(
                f"{pretrained_model_name_or_path} was saved with the box convention {saved['convention']!r}, but "
                f"{cls.__name__} writes {cls.convention.name!r}: its model would misplace every box. "
                f"processing_families.load_processor picks the class that fits"
            )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]


def mark_texts(messages: Sequence[Message], tokens: Collection[str]) -> list[Message]:
    """The conversation with each of `tokens` in its texts and labels marked, by transformers' private-use characters,
    to be encoded as plain text; pictures and everything else stay as they are."""
    pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")

    def mark(node: dict[str, Any]) -> dict[str, Any]:
        return {
            key: mark_control_tokens(value, pattern) if key in _MARKED_KEYS and isinstance(value, str) else value
            for key, value in node.items()
        }

    marked = []
    for message in map(mark, messages):
        if isinstance(message.get("content"), list | tuple):
            message["content"] = [mark(part) for part in message["content"]]
        marked.append(message)
    return marked


def shapes_in_pixels(
    part: Part, frames: Sequence[Frame], num_before: int, outside: Outside, counts: Counter[str] | None
) -> list[Shape]:
    """The shapes of a checked part, within their picture."""
    kind = part["type"]
    image_index = part.get("image_index", num_before - 1)
    frame = frames[image_index]
    shapes = []
    for numbers in shapes_of(part, kind, kind):
        if "normalized" in part:
            sides = (frame.width, frame.height)
            numbers = [value * sides[i % 2] / part["normalized"] for i, value in enumerate(numbers)]
        shape, is_clipped = fit(make_shape(kind, numbers, part.get("label"), image_index), frame, outside)
        shapes.append(shape)
        if counts is not None:
            counts.update({"shapes": 1, "clipped": int(is_clipped)})
    return shapes
