"""Qwen-VL: a vision tower, an adapter and a language model; pictures take the places of placeholder tokens.

Tensors only: `pixel_values` (num_pictures, 3, H, W), the pictures of all rows one after the other in the order of
their placeholders, and `input_ids` with `config.num_image_tokens` times `config.image_token_id` per picture.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from .adapter_qwenvl import ADAPTERS, QwenVLResampler, init_resampler
from .composition import assemble, load_text, load_tower
from .configuration_qwenvl import QwenVLConfig, QwenVLTextConfig, QwenVLVisionConfig
from .original_checkpoint import register_original_names
from .text_qwenvl import QwenVLTextModel
from .vision_qwenvl import QwenVLVisionModel, patch_grid


def _sub_model(config: PreTrainedConfig) -> PreTrainedModel:
    # Ours by their type and not by their config's class: of a local folder with its code, transformers imports the
    # configs once for the config and once more for the model, and AutoModel knows the second ones only.
    own: dict[str, type[PreTrainedModel]] = {
        QwenVLVisionConfig.model_type: QwenVLVisionModel,
        QwenVLTextConfig.model_type: QwenVLTextModel,
    }
    model_class = own.get(config.model_type)
    return AutoModel.from_config(config) if model_class is None else model_class._from_config(config)


@dataclass
class QwenVLModelOutputWithPast(BaseModelOutputWithPast):
    """`BaseModelOutputWithPast` and `image_hidden_states`: the pictures' vectors, one (Q, E) tensor per picture."""

    image_hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class QwenVLCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` and `image_hidden_states`: the pictures' vectors, one (Q, E) tensor per picture."""

    image_hidden_states: tuple[torch.Tensor, ...] | None = None


class QwenVLPreTrainedModel(PreTrainedModel):
    config: QwenVLConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ("QwenVLResampler",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, QwenVLResampler):
            init_resampler(module)

    def save_pretrained(self, save_directory, save_original_format: bool = False, **kwargs):
        """As transformers' `save_pretrained`, writing the native names also after loading an original checkpoint.

        Native names are what the Trainer's resume and 4-bit saving need. For the original names see
        `write_original_checkpoint`.
        """
        if save_original_format:
            raise ValueError(
                "save_pretrained writes native names only: write_original_checkpoint(model, folder) writes the "
                "original names, with the original config beside them."
            )
        super().save_pretrained(save_directory, save_original_format=False, **kwargs)

    def set_checkpointed_parts(self, *, visual: bool, adapter: bool, language_model: bool) -> None:
        """Choose which parts recompute their activations in the backward pass instead of keeping them.

        `activation_checkpointing_enable()` switches all three on.

        Example:
            >>> model.set_checkpointed_parts(visual=False, adapter=False, language_model=True)
        """
        self.activation_checkpointing_enable()
        base = self.base_model
        for part, is_on in ((base.visual, visual), (base.adapter, adapter), (base.language_model, language_model)):
            for module in part.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.gradient_checkpointing = is_on


class QwenVLModel(QwenVLPreTrainedModel):
    """Tower (`visual`), adapter (`adapter`) and decoder (`language_model`), without head."""

    def __init__(self, config: QwenVLConfig):
        super().__init__(config)
        self.visual = _sub_model(config.vision_config)
        self.adapter = ADAPTERS[config.adapter_type](config)
        self.language_model = _sub_model(config.text_config)
        self.post_init()

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor | None, **kwargs) -> BaseModelOutputWithPooling:
        """Encode pictures.

        A tower without trainable parameters runs without a graph, also where gradient checkpointing hooked its input.

        Args:
            pixel_values: (num_pictures, 3, H, W), normalised as the image processor does; None is no picture.

        Returns:
            `pooler_output`: one (num_image_tokens, E) tensor per picture; `last_hidden_state`: what the adapter read,
            (num_pictures, N, C).
        """
        if pixel_values is None or len(pixel_values) == 0:
            return BaseModelOutputWithPooling(pooler_output=())
        is_frozen = not pixel_values.requires_grad and not any(p.requires_grad for p in self.visual.parameters())
        with torch.no_grad() if is_frozen else nullcontext():
            patches_BNC, grid = self._patch_features(pixel_values, **kwargs)
        adapter_dtype = next(p.dtype for p in self.adapter.parameters() if p.is_floating_point())
        tokens_BQE = self.adapter(patches_BNC.to(adapter_dtype), grid)
        return BaseModelOutputWithPooling(last_hidden_state=patches_BNC, pooler_output=tuple(tokens_BQE))

    def _patch_features(self, pixel_values: torch.Tensor, **kwargs) -> tuple[torch.Tensor, tuple[int, int]]:
        """The tower's vectors that the adapter reads, (B, N, C), and the grid of patches."""
        grid = patch_grid(pixel_values, self.config.vision_config.patch_size)
        pixel_values = pixel_values.to(device=self.visual.device, dtype=self.visual.dtype)
        layer = self.config.vision_feature_layer
        if layer is None:
            hidden_BNC = self.visual(pixel_values, return_dict=True, **kwargs).last_hidden_state
        else:
            outputs = self.visual(pixel_values, return_dict=True, **{**kwargs, "output_hidden_states": True})
            hidden_BNC = outputs.hidden_states[layer]
        if self.config.vision_feature_select_strategy == "default":
            num_patches = grid[0] * grid[1]
            if hidden_BNC.shape[1] < num_patches:
                raise ValueError(
                    f"The tower gives {hidden_BNC.shape[1]} tokens for a picture of {num_patches} patches; it must "
                    "give one per patch (after any class tokens)."
                )
            hidden_BNC = hidden_BNC[:, -num_patches:]
        return hidden_BNC, grid

    def _placeholders(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, features: list[torch.Tensor]
    ) -> torch.Tensor:
        """Where the pictures go, (B, T) bool.

        Raises:
            ValueError: the placeholders do not fit the pictures.
        """
        if input_ids is not None:
            is_image_BT = input_ids == self.config.image_token_id
        else:
            placeholder_E = self.get_input_embeddings()(
                torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            )
            is_image_BT = (inputs_embeds == placeholder_E).all(-1)
        per_row = is_image_BT.sum(dim=1).tolist()
        sizes = [len(feature) for feature in features]
        if sum(per_row) == sum(sizes) and (len(set(sizes)) != 1 or all(n % sizes[0] == 0 for n in per_row)):
            return is_image_BT
        size = sizes[0] if sizes else self.config.num_image_tokens
        for row, count in enumerate(per_row):
            if count % size:
                raise ValueError(
                    f"Row {row} has {count} picture placeholders (id {self.config.image_token_id}), which is not a "
                    f"multiple of the {size} that one picture takes: was the row cut inside a picture?"
                )
        raise ValueError(
            f"There are placeholders for {sum(per_row) // size} pictures (by row: {[n // size for n in per_row]}) but "
            f"{len(sizes)} pictures were passed: give {size} ids {self.config.image_token_id} per picture."
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> QwenVLModelOutputWithPast:
        """Hidden states of the language model, (B, T, E).

        Args:
            input_ids: (B, T), with `num_image_tokens` placeholders per picture; or `inputs_embeds` (B, T, E).
            pixel_values: (num_pictures, 3, H, W); or what `get_image_features` gave, as
                `mm_encoder_outputs={"image": ...}`.
            use_cache: in training no cache is made unless this is True (a cache would also drop a packed mask).
            mm_token_type_ids: accepted because processors return it; not used, the placeholders say the same.

        Raises:
            ValueError: the number of pictures differs from the number of places for them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("Give either pixel_values or mm_encoder_outputs, which already holds encoded pictures.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if use_cache is None and self.training:
            use_cache = False
        encoded = (mm_encoder_outputs or {}).get("image")
        if encoded is None and pixel_values is not None:
            encoded = self.get_image_features(pixel_values, return_dict=True)
        features = list(encoded.pooler_output) if encoded is not None else []
        # A sampled placeholder may come back while a cache is continued; at the start of a row it lacks its picture.
        is_start = past_key_values is None or past_key_values.get_seq_length() == 0
        if features or (is_start and input_ids is not None):
            is_image_BT = self._placeholders(input_ids, inputs_embeds, features)
        if features:
            vectors = torch.cat(features).to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(is_image_BT[..., None], vectors)
        elif self.training and self.config.run_tower_on_text_only_batches:
            inputs_embeds = inputs_embeds + self._blank_picture().to(inputs_embeds.device, inputs_embeds.dtype)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return QwenVLModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=tuple(features) or None,
        )

    def _blank_picture(self) -> torch.Tensor:
        """0, but computed from a blank picture, so that every parameter of tower and adapter gets a gradient of 0."""
        vision = self.config.vision_config
        # Our tower takes a picture of one patch; a foreign one may insist on its size.
        side = vision.patch_size if isinstance(self.visual, QwenVLVisionModel) else vision.image_size
        features = self.get_image_features(torch.zeros(1, 3, side, side), return_dict=True).pooler_output
        return features[0].mean() * 0


class QwenVLForConditionalGeneration(QwenVLPreTrainedModel, GenerationMixin):
    """Qwen-VL with its head: chat, captions, grounding.

    The loss is the mean over supervised tokens (label != -100), exact under gradient accumulation.
    """

    accepts_loss_kwargs = True

    def __init__(self, config: QwenVLConfig):
        super().__init__(config)
        self.model = QwenVLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def adjust_generation_fn(self, *args, **kwargs):
        """As transformers', which reads generation_config.json, with the stop words of the original's chat.

        Qwen-VL-Chat ends an answer with `<|im_end|>`, but its file names `<|endoftext|>` alone: the original looks for
        the other stop words in code of its own, where `chat_format` is "chatml".
        """
        super().adjust_generation_fn(*args, **kwargs)
        end = self.generation_config.eos_token_id
        if vars(self.generation_config).get("chat_format") == "chatml" and isinstance(end, int):
            # In the original's vocabulary <|im_start|> and <|im_end|> follow <|endoftext|>.
            self.generation_config.eos_token_id = [end, end + 1, end + 2]

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str | PreTrainedModel,
        text: str | PreTrainedModel,
        *,
        adapter: str = "resampler",
        tokenizer: PreTrainedTokenizerBase | None = None,
        extra_tokens: tuple[str, ...] = (),
        dtype: torch.dtype | str = "auto",
        **config_kwargs,
    ) -> Self:
        """Join a pretrained vision tower and a pretrained language model by a fresh adapter.

        The tokenizer learns `<img>`, `</img>` and `<imgpad>` (and `extra_tokens`) in place, and the embeddings and
        the head get rows for them. Without a tokenizer, the one beside `text` says which ids they have; add the same
        tokens to it with `add_image_tokens`. Where `text` is a model and no tokenizer is given, they follow its last
        embedding.

        Args:
            vision: folder or Hub id, or model: CLIP, SigLIP or another tower of transformers, `QwenVLVisionModel`, or
                a whole Qwen-VL, whose tower is taken. Models are taken over, not copied.
            text: folder or Hub id, or model, of a causal language model.
            adapter: "resampler", "mlp" or "linear".
            dtype: of what is loaded from folders, and of the adapter where `text` is one.
            config_kwargs: further fields of `QwenVLConfig`: `num_queries`, `vision_feature_layer`, ...

        Returns:
            The model in evaluation mode, everything trainable except the resampler's fixed table.

        Raises:
            ValueError: the language model does more to its logits than our head can (`QwenVLConfig` says which), or a
                field that `QwenVLConfig` does not have.

        Example:
            >>> tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2.5-1.5B")
            >>> model = QwenVLForConditionalGeneration.from_vision_text_pretrained(
            ...     "openai/clip-vit-large-patch14-336", "Qwen/Qwen2.5-1.5B", adapter="mlp", tokenizer=tokenizer,
            ...     vision_feature_layer=-2)
            >>> model.config.num_image_tokens
            576
        """
        unknown = config_kwargs.keys() - QwenVLConfig.__dataclass_fields__.keys()
        if unknown:
            raise ValueError(f"QwenVLConfig has no field {', '.join(sorted(unknown))}.")
        tower = load_tower(vision, dtype)
        decoder, ids = load_text(text, dtype, tokenizer, extra_tokens)
        config = QwenVLConfig(
            vision_config=tower.config, text_config=decoder.config, adapter_type=adapter, **ids, **config_kwargs
        )
        return assemble(cls, config, tower, decoder)

    def get_image_features(self, pixel_values: torch.Tensor | None, **kwargs) -> BaseModelOutputWithPooling:
        """As `QwenVLModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> QwenVLCausalLMOutputWithPast:
        """Logits (B, T, vocabulary) and, with `labels`, the loss; further arguments as in `QwenVLModel.forward`.

        Args:
            labels: (B, T), -100 where a token is no target; not shifted, the model shifts.
            logits_to_keep: compute only the last so many logits, or those at the given places; with `shift_labels` for
                the same places, which replaces the model's own shift, the head runs on supervised tokens only.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            mm_token_type_ids=mm_token_type_ids,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return QwenVLCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


for _config_class, _model_class in (
    (QwenVLVisionConfig, QwenVLVisionModel),
    (QwenVLTextConfig, QwenVLTextModel),
    (QwenVLConfig, QwenVLModel),
):
    AutoModel.register(_config_class, _model_class, exist_ok=True)
AutoModelForImageTextToText.register(QwenVLConfig, QwenVLForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(QwenVLConfig, QwenVLForConditionalGeneration, exist_ok=True)
register_original_names()
