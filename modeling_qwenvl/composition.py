"""Joining a pretrained vision tower and a pretrained language model: load, add the image tokens, assemble."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .configuration_qwenvl import QwenVLConfig

# Start and end of a picture, and the placeholder that the picture's vectors replace.
IMAGE_TOKENS = {"image_start_token_id": "<img>", "image_end_token_id": "</img>", "image_token_id": "<imgpad>"}


def add_image_tokens(tokenizer: PreTrainedTokenizerBase, extra_tokens: Sequence[str] = ()) -> dict[str, int]:
    """Teach `tokenizer` the picture's special tokens (in place; those it knows keep their ids) and `extra_tokens`.

    Returns:
        The ids as fields of `QwenVLConfig`: image_start_token_id, image_end_token_id, image_token_id.
    """
    known = tokenizer.get_vocab()
    wanted = [*IMAGE_TOKENS.values(), *extra_tokens]
    tokenizer.add_tokens([token for token in wanted if token not in known], special_tokens=True)
    return {field: tokenizer.convert_tokens_to_ids(token) for field, token in IMAGE_TOKENS.items()}


def load_tower(vision: str | PreTrainedModel, dtype: Any) -> PreTrainedModel:
    """The vision tower in a folder, on the Hub or in a model; of a two-tower model or a Qwen-VL, its vision part."""
    if isinstance(vision, PreTrainedModel):
        return vision.get_encoder(modality="image") if "vision_config" in vision.config.sub_configs else vision
    config = AutoConfig.from_pretrained(vision)
    if isinstance(config, QwenVLConfig):
        return AutoModel.from_pretrained(vision, dtype=dtype).visual
    if "vision_config" in config.sub_configs:
        config = config.vision_config
    return AutoModel.from_pretrained(vision, config=config, dtype=dtype)


def load_text(
    text: str | PreTrainedModel, dtype: Any, tokenizer: PreTrainedTokenizerBase | None, extra_tokens: Sequence[str]
) -> tuple[PreTrainedModel, dict[str, int]]:
    """The causal language model with a row of embeddings for each image token, and the tokens' ids."""
    model = text
    if not isinstance(model, PreTrainedModel):
        model = AutoModelForCausalLM.from_pretrained(text, dtype=dtype)
        tokenizer = tokenizer if tokenizer is not None else AutoTokenizer.from_pretrained(text)
    num_rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer is None:
        if extra_tokens:
            raise ValueError(f"extra_tokens {tuple(extra_tokens)} need the tokenizer that shall know them.")
        ids = {field: num_rows + i for i, field in enumerate(IMAGE_TOKENS)}
        num_tokens = num_rows + len(ids)
    else:
        ids = add_image_tokens(tokenizer, extra_tokens)
        num_tokens = len(tokenizer)
    # Many vocabularies are padded and have rows to spare; rows are never taken away.
    if num_tokens > num_rows:
        model.resize_token_embeddings(num_tokens)
    return model, ids


def assemble(model_class: Any, config: QwenVLConfig, tower: PreTrainedModel, text: PreTrainedModel) -> Any:
    """A `model_class` of these parts with a fresh adapter; the parts are taken over, not copied.

    Raises:
        ValueError: the head has a bias, or the language model alone gives other logits than it does in the new model.
    """
    head = text.get_output_embeddings()
    if head.bias is not None:
        raise ValueError(f"The head of {type(text).__name__} has a bias; the head here is a plain matrix.")
    with torch.device("meta"):
        model = model_class(config)
    model.model.visual, model.model.language_model, model.lm_head = tower, text.get_decoder(), head
    adapter = model.model.adapter.to_empty(device=head.weight.device).to(head.weight.dtype)
    adapter.apply(model.model._initialize_weights)
    model.generation_config = text.generation_config
    model.eval()
    _check_same_logits(model, text)
    return model


@torch.no_grad()
def _check_same_logits(model: PreTrainedModel, text: PreTrainedModel) -> None:
    special = {model.config.image_token_id, model.config.image_start_token_id, model.config.image_end_token_id}
    ids = [i for i in range(12) if i not in special and i < model.config.text_config.vocab_size]
    input_ids = torch.tensor([ids], device=model.device)
    alone, joined = text(input_ids=input_ids).logits, model(input_ids=input_ids).logits
    difference = (alone - joined).abs().max().item()
    if difference > 1e-3 * max(alone.abs().max().item(), 1e-6):
        raise ValueError(
            f"{type(text).__name__} does something to its logits after the head that the joined model would lose: on "
            f"text their logits differ by {difference:.3g} (largest logit {alone.abs().max().item():.3g})."
        )
