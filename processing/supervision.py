"""Example + processor -> input ids, labels and pixel tensors; every picture and frame is decoded and processed once.

The text comes first, with the number of tokens that each picture's size will give; once the example is known to fit,
the pictures are resized and normalised, and the frames of videos decoded. What comes out is checked, always: something
is supervised, no placeholder is, and every supervised answer ends with its end token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.video_utils import VideoMetadata

from .chat_spans import (
    ANSWERS,
    IGNORE,
    QWEN_VL,
    LabelRule,
    Render,
    TrainOn,
    chat_spans,
    special_pattern,
    trained_messages,
)
from .encoded_example import EncodedExample
from .example import Example, Message, RowError, count_pictures, videos_in
from .grounding_mixin import GroundingMixin, Size
from .length import Draft, LengthPolicy, Step, fit, picture_tokens, video_tokens
from .pictures import ANYTHING, PictureLimits, load_picture, picture_size
from .span_encoding import encode_spans
from .special_tokens import ENDOFTEXT, IMAGE_PAD, IMGPAD, VIDEO_PAD, VISION_END, VISION_START
from .videos import Clip, open_clip

# Stages 1 and 2 with the later families: pictures and texts as they stand, no roles; the answer ends with
# <|endoftext|>.
PLAIN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- '" + VISION_START + IMAGE_PAD + VISION_END + "' -}}"
    "{%- elif part.type == 'video' -%}{{- '" + VISION_START + VIDEO_PAD + VISION_END + "' -}}"
    "{%- else -%}{{- part.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- if message.role == 'assistant' -%}{{- '" + ENDOFTEXT + "' -}}{%- endif -%}"
    "{%- endfor -%}"
)


class Supervision:
    """Turns examples into what a model trains on. Make one per run; call it per example.

    Args:
        processor: `QwenVLProcessor`, or one of Qwen2-VL, Qwen2.5-VL, Qwen3-VL (from `load_processor` for rows with
            boxes).
        length: what to do with long examples; None: any length.
        train_on: "answers", "last_answer", or a function (index, messages) -> bool; a message's own `train` comes
            first.
        rule: which control tokens are supervised; None: as the original for Qwen-VL, else the answers and their end
            token.
        special_in_text: special tokens that are read as tokens when they stand in the data's text; by default none, so
            that a text cannot forge control tokens (the original finetuning code reads all of them).
        limits: which pictures may be loaded, and from where.

    `counts` says how many examples came out as they are ("kept"), by "shrink", by "trim" (by both: in both), or not at
    all ("drop"). It counts in this process; each worker of a DataLoader has its own.

    Example:
        >>> supervise = Supervision(processor, length=LengthPolicy(2048))
        >>> encoded = supervise(Example([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]))
        >>> processor.decode(encoded.input_ids[encoded.labels != -100])  # Qwen2.5-VL
        '2<|im_end|>'
    """

    def __init__(
        self,
        processor: Any,
        length: LengthPolicy | None = None,
        train_on: TrainOn = "answers",
        rule: LabelRule | None = None,
        special_in_text: Collection[str] = (),
        limits: PictureLimits = ANYTHING,
    ):
        trained_messages([], train_on)  # refuses an unknown train_on now, not at the first row
        self.processor = processor
        self.length = length
        self.train_on = train_on
        self.rule = rule or (QWEN_VL if processor.image_token == IMGPAD else ANSWERS)
        self.limits = limits
        self.counts: Counter[str] = Counter()
        self._special = special_pattern(processor.tokenizer)
        self._in_data = special_pattern(processor.tokenizer, special_in_text) if special_in_text else None

    def __call__(self, example: Example) -> EncodedExample | None:
        """The encoded example, or None if the length policy drops it.

        Raises:
            RowError: names the row: a picture that cannot be read, no supervised token, an example that is too long,
                ...
        """
        try:
            pictures = [load_picture(picture, self.limits) for picture in example.pictures]
            plan = self.plan(example, [(picture.height, picture.width) for picture in pictures], self.clips(example))
            self.counts.update(["drop"] if plan is None else plan[1] or ["kept"])
            return None if plan is None else self._with_pixels(example, *plan, pictures)
        except RowError:
            raise
        except ValueError as error:
            raise RowError(example.source, str(error)) from error

    def stream(self, examples: Iterable[Example]) -> Iterator[EncodedExample]:
        """The encoded examples, without those that are dropped."""
        for example in examples:
            if (encoded := self(example)) is not None:
                yield encoded

    def measure(self, example: Example) -> int | None:
        """Number of tokens that the encoded example will have, from the heads of its pictures; None if it is dropped.

        Raises:
            RowError: as calling does, as far as it can be known without decoding.
        """
        try:
            sizes = [picture_size(picture, self.limits) for picture in example.pictures]
            plan = self.plan(example, sizes, self.clips(example))
        except ValueError as error:
            raise RowError(example.source, str(error)) from error
        return None if plan is None else plan[0].length

    def clips(self, example: Example) -> list[Clip]:
        """The videos of `example`, their heads read and nothing decoded; ValueError as `videos.open_clip`."""
        return [open_clip(part, self.limits) for part in example.videos]

    def plan(
        self, example: Example, sizes: Sequence[Size], clips: Sequence[Clip] = ()
    ) -> tuple[Draft, tuple[Step, ...]] | None:
        """The text of `example` as ids, fitted to the length policy, and the steps that took; None if it is dropped.

        sizes: (height, width) of its pictures in original pixels. clips: its videos.
        """
        whole = self.draft(example, sizes, self.processor, len(example.messages), clips)
        fitted: tuple[Draft, tuple[Step, ...]] | None = (whole, ())
        if self.length is not None and whole.length > self.length.max_length:
            count = len(example.messages)
            endings = [n for n in range(1, count) if trained_messages(example.messages[:n], self.train_on)[-1]]
            fitted = fit(whole, lambda p, n: self.draft(example, sizes, p, n, clips), endings, self.length)
            if fitted is None and self.length.steps[-1] == "raise":
                raise ValueError(
                    f"{whole.length} tokens ({whole.num_picture_tokens} of them for {_counted(sizes, clips)}), but "
                    f"max_length is {self.length.max_length} and no step of {self.length.steps} helps: raise "
                    f"max_length, lower the processor's pixels, or end the steps with 'drop'"
                )
        if fitted is not None:
            self._check(fitted[0], example)
        return fitted

    def draft(
        self,
        example: Example,
        sizes: Sequence[Size],
        processor: Any,
        num_messages: int,
        clips: Sequence[Clip] = (),
    ) -> Draft:
        """The first messages of `example` as ids, whatever their number, as `processor` will see its pictures."""
        if example.kind != "sft":
            raise ValueError(f"an example of kind {example.kind!r} has no answer to train on; only 'sft' has")
        messages = example.messages[:num_messages]
        sizes = sizes[: sum(map(count_pictures, messages))]
        clips = clips[: sum(len(videos_in(message)) for message in messages)]
        tokens = picture_tokens(processor, sizes)
        placeholders = {processor.image_token: [[processor.image_token_id] * count for count in tokens]}
        never_targets = {processor.image_token_id}
        if _sees_videos(processor):
            placeholders[processor.video_token] = [
                processor.tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in _video_texts(processor, clips)
            ]
            never_targets.add(processor.video_token_id)
        spans = chat_spans(
            messages,
            _renderer(processor, example.style, sizes),
            self._special,
            rule=self.rule if example.style == "chat" else ANSWERS,
            train_on=self.train_on,
            weight=example.weight,
        )
        encoded = encode_spans(
            spans,
            processor.tokenizer,
            self._special,
            placeholders=placeholders,
            never_targets=never_targets,
            joined=self.rule.joined,
            in_data=self._in_data,
        )
        num_picture_tokens = sum(tokens) + sum(video_tokens(processor, clips))
        return Draft(processor, num_messages, encoded, spans, sizes, num_picture_tokens, clips)

    def _check(self, draft: Draft, example: Example) -> None:
        if all(label == IGNORE for label in draft.encoded.labels[1:]):
            raise ValueError("nothing is supervised: no message is trained (train_on; train and weight in the row)")
        if draft.processor.image_token_id in draft.encoded.labels:
            raise ValueError("a picture's placeholder is supervised")
        if draft.clips and draft.processor.video_token_id in draft.encoded.labels:
            raise ValueError("a video's placeholder is supervised")
        messages = example.messages[: draft.num_messages]
        for index, is_trained in enumerate(trained_messages(messages, self.train_on)):
            if is_trained and messages[index].get("weight", 1.0) > 0:
                targets = [span for span in draft.spans if span.message == index and span.is_target]
                if not targets or targets[-1].is_content or not self._special.search(targets[-1].text):
                    raise ValueError(f"message {index} is supervised but does not end with an end token")

    def _with_pixels(
        self, example: Example, draft: Draft, steps: tuple[Step, ...], pictures: Sequence[Image.Image]
    ) -> EncodedExample:
        ids, processor = draft.encoded.input_ids, draft.processor
        labels, weights = torch.tensor(draft.encoded.labels), torch.tensor(draft.encoded.weights)
        types = processor.create_mm_token_type_ids([ids])[0] if processor.return_mm_token_type_ids else None
        return EncodedExample(
            input_ids=torch.tensor(ids),
            labels=labels,
            loss_weights=None if torch.equal(weights, (labels != IGNORE).float()) else weights,
            mm_token_type_ids=None if types is None else torch.tensor(types),
            vision=_vision(draft, pictures[: len(draft.picture_sizes)]) | _video_vision(draft),
            task=example.task,
            source=example.source,
            fitted=steps,
        )


def encode(example: Example, processor: Any, **settings: Any) -> EncodedExample | None:
    """`Supervision(processor, **settings)(example)`, for a single example."""
    return Supervision(processor, **settings)(example)


def template_of(processor: Any, style: str) -> str | None:
    """What `processor.apply_chat_template` is told for an example of `style`; None is its own template."""
    if style == "chat":
        return None
    return "plain" if processor.image_token == IMGPAD else PLAIN_TEMPLATE  # QwenVLProcessor knows it by name


def _renderer(processor: Any, style: str, sizes: Sequence[Size]) -> Render:
    """Writes messages as text for `processor`, boxes included, by its chat template or the plain one."""
    template = template_of(processor, style)

    def render(messages: list[Message]) -> str:
        if isinstance(processor, GroundingMixin):
            messages = processor.render_conversation(messages, sizes)
        parts = [part for m in messages if not isinstance(m["content"], str) for part in m["content"]]
        known = {"text", "image", "video"} if _sees_videos(processor) else {"text", "image"}
        if unknown := sorted({part["type"] for part in parts} - known):
            raise ValueError(
                f"{type(processor).__name__} cannot write parts of type {', '.join(unknown)}"
                + (
                    ""
                    if isinstance(processor, GroundingMixin)
                    else ": load it with processing_families.load_processor"
                )
            )
        return processor.apply_chat_template(messages, chat_template=template, tokenize=False)

    return render


def _sees_videos(processor: Any) -> bool:
    return processor.image_token != IMGPAD  # all families but the first


def _counted(sizes: Sequence[Size], clips: Sequence[Clip]) -> str:
    return f"{len(sizes)} pictures" + (f" and {len(clips)} videos" if clips else "")


def _video_texts(processor: Any, clips: Sequence[Clip]) -> list[str]:
    """What the family's processor writes for each video: a placeholder per token, for Qwen3-VL with time stamps."""
    texts = []
    for clip, count in zip(clips, video_tokens(processor, clips), strict=True):
        metadata = VideoMetadata(**clip.metadata(processor.video_processor))
        steps = -(-len(metadata.frames_indices) // processor.video_processor.temporal_patch_size)
        # The text asks only for the number of steps in time and for the patches of a step, not for rows and columns.
        patches = count // steps * processor.video_processor.merge_size**2
        inputs = {"video_grid_thw": torch.tensor([[steps, 1, patches]]), "video_metadata": [metadata]}
        texts.append(processor.replace_video_token(inputs, video_idx=0))
    return texts


def _vision(draft: Draft, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
    """What the image processor makes of the pictures; as many tokens as the text has, or ValueError."""
    if not pictures:
        return {}
    processor = draft.processor
    vision = processor.image_processor(list(pictures), return_tensors="pt")
    made = [
        processor.replace_image_token(vision, image_idx=i).count(processor.image_token) for i in range(len(pictures))
    ]
    planned = draft.num_picture_tokens - sum(video_tokens(processor, draft.clips))
    if sum(made) != planned:
        raise ValueError(f"the text has {planned} picture tokens, the image processor makes {made}")
    return {name: value for name, value in vision.items() if name not in processor.unused_input_names}


def _video_vision(draft: Draft) -> dict[str, Tensor]:
    """What the video processor makes of the frames that the draft counts on; ValueError if the text says otherwise."""
    if not draft.clips:
        return {}
    processor = draft.processor
    frames = [clip.load(processor.video_processor) for clip in draft.clips]
    metadata = [clip.metadata(processor.video_processor) for clip in draft.clips]
    vision, written = processor._process_videos(
        frames, video_metadata=metadata, do_sample_frames=False, return_metadata=True, return_tensors="pt"
    )
    if written != (planned := _video_texts(processor, draft.clips)):
        made, expected = ([text.count(processor.video_token) for text in texts] for texts in (written, planned))
        raise ValueError(f"the text has {expected} tokens for its videos, the video processor makes {made}")
    tensors = {name: value for name, value in vision.items() if name != "video_metadata"}
    if "second_per_grid_ts" in tensors:
        tensors["second_per_grid_ts"] = torch.tensor(tensors["second_per_grid_ts"])
    return {name: value for name, value in tensors.items() if name not in processor.unused_input_names}
