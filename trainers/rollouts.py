"""Prompts of reward rows, encoded once, and what sampling needs to know: where to stop, what to leave out.

A row that is sampled G times is tokenized, and its pictures preprocessed, once; all G completions refer to one Prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from processing.example import Example, Message, RowError
from processing.pictures import ANYTHING, PictureLimits, load_picture
from processing.special_tokens import (
    IM_END,
    IMAGE_PAD,
    IMG_END,
    IMG_START,
    IMGPAD,
    VIDEO_PAD,
    VISION_END,
    VISION_PAD,
    VISION_START,
)
from trainers.reward_solution import AnswerReader

VISION_TOKENS = (IMG_START, IMG_END, IMGPAD, VISION_START, VISION_END, VISION_PAD, IMAGE_PAD, VIDEO_PAD)


@dataclass(frozen=True, eq=False)
class Prompt:
    """A row's prompt as the model reads it.

    messages: the conversation with its boxes written out and its pictures left out, for rewards and logs.
    vision: what the image processor made (pixel_values, image_grid_thw, ...); empty without pictures.
    token_types: 1 at visual tokens, which M-RoPE needs while generating; None for families without it.
    reader: reads answers to this prompt.
    """

    example: Example
    messages: list[Message]
    pictures: tuple[Image.Image, ...]
    input_ids: list[int]
    vision: dict[str, Tensor]
    token_types: list[int] | None
    reader: AnswerReader


def encode_prompt(example: Example, processor: Any, limits: PictureLimits = ANYTHING) -> Prompt:
    """Loads the pictures, renders the prompt up to where the answer begins, and encodes both, nothing cut.

    Special tokens in the data's text stay plain text.

    Raises:
        RowError: a picture that cannot be read, a box outside it.
    """
    try:
        pictures = tuple(load_picture(source, limits) for source in example.pictures)
        sizes = [(picture.height, picture.width) for picture in pictures]
        encoded = processor.apply_chat_template(
            [_with_pictures(example.messages, pictures)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            sanitize_control_tokens=True,
            processor_kwargs={"return_tensors": "pt"},
        )
        rendered = processor.render_conversation(example.messages, sizes)
    except RowError:
        raise
    except ValueError as error:
        raise RowError(example.source, str(error)) from error
    fields = dict(encoded)
    ids, types = fields.pop("input_ids"), fields.pop("mm_token_type_ids", None)
    del fields["attention_mask"]
    return Prompt(
        example=example,
        messages=[_without_pictures(message) for message in rendered],
        pictures=pictures,
        input_ids=ids[0].tolist(),
        vision=fields,
        token_types=None if types is None else types[0].tolist(),
        reader=AnswerReader(processor, sizes),
    )


def stop_token_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the model's and the tokenizer's own, and the chat's end token if the vocabulary has it.

    A checkpoint whose generation config names only <|endoftext|> would otherwise write on after its turn.
    """
    own = model.generation_config.eos_token_id
    stops = [] if own is None else [own] if isinstance(own, int) else list(own)
    if tokenizer.eos_token_id is not None:
        stops.append(tokenizer.eos_token_id)
    return sorted({*stops, *_ids(tokenizer, [IM_END])})


def forbidden_token_ids(model: PreTrainedModel, processor: Any) -> list[int]:
    """Ids that may never be sampled: visual tokens, which the next forward pass would look for pictures for, and ids
    that the tokenizer has no text for (heads are padded to round sizes)."""
    tokenizer = processor.tokenizer
    rows = model.get_output_embeddings().weight.shape[0]
    return sorted({*_ids(tokenizer, [*VISION_TOKENS, processor.image_token]), *range(len(tokenizer), rows)})


def text_before_stop(ids: Sequence[int], tokenizer: Any, stops: Iterable[int]) -> str:
    """The text of an answer with the tags of its boxes, up to its end token."""
    ends = set(stops)
    return tokenizer.decode(list(takewhile(lambda id: id not in ends, ids)), skip_special_tokens=False)


def generation_fields(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Pictures of all prompts one after the other, and token types as lists, as TRL's generation takes them."""
    fields: dict[str, Any] = dict(_joined(prompts))
    if fields and prompts[0].token_types is not None:
        fields["mm_token_type_ids"] = [prompt.token_types for prompt in prompts]
    return fields


def grouped(prompts: Sequence[Prompt]) -> list[tuple[Prompt, int]]:
    """Each prompt with the number of rows that it has one after the other."""
    return [(rows[0], len(rows)) for _, group in groupby(prompts, key=id) for rows in [list(group)]]


def scoring_fields(groups: Sequence[tuple[Prompt, int]], device: torch.device) -> dict[str, Tensor]:
    """What `add_completion_head` wants besides the rows: `groups` are the prompts with their numbers of rows."""
    unique = [prompt for prompt, _ in groups]
    sizes = torch.tensor([count for _, count in groups])
    fields = {
        "group_of_row": torch.arange(len(unique)).repeat_interleave(sizes),
        "num_pictures": torch.tensor([len(prompt.pictures) for prompt in unique]),
        **_joined(unique),
    }
    return {name: value.to(device) for name, value in fields.items()}


def reward_columns(prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """What TRL hands to reward functions, by row: ours, and the columns that any of the rows brought along."""
    names = {name: None for prompt in prompts for name in prompt.example.columns}
    return [
        {
            **{name: prompt.example.columns.get(name) for name in names},
            "prompt": prompt.messages,
            "solution": prompt.example.solution,
            "task": prompt.example.task,
            "pictures": prompt.pictures,
            "reader": prompt.reader,
        }
        for prompt in prompts
    ]


def _joined(prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    names = {name: None for prompt in prompts for name in prompt.vision}
    return {name: torch.cat([p.vision[name] for p in prompts if name in p.vision]) for name in names}


def _ids(tokenizer: Any, tokens: Iterable[str]) -> list[int]:
    known = tokenizer.get_vocab()
    return [known[token] for token in tokens if token in known]


def _with_pictures(messages: Sequence[Message], pictures: Sequence[Image.Image]) -> list[Message]:
    left = iter(pictures)

    def loaded(part: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image", "image": next(left)} if part["type"] == "image" else part

    return [
        {
            "role": message["role"],
            "content": message["content"]
            if isinstance(message["content"], str)
            else [loaded(part) for part in message["content"]],
        }
        for message in messages
    ]


def _without_pictures(message: Message) -> Message:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {
        "role": message["role"],
        "content": [{"type": "image"} if part["type"] == "image" else part for part in parts],
    }
