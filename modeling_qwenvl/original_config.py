"""The flat config.json of the 2023 Qwen-VL, read into ours and written back. Dictionaries in, dictionaries out."""

from math import ceil
from typing import Any

# What the original files mean when they leave a key out.
ORIGINAL_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "intermediate_size": 22016,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "seq_length": 2048,
    "max_position_embeddings": 8192,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "use_cache": True,
    "initializer_range": 0.02,
    "attn_dropout_prob": 0.0,
}
VISUAL_DEFAULTS: dict[str, Any] = {"image_size": 448, "patch_size": 14, "n_queries": 256}
# Settings that the native model has one way only: (key, the value that it implements).
ONLY_VALUE: dict[str, Any] = {"no_bias": True, "rotary_pct": 1.0, "emb_dropout_prob": 0.0, "scale_attn_weights": True}
# Settings that said which kernel, precision or file to use and have no meaning for the native model.
WITHOUT_MEANING = (
    "use_flash_attn",
    "onnx_safe",
    "tokenizer_type",
    "tokenizer_class",
    "_name_or_path",
    "bf16",
    "fp16",
    "fp32",
)
REMOTE_CODE_MODULES = ("configuration_qwen", "modeling_qwen")


def native_config(original: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `QwenVLConfig` that mean what an original Qwen-VL `config.json` means.

    Args:
        original: a config with `model_type` "qwen" and the dictionary `visual`.

    Raises:
        ValueError: a text-only Qwen config, or a setting that the native model does not have.

    Example:
        >>> visual = {"width": 1664, "layers": 48, "heads": 16, "mlp_ratio": 4.9231, "output_dim": 4096}
        >>> native = native_config({"model_type": "qwen", "visual": visual | {"image_start_id": 151857}})
        >>> native["vision_config"]["intermediate_size"], native["image_token_id"]
        (8192, 151859)
    """
    if "visual" not in original:
        raise ValueError(
            "This config has model_type 'qwen' but no 'visual' dictionary: it is a text-only Qwen (Qwen-7B or -14B), "
            "which has no vision tower. Qwen-VL and Qwen-VL-Chat have it; for text alone take a Qwen2 model."
        )
    flat = ORIGINAL_DEFAULTS | original
    visual = VISUAL_DEFAULTS | flat.pop("visual")
    for key, value in ONLY_VALUE.items():
        if flat.pop(key, value) != value:
            raise ValueError(f"Original config: {key}={original[key]} is not supported, only {key}={value}.")
    head_width = flat.pop("kv_channels") * flat["num_attention_heads"]
    if head_width != flat["hidden_size"]:
        raise ValueError(
            f"Original config: kv_channels x num_attention_heads = {head_width} differs from "
            f"hidden_size = {flat['hidden_size']}; the original splits its keys by hidden_size, so they must agree."
        )
    if visual["output_dim"] != flat["hidden_size"]:
        raise ValueError(
            f"Original config: visual.output_dim = {visual['output_dim']} differs from hidden_size = "
            f"{flat['hidden_size']}; the picture's vectors replace word embeddings, so they must agree."
        )
    dtype = flat.pop("dtype", None) or flat.pop("torch_dtype", None)
    if dtype is None:
        dtype = next((d for flag, d in PRECISION_FLAGS.items() if flat.get(flag)), None)
    text = {
        "model_type": "qwen_vl_text",
        "vocab_size": flat.pop("vocab_size"),
        "hidden_size": flat.pop("hidden_size"),
        # The original counts both halves of its gated MLP.
        "intermediate_size": flat.pop("intermediate_size") // 2,
        "num_hidden_layers": flat.pop("num_hidden_layers"),
        "num_attention_heads": flat["num_attention_heads"],
        "num_key_value_heads": flat.pop("num_attention_heads"),
        "rms_norm_eps": flat.pop("layer_norm_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(flat.pop("rotary_emb_base"))},
        "attention_dropout": flat.pop("attn_dropout_prob"),
    }
    for key in (
        "seq_length",
        "max_position_embeddings",
        "use_dynamic_ntk",
        "use_logn_attn",
        "use_cache",
        "initializer_range",
    ):
        text[key] = flat.pop(key)
    vision = {
        "model_type": "qwen_vl_vision",
        "hidden_size": visual["width"],
        "intermediate_size": int(visual["width"] * visual["mlp_ratio"]),
        "num_hidden_layers": visual["layers"],
        "num_attention_heads": visual["heads"],
        "image_size": visual["image_size"],
        "patch_size": visual["patch_size"],
        "position_grid": 16,  # hard-coded in the original tower, whatever the picture's size
    }
    for key in ("model_type", "architectures", *WITHOUT_MEANING):
        flat.pop(key, None)
    return flat | {
        "vision_config": vision,
        "text_config": text,
        "adapter_type": "resampler",
        "num_queries": visual["n_queries"],
        "image_start_token_id": visual["image_start_id"],
        "image_end_token_id": visual["image_start_id"] + 1,
        "image_token_id": visual["image_start_id"] + 2,
        "dtype": dtype,
    }


PRECISION_FLAGS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def original_config(config: Any) -> dict[str, Any]:
    """The original `config.json` for a native `QwenVLConfig`; the inverse of `native_config`.

    Raises:
        ValueError: the original format has no words for this model (a foreign tower, adapter or language model).
    """
    vision, text = config.vision_config, config.text_config
    wanted = {
        "vision_config.model_type": (vision.model_type, "qwen_vl_vision"),
        "text_config.model_type": (text.model_type, "qwen_vl_text"),
        "adapter_type": (config.adapter_type, "resampler"),
        "image_end_token_id": (config.image_end_token_id, config.image_start_token_id + 1),
        "image_token_id": (config.image_token_id, config.image_start_token_id + 2),
    }
    if vision.model_type == "qwen_vl_vision":
        wanted["vision_config.position_grid"] = (vision.position_grid, 16)
        wanted["vision_config.hidden_act"] = (vision.hidden_act, "gelu")
    if text.model_type == "qwen_vl_text":
        wanted["text_config.num_key_value_heads"] = (text.num_key_value_heads, text.num_attention_heads)
        wanted["adapter_num_heads"] = (config.adapter_num_heads, text.hidden_size // 128)
    for name, (value, only) in wanted.items():
        if value != only:
            raise ValueError(f"{name} is {value!r}; the original checkpoint format can only say {only!r}.")
    precision = str(config.dtype).removeprefix("torch.") if config.dtype is not None else None
    return {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "model_type": "qwen",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": 2 * text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "kv_channels": text.hidden_size // text.num_attention_heads,
        "layer_norm_epsilon": text.rms_norm_eps,
        "rotary_emb_base": int(text.rope_parameters["rope_theta"]),
        "rotary_pct": 1.0,
        "seq_length": text.seq_length,
        "max_position_embeddings": text.max_position_embeddings,
        "use_dynamic_ntk": text.use_dynamic_ntk,
        "use_logn_attn": text.use_logn_attn,
        "use_flash_attn": False,
        "use_cache": text.use_cache,
        "no_bias": True,
        "scale_attn_weights": True,
        "attn_dropout_prob": text.attention_dropout,
        "emb_dropout_prob": 0.0,
        "initializer_range": text.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "tokenizer_type": "QWenTokenizer",
        "onnx_safe": None,
        "torch_dtype": precision,
        **{flag: precision == name for flag, name in PRECISION_FLAGS.items()},
        "visual": {
            "width": vision.hidden_size,
            "layers": vision.num_hidden_layers,
            "heads": vision.num_attention_heads,
            # The original computes int(width * mlp_ratio): round the ratio up so that the product keeps its integer.
            "mlp_ratio": ceil(vision.intermediate_size / vision.hidden_size * 1e4) / 1e4,
            "output_dim": text.hidden_size,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "image_start_id": config.image_start_token_id,
            "n_queries": config.num_queries,
        },
    }
