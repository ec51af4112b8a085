"""Conversation: a model, its processor, pictures, videos; questions in, answers with boxes in original pixels out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedModel

import modeling_qwenvl  # noqa: F401 (registers the model)
from processing.grounding_text import ParsedAnswer
from processing.processing_families import load_processor


class Conversation:
    """Turns about the same pictures and videos, which stand before the first question. Answers are greedy.

    A video is a path, or a video part with options (processing/parts.py).

    Works for every family that `processing.processing_families.load_processor` knows.

    Example:
        >>> conversation = Conversation.load("runs/demo/model", [picture])
        >>> conversation.ask("Where is the three?").shapes
        (Box(x1=12.04, y1=5.0, x2=23.02, y2=24.02, label='the three', image_index=0),)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        pictures: Sequence[Image.Image],
        max_new_tokens: int = 512,
        videos: Sequence[str | dict[str, Any]] = (),
    ):
        self.model, self.processor, self.pictures = model, processor, list(pictures)
        self.videos = [{"type": "video", "video": video} if isinstance(video, str) else video for video in videos]
        self.max_new_tokens = max_new_tokens
        self.messages: list[dict[str, Any]] = []

    @classmethod
    def load(
        cls,
        path: str | Path,
        pictures: Sequence[Image.Image],
        max_new_tokens: int = 512,
        videos: Sequence[str | dict[str, Any]] = (),
    ) -> Self:
        """With the model from a folder or the Hub, on the GPU if there is one.

        Raises ValueError or OSError if no model and processor of the family are there.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        processor = load_processor(path)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto").to(device).eval()
        return cls(model, processor, pictures, max_new_tokens, videos)

    @torch.inference_mode()
    def ask(self, question: str) -> ParsedAnswer:
        """The answer to `question`; both become part of the conversation."""
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if not self.messages:
            content = [{"type": "image", "image": picture} for picture in self.pictures] + self.videos + content
        self.messages.append({"role": "user", "content": content})
        inputs = self.processor.apply_chat_template(
            self.messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"return_tensors": "pt"},
        ).to(self.model.device)
        output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        ids = until_stop(output[0, inputs["input_ids"].shape[1] :].tolist(), self.model.generation_config)
        raw = self.processor.tokenizer.decode(ids, skip_special_tokens=False)
        sizes = [(picture.height, picture.width) for picture in self.pictures]
        answer = self.processor.parse_answer(raw, sizes)
        # What the model said goes back as it said it, tags included; only the end tokens are the template's.
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": raw}]})
        return answer


def until_stop(ids: Sequence[int], generation_config: GenerationConfig) -> list[int]:
    """What was generated before the first of the end tokens.

    Example:
        >>> until_stop([7, 8, 2, 0, 0], GenerationConfig(eos_token_id=[2, 3]))
        [7, 8]
    """
    stops = generation_config.eos_token_id
    stops = set(stops) if isinstance(stops, list) else {stops}
    return list(takewhile(lambda id: id not in stops, ids))
