"""Configurations: `QwenVLConfig` = a vision tower, an adapter, a language model and the picture's special ids."""

from dataclasses import field
from math import isqrt
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config

from .original_config import REMOTE_CODE_MODULES, native_config

# Tokens that a foreign tower puts before its patch tokens.
NUM_PREFIX_TOKENS = {"qwen_vl_vision": 0, "clip_vision_model": 1, "siglip_vision_model": 0}
# What some causal language models do to their logits after the head, with the values that mean nothing is done. Our
# head is a plain matrix, so that it can be tied, resized, quantised and fused into the loss.
LOGIT_SCALING = {
    "final_logit_softcapping": (None,),
    "logits_soft_cap": (None,),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "lm_head_multiplier": (None, 1, 1.0),
    "output_multiplier": (None, 1, 1.0),
    "lm_head_bias": (None, False),
}
TYPES_WITH_HEAD_BIAS = ("codegen", "ctrl", "gptj", "phi")
ADAPTER_TYPES = ("resampler", "mlp", "linear")
ADAPTER_INITS = ("original", "local")


@strict
class QwenVLVisionConfig(PreTrainedConfig):
    """The vision tower of Qwen-VL: OpenCLIP ViT-bigG without class token and head (Qwen-VL paper, section 2.1).

    Args:
        image_size: side of the square picture, in pixels; the tower also takes any other multiple of `patch_size`.
        position_grid: side of the learned position table, in patches; it is resized to the picture's grid.

    Raises:
        ValueError: `hidden_size` is not a multiple of `num_attention_heads`, or `image_size` of `patch_size`.

    Example:
        >>> QwenVLVisionConfig().grid_size, QwenVLVisionConfig().num_patches
        (32, 1024)
    """

    model_type = "qwen_vl_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1664
    intermediate_size: int = 8192
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 448
    patch_size: int = 14
    position_grid: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        _must_divide("vision_config", "hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        _must_divide("vision_config", "image_size", self.image_size, "patch_size", self.patch_size)
        super().__post_init__(**kwargs)

    @property
    def grid_size(self) -> int:
        """Patches along one side of a picture of `image_size`."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of a picture of `image_size`."""
        return self.grid_size**2


@strict
class QwenVLTextConfig(Qwen2Config):
    """The language model of Qwen-VL, Qwen-7B: Qwen2 with all heads as key heads, plus what it does on long rows.

    Args:
        seq_length: the training length in tokens, from which NTK and log-n begin (evaluation only).
        use_dynamic_ntk: raise the RoPE base for rows longer than `seq_length`.
        use_logn_attn: scale queries beyond `seq_length` by log(position) / log(seq_length).

    Raises:
        ValueError: the heads do not divide the width, or a RoPE type other than "default", which NTK would contradict.
    """

    model_type = "qwen_vl_text"
    base_config_key = "text_config"

    intermediate_size: int = 11008
    max_position_embeddings: int = 8192
    num_key_value_heads: int | None = None
    seq_length: int = 2048
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True

    def __post_init__(self, **kwargs):
        _must_divide("text_config", "hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        if self.seq_length < 2:
            raise ValueError(f"text_config: seq_length = {self.seq_length} must be at least 2.")
        super().__post_init__(**kwargs)
        if self.rope_parameters["rope_type"] != "default":
            raise ValueError(
                f"text_config: rope_type {self.rope_parameters['rope_type']!r} is not supported by qwen_vl_text, "
                "which scales RoPE itself (use_dynamic_ntk): take model_type 'qwen2' for another RoPE scaling."
            )


@strict
class QwenVLConfig(PreTrainedConfig):
    """A Qwen-VL model: tower -> adapter -> language model.

    Reads its own nested form and the flat `config.json` of the 2023 checkpoints (`model_type` "qwen" with `visual`).

    Args:
        vision_config: our tower ("qwen_vl_vision", the default) or one of transformers (clip_vision_model, ...).
        text_config: Qwen-7B ("qwen_vl_text", the default) or any causal language model of transformers.
        adapter_type: "resampler" (learned queries attend to the patches; Qwen-VL), "mlp" (two layers, as LLaVA-1.5)
            or "linear" (one layer); the last two keep one token per patch.
        num_queries: tokens per picture of a resampler, a square number; 256 if not given.
        adapter_num_heads: heads of a resampler; `hidden_size // 128` if not given.
        adapter_init: how a resampler trained from scratch begins: "original", or "local": each query first looks at
            its own place (ours, see docs/model.md). Loaded weights are never touched.
        vision_feature_layer: hidden state of the tower that the adapter reads, as an index into `hidden_states`; the
            tower's output if None.
        vision_feature_select_strategy: "default": patch tokens only; "full": also the class token.
        image_token_id: id of the placeholder, `num_image_tokens` of them per picture.
        image_start_token_id, image_end_token_id: the ids around the placeholders; the model itself does not need them.
        run_tower_on_text_only_batches: in training, run a blank picture with weight 0 through tower and adapter where
            a batch has none, so that under DDP every rank has the same graph (the original always did so). Loss and
            gradients stay the same.

    Raises:
        ValueError: a setting that is unknown, contradicts another one or would have no effect.

    Example:
        >>> QwenVLConfig().num_image_tokens
        256
        >>> QwenVLConfig(adapter_type="linear").num_image_tokens
        1024
    """

    model_type = "qwen_vl"
    # A list: Trainer adds one to it.
    keys_to_ignore_at_inference = ["past_key_values", "image_hidden_states"]  # noqa: RUF012
    # Where a folder has no processor files, as in the original repositories, AutoProcessor asks the config.
    processor_class = "QwenVLProcessor"
    sub_configs_defaults = {  # noqa: RUF012 (transformers reads it from the class)
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen_vl_vision"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen_vl_text"),
    }

    vision_config: Any = None  # dict, config or None
    text_config: Any = None
    adapter_type: str = "resampler"
    num_queries: int | None = None
    adapter_num_heads: int | None = None
    adapter_init: str = "original"
    vision_feature_layer: int | None = None
    vision_feature_select_strategy: str = "default"
    image_token_id: int = 151859
    image_start_token_id: int = 151857
    image_end_token_id: int = 151858
    run_tower_on_text_only_batches: bool = False
    tie_word_embeddings: bool = False
    # Must be a dictionary: transformers and TRL read it without asking whether it is there.
    auto_map: dict | None = field(default_factory=dict)

    def __post_init__(self, **kwargs):
        if "visual" in kwargs or kwargs.get("model_type") == "qwen":
            kwargs = native_config(kwargs | {"dtype": self.dtype})
            for name in [name for name in kwargs if name in self.__dataclass_fields__]:
                setattr(self, name, kwargs.pop(name))
            self.architectures = None
        # The original repository's entries name files that are not copied along.
        self.auto_map = {
            auto_class: reference
            for auto_class, reference in (self.auto_map or {}).items()
            if reference is None or str(reference).split("--")[-1].split(".")[0] not in REMOTE_CODE_MODULES
        }
        super().__post_init__(**kwargs)
        self._check_text()
        # One truth for tied embeddings: the text config of a seed may say it, and so may we.
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        self.text_config.tie_word_embeddings = self.tie_word_embeddings
        self._check_vision()
        self._check_adapter()

    def _check_text(self) -> None:
        text, kind = self.text_config.to_dict(), self.text_config.model_type
        # Some types call their width n_embd or d_model and map the standard name to it.
        known = text.keys() | self.text_config.attribute_map.keys()
        missing = [name for name in ("hidden_size", "vocab_size") if name not in known]
        if missing:
            raise ValueError(
                f"text_config of type {kind!r} has no {', '.join(missing)}: it must be a plain causal language model "
                "(of a model that also sees or hears give its text_config)."
            )
        if text.get("is_encoder_decoder") or text.get("is_decoder") is False:
            raise ValueError(f"text_config of type {kind!r} is not a causal language model: it has an encoder.")
        for name, neutral in LOGIT_SCALING.items():
            if text.get(name) not in neutral:
                raise ValueError(
                    f"text_config of type {kind!r} has {name} = {text[name]}, which changes logits after the head; "
                    f"the head here is a plain matrix. Only {' or '.join(map(str, neutral))} is possible."
                )
        if kind in TYPES_WITH_HEAD_BIAS:
            raise ValueError(f"text_config of type {kind!r} has a bias in its head; the head here is a plain matrix.")
        ids = {n: getattr(self, n) for n in ("image_token_id", "image_start_token_id", "image_end_token_id")}
        for name, token_id in ids.items():
            if not 0 <= token_id < self.text_config.vocab_size:
                raise ValueError(
                    f"{name} = {token_id} is outside the vocabulary of {self.text_config.vocab_size}: give the id "
                    "that your tokenizer has for it, or more embeddings (text_config.vocab_size)."
                )
        if len(set(ids.values())) < len(ids):
            raise ValueError(f"The ids of the picture's tokens must differ: {ids}.")

    def _check_vision(self) -> None:
        tower = self.vision_config.to_dict()
        wanted = ("hidden_size", "image_size", "patch_size")
        missing = [name for name in wanted if not isinstance(tower.get(name), int)]
        if missing:
            raise ValueError(
                f"vision_config of type {self.vision_config.model_type!r} has no {', '.join(missing)}: it must be a "
                "plain vision tower (of a two-tower model such as CLIP give its vision_config)."
            )
        if self.vision_feature_select_strategy not in ("default", "full"):
            raise ValueError(
                f"vision_feature_select_strategy {self.vision_feature_select_strategy!r} is unknown: 'default' "
                "takes the patch tokens, 'full' also the class token."
            )
        if self.vision_feature_select_strategy == "full" and self.vision_config.model_type not in NUM_PREFIX_TOKENS:
            raise ValueError(
                f"vision_feature_select_strategy 'full' is known for {', '.join(NUM_PREFIX_TOKENS)}, not for "
                f"{self.vision_config.model_type}: use 'default'."
            )
        layer, num_layers = self.vision_feature_layer, tower.get("num_hidden_layers")
        if layer is not None and num_layers is not None and not -num_layers - 1 <= layer <= num_layers:
            raise ValueError(
                f"vision_feature_layer = {layer} is outside the tower's {num_layers + 1} hidden states "
                f"({-num_layers - 1} to {num_layers})."
            )

    def _check_adapter(self) -> None:
        kind = self.adapter_type
        if kind not in ADAPTER_TYPES:
            raise ValueError(f"adapter_type {kind!r} is unknown: one of {', '.join(ADAPTER_TYPES)}.")
        if self.adapter_init not in ADAPTER_INITS:
            raise ValueError(f"adapter_init {self.adapter_init!r} is unknown: one of {', '.join(ADAPTER_INITS)}.")
        if self.adapter_type != "resampler":
            without_effect = {
                "num_queries": self.num_queries,
                "adapter_num_heads": self.adapter_num_heads,
                "adapter_init": None if self.adapter_init == "original" else self.adapter_init,
            }
            for name, value in without_effect.items():
                if value is not None:
                    raise ValueError(f"{name} = {value!r} has no effect with adapter_type {kind!r}: drop it.")
            return
        if self.vision_feature_select_strategy == "full":
            raise ValueError("A resampler needs each token's place: vision_feature_select_strategy must be 'default'.")
        width = self.text_config.hidden_size
        self.num_queries = 256 if self.num_queries is None else self.num_queries
        if self.num_queries < 1 or isqrt(self.num_queries) ** 2 != self.num_queries:
            raise ValueError(
                f"num_queries = {self.num_queries} is not a square number: the queries lie on a square grid "
                f"({isqrt(max(self.num_queries, 0)) ** 2} and {(isqrt(max(self.num_queries, 0)) + 1) ** 2} are)."
            )
        if self.adapter_num_heads is None:
            if width % 128:
                raise ValueError(
                    f"A resampler has hidden_size // 128 heads, but the language model's hidden_size = {width} is not "
                    "a multiple of 128: give adapter_num_heads."
                )
            self.adapter_num_heads = width // 128
        _must_divide("adapter", "hidden_size", width, "adapter_num_heads", self.adapter_num_heads)
        _must_divide("adapter", "hidden_size (two axes of sines and cosines)", width, "4", 4)

    @property
    def num_image_tokens(self) -> int:
        """Placeholders per picture of `vision_config.image_size`."""
        if self.num_queries is not None:
            return self.num_queries
        num_patches = (self.vision_config.image_size // self.vision_config.patch_size) ** 2
        if self.vision_feature_select_strategy == "full":
            return num_patches + NUM_PREFIX_TOKENS[self.vision_config.model_type]
        return num_patches

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config.get("model_type") == "qwen":
            # Translated here and not only in __init__, or transformers would warn about a foreign model_type.
            config = native_config(config) | {"model_type": cls.model_type}
        return config, kwargs


class QwenVLOriginalConfig(QwenVLConfig):
    """What `AutoConfig` finds for `model_type` "qwen": it reads the original config and returns a `QwenVLConfig`."""

    model_type = "qwen"

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        return QwenVLConfig.from_dict(config_dict, **kwargs)


def _must_divide(where: str, whole_name: str, whole: int, part_name: str, part: int) -> None:
    if part < 1 or whole % part:
        raise ValueError(f"{where}: {whole_name} = {whole} is not a multiple of {part_name} = {part}.")


for _config_class in (QwenVLConfig, QwenVLVisionConfig, QwenVLTextConfig, QwenVLOriginalConfig):
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
