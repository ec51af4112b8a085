"""Conversations and pictures -> what the model takes: `input_ids`, `attention_mask`, `pixel_values`; ids -> answers.

In a text, one picture is `<img><imgpad></img>` (`IMAGE_SLOT`). The processor repeats the `<imgpad>` `num_image_tokens`
times; the model overwrites the embeddings of these tokens with the picture's vectors.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, ProcessorMixin
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.processing_utils import MultiModalData

from .chat_templates import CHATML_TEMPLATE, PLAIN_TEMPLATE
from .coordinates import CONVENTIONS
from .grounding_mixin import GroundingMixin, mark_texts
from .image_processing_pil_qwenvl import QwenVLImageProcessorPil
from .image_processing_qwenvl import QwenVLImageProcessor
from .pictures import load_picture
from .special_tokens import ENDOFTEXT, IM_END, IM_START, IMAGE_SLOT, IMAGE_SPECIAL_TOKENS, IMG_END, IMG_START, IMGPAD
from .tokenization_qwenvl import PIECE_BREAK, QWenTokenizer

IMAGE_PROCESSORS: dict[str, Any] = {"pil": QwenVLImageProcessorPil, "torchvision": QwenVLImageProcessor}

_SLOT_PIECES = re.compile("|".join(map(re.escape, (IMAGE_SLOT, IMG_START, IMG_END, IMGPAD))))


class QwenVLProcessor(GroundingMixin, ProcessorMixin):
    """Image processor, tokenizer and chat templates of Qwen-VL in one.

    Args:
        tokenizer: its `padding_side` is set to left, as a batch of prompts for `generate` needs it.
        num_image_tokens: visual tokens of one picture; must be the model's number of queries.
        chat_template: by default `CHATML_TEMPLATE`. The name "plain" in `apply_chat_template` is `PLAIN_TEMPLATE`.

    Raises:
        ValueError: the tokenizer lacks `<img>`, `</img>` or `<imgpad>`.

    Example:
        >>> content = [{"type": "image", "image": picture}, {"type": "text", "text": "Where is the dog?"}]
        >>> messages = [{"role": "user", "content": content}]
        >>> inputs = processor.apply_chat_template(
        ...     messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ... )
        >>> output_ids = model.generate(**inputs, eos_token_id=processor.stop_token_ids)
        >>> processor.post_process_image_text_to_text(output_ids[:, inputs["input_ids"].shape[1] :])
        ['<ref>the dog</ref><box>(221,423),(569,886)</box>']
    """

    convention = CONVENTIONS["qwenvl"]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 256,
        chat_template: str | dict[str, str] | None = None,
    ):
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in (IMG_START, IMG_END, IMGPAD) if token not in vocabulary]:
            raise ValueError(
                f"The tokenizer has no {', '.join(missing)}: add them as special tokens first (and resize the model's "
                f"embeddings), or use QWenTokenizer"
            )
        if num_image_tokens < 1:
            raise ValueError(f"num_image_tokens is {num_image_tokens}, a picture needs at least 1")
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHATML_TEMPLATE)
        tokenizer.padding_side = "left"  # transformers' pipelines pad on this side and do not ask the processor
        self.num_image_tokens = num_image_tokens
        self.image_token = IMGPAD
        self.image_token_id = vocabulary[IMGPAD]

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end an answer, those of the original's chat: `model.generate(..., eos_token_id=stop_token_ids)`."""
        return self.tokenizer.convert_tokens_to_ids([IM_END, IM_START, ENDOFTEXT])

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """Adds to the base class: the original repositories, whose config.json says what a processor file would."""
        processor_dict, unused_kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "image_processor" not in processor_dict:
            config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
            if "visual" not in config:
                raise ValueError(
                    f"{pretrained_model_name_or_path} holds no Qwen-VL processor: no processor_config.json with an "
                    f"image processor, and its config.json has no `visual` part as the original Qwen-VL's has"
                )
            visual = config["visual"]
            size = {"height": visual["image_size"], "width": visual["image_size"]}
            processor_dict["image_processor"] = {"size": size}
            processor_dict["num_image_tokens"] = visual.get("n_queries", 256)  # not written in the released configs
        return processor_dict, unused_kwargs

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict, backend: str = "pil", **kwargs: Any
    ) -> list[Any]:
        """Differs from the base class: the image processor comes from `processor_dict`, and PIL is its default."""
        if backend not in IMAGE_PROCESSORS:
            raise ValueError(f"backend is {backend!r}; known are {', '.join(IMAGE_PROCESSORS)}")
        image_processor = IMAGE_PROCESSORS[backend].from_dict(processor_dict["image_processor"], **kwargs)
        named = get_tokenizer_config(pretrained_model_name_or_path, **kwargs).get("tokenizer_class")
        # Not through AutoTokenizer where the class is known: it would ask for the original's remote code.
        tokenizer_class = QWenTokenizer if named == "QWenTokenizer" else AutoTokenizer
        tokenizer = tokenizer_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return [image_processor, tokenizer]

    def apply_chat_template(
        self,
        conversation: list,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        sanitize_control_tokens: bool = False,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Renders a conversation or a list of them, and with `tokenize` encodes it; see `ProcessorMixin` for the rest.

        With `tokenize`, the ids are those of the original's chat (given a `QWenTokenizer`):

        - of special strings in the texts of the conversation, only `IMAGE_SPECIAL_TOKENS` are read as tokens, so that
          a text with `<|im_end|>` does not end its message; with `sanitize_control_tokens` none is;
        - what the template writes before a text is not merged with it, not even line breaks.

        Prompts (`add_generation_prompt`, `continue_final_message`) are padded on the left, for `generate`, all else on
        the right, for training. `processor_kwargs={"padding_side": ...}` overrules it.

        Args:
            chat_template: None for the processor's own, "plain" for `PLAIN_TEMPLATE`, or a template.
        """
        if not conversation:
            raise ValueError("The conversation is empty: it needs at least one message")
        if sanitize_control_tokens and not tokenize:
            raise ValueError(
                "sanitize_control_tokens needs tokenize=True: in a rendered text, text and tokens look alike"
            )
        processor_kwargs = dict(processor_kwargs or {})
        is_prompt = bool(add_generation_prompt or continue_final_message)
        processor_kwargs.setdefault("padding_side", "left" if is_prompt else "right")
        if tokenize and isinstance(self.tokenizer, QWenTokenizer):
            special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
            as_text = special if sanitize_control_tokens else special.difference(IMAGE_SPECIAL_TOKENS)
            is_batch = isinstance(conversation[0], list | tuple)
            marked = [mark_texts(messages, as_text) for messages in (conversation if is_batch else [conversation])]
            conversation = marked if is_batch else marked[0]
            processor_kwargs["sanitize_control_tokens"] = True  # says that there are marks in the text
            if "piece_break" in self._resolve_chat_template(chat_template):
                kwargs["piece_break"] = PIECE_BREAK
            sanitize_control_tokens = False
        return super().apply_chat_template(
            conversation,
            chat_template=chat_template,
            tokenize=tokenize,
            sanitize_control_tokens=sanitize_control_tokens,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            processor_kwargs=processor_kwargs,
            **kwargs,
        )

    def _resolve_chat_template(self, chat_template: str | None) -> str:
        """Adds to the base class: the name "plain"; what is neither a name nor a template is refused."""
        if chat_template == "plain":
            return PLAIN_TEMPLATE
        template = super()._resolve_chat_template(chat_template)
        if "{" not in template:
            raise ValueError(f"chat_template is {template!r}: that is neither 'plain' nor a Jinja template")
        return template

    def model_size(self, height: int, width: int) -> tuple[int, int]:
        """Every picture is resized to one size, whatever its own (height, width)."""
        return self.image_processor.size["height"], self.image_processor.size["width"]

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """Adds to the base class: paths, addresses and bytes are loaded as in conversations, by `load_picture`."""
        return super().prepare_inputs_layout(images=_loaded(images), text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """What one `<imgpad>` of a text becomes; `<img>` and `</img>` already stand around it."""
        return IMGPAD * self.num_image_tokens

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """Adds to the base class: whole slots only, and pictures per text where they are given per text."""
        for row, sample in enumerate(text or ()):
            broken = [piece for piece in _SLOT_PIECES.findall(sample) if piece in (IMG_START, IMGPAD)]
            if broken:
                raise ValueError(
                    f"Text {row} has {broken[0]} outside {IMAGE_SLOT}, which is how a text says where a picture goes: "
                    f"{sample[:200]!r}. If a user typed it: apply_chat_template(..., sanitize_control_tokens=True)."
                )
        if (
            text is not None
            and isinstance(images, (list, tuple))
            and all(isinstance(i, (list, tuple)) for i in images)
        ):
            for row, (sample, pictures) in enumerate(zip(text, images, strict=False)):
                if sample.count(IMGPAD) != len(pictures):
                    raise ValueError(
                        f"Text {row} has {sample.count(IMGPAD)} {IMAGE_SLOT} but {len(pictures)} picture(s): give "
                        f"each text as many pictures as it has slots, in their order"
                    )
        super().validate_inputs(images=images, text=text, **kwargs)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, keep_image_special: bool = True, **kwargs: Any
    ) -> list[str]:
        """Texts of generated ids (batch, length); `<ref>`, `<box>` and `<quad>` stay in them unless told otherwise."""
        return self.batch_decode(
            generated_outputs, skip_special_tokens=skip_special_tokens, keep_image_special=keep_image_special, **kwargs
        )

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Visual tokens per picture of `image_sizes` (height, width), for inference servers."""
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )


def _loaded(images: Any) -> Any:
    """Pictures, however nested, with those that are named by a string or path, or are bytes, as PIL pictures."""
    if isinstance(images, list | tuple):
        return [_loaded(image) for image in images]
    return load_picture(images) if isinstance(images, str | Path | bytes) else images
