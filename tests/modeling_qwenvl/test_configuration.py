"""The configuration reads both forms, derives its sizes and refuses what cannot work, with the numbers."""

import json

import pytest
from transformers import AutoConfig, BertConfig, CLIPConfig, CLIPVisionConfig, Gemma2Config, GraniteConfig, LlamaConfig

from modeling_qwenvl import QwenVLConfig, QwenVLTextConfig, QwenVLVisionConfig
from modeling_qwenvl.original_config import native_config, original_config

ORIGINAL = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "model_type": "qwen",
    "hidden_size": 256,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "kv_channels": 128,
    "intermediate_size": 44,
    "vocab_size": 500,
    "seq_length": 77,
    "torch_dtype": "bfloat16",
    "visual": {"width": 48, "layers": 5, "heads": 3, "mlp_ratio": 4.9231, "output_dim": 256, "image_start_id": 301},
}


def changed(**changes) -> dict:
    return json.loads(json.dumps(ORIGINAL)) | changes


def test_the_original_config_becomes_a_native_one():
    config = QwenVLConfig.from_dict(changed())
    assert config.model_type == "qwen_vl"
    assert config.auto_map == {}
    assert (config.image_start_token_id, config.image_end_token_id, config.image_token_id) == (301, 302, 303)
    assert (config.num_queries, config.num_image_tokens, config.adapter_num_heads) == (256, 256, 2)
    assert (config.text_config.intermediate_size, config.text_config.seq_length) == (22, 77)
    assert config.text_config.num_key_value_heads == 2
    assert (config.vision_config.intermediate_size, config.vision_config.image_size) == (236, 448)
    assert (config.vision_config.grid_size, config.vision_config.num_patches) == (32, 1024)
    assert str(config.dtype) == "torch.bfloat16"


def test_every_way_of_reading_the_original_config_gives_the_same(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL))
    by_auto, by_class, by_keywords = (
        config.to_dict() | {"_name_or_path": ""}
        for config in (
            AutoConfig.from_pretrained(tmp_path),
            QwenVLConfig.from_pretrained(tmp_path),
            QwenVLConfig(**changed()),
        )
    )
    assert by_auto == by_class == by_keywords
    assert by_auto["model_type"] == "qwen_vl"


def test_a_native_config_survives_saving(tmp_path, tiny_config):
    config = tiny_config(adapter_init="local", vision_feature_layer=-2, run_tower_on_text_only_batches=True)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is QwenVLConfig
    assert again.to_dict() | {"_name_or_path": ""} == config.to_dict()


def test_the_original_config_survives_the_way_there_and_back():
    back = original_config(QwenVLConfig.from_dict(changed()))
    assert {key: back[key] for key in ORIGINAL if key != "visual"} == {
        k: v for k, v in ORIGINAL.items() if k != "visual"
    }
    assert native_config(back)["vision_config"] == native_config(changed())["vision_config"]


def test_the_ratio_of_the_towers_mlp_is_written_so_that_its_width_comes_back():
    for width, intermediate in ((48, 100), (48, 236), (1664, 8192), (7, 29)):
        config = QwenVLConfig.from_dict(changed())
        config.vision_config.hidden_size, config.vision_config.intermediate_size = width, intermediate
        assert native_config(original_config(config))["vision_config"]["intermediate_size"] == intermediate


def test_own_auto_map_entries_are_kept_and_the_original_repositorys_dropped():
    auto_map = {
        "AutoConfig": "configuration_qwenvl.QwenVLConfig",
        "AutoModel": "Qwen/Qwen-VL--modeling_qwen.QWenModel",
    }
    assert QwenVLConfig(auto_map=auto_map).auto_map == {"AutoConfig": "configuration_qwenvl.QwenVLConfig"}
    assert QwenVLConfig(auto_map=None).auto_map == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_bias": False}, "no_bias=False is not supported"),
        ({"rotary_pct": 0.5}, "rotary_pct=0.5 is not supported"),
        ({"kv_channels": 64}, "= 128 differs from hidden_size = 256"),
        ({"hidden_size": 128, "kv_channels": 64}, "output_dim = 256 differs from hidden_size = 128"),
    ],
)
def test_original_settings_that_the_model_lacks_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        QwenVLConfig.from_dict(changed(**changes))


def test_a_text_only_qwen_is_refused(tmp_path):
    text_only = changed()
    del text_only["visual"]
    (tmp_path / "config.json").write_text(json.dumps(text_only))
    for read in (AutoConfig.from_pretrained, QwenVLConfig.from_pretrained):
        with pytest.raises(ValueError, match="text-only Qwen"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapter_type": "qformer"}, "'qformer' is unknown: one of resampler, mlp, linear"),
        ({"adapter_init": "random"}, "'random' is unknown"),
        ({"num_queries": 17}, "17 is not a square number.*16 and 25 are"),
        ({"num_queries": 0}, "0 is not a square number"),
        ({"adapter_type": "mlp", "num_queries": 16}, "num_queries = 16 has no effect with adapter_type 'mlp'"),
        ({"adapter_type": "linear", "adapter_init": "local"}, "adapter_init = 'local' has no effect"),
        ({"adapter_num_heads": 3}, "hidden_size = 4096 is not a multiple of adapter_num_heads = 3"),
        ({"vision_feature_select_strategy": "cls"}, "'cls' is unknown"),
        ({"vision_feature_select_strategy": "full"}, "must be 'default'"),
        ({"vision_feature_layer": 49}, "49 is outside the tower's 49 hidden states .-49 to 48."),
        ({"image_token_id": 151936}, "image_token_id = 151936 is outside the vocabulary of 151936"),
        ({"image_token_id": 151857}, "must differ"),
        ({"text_config": LlamaConfig(hidden_size=96, num_attention_heads=3)}, "image_token_id = 151859.*32000"),
        ({"vision_config": CLIPConfig()}, "'clip' has no hidden_size, image_size, patch_size"),
        ({"text_config": CLIPVisionConfig()}, "'clip_vision_model' has no vocab_size"),
        ({"text_config": Gemma2Config()}, "final_logit_softcapping = 30.0"),
        ({"text_config": GraniteConfig(logits_scaling=8.0)}, "logits_scaling = 8.0"),
        ({"text_config": BertConfig()}, "'bert' is not a causal language model"),
        ({"text_config": {"model_type": "phi"}}, "'phi' has a bias in its head"),
    ],
)
def test_what_cannot_work_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        QwenVLConfig(**fields)


def test_a_resampler_on_an_odd_width_needs_its_heads(tiny_config):
    with pytest.raises(ValueError, match="hidden_size = 64 is not a multiple of 128: give adapter_num_heads"):
        tiny_config(adapter_num_heads=None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QwenVLVisionConfig(hidden_size=10, num_attention_heads=3), "hidden_size = 10 is not a multiple"),
        (lambda: QwenVLVisionConfig(image_size=30), "image_size = 30 is not a multiple of patch_size = 14"),
        (lambda: QwenVLTextConfig(hidden_size=10, num_attention_heads=4), "hidden_size = 10 is not a multiple"),
        (lambda: QwenVLTextConfig(seq_length=1), "seq_length = 1"),
        (
            lambda: QwenVLTextConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            "rope_type 'linear'",
        ),
    ],
)
def test_parts_refuse_sizes_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_tokens_per_picture_follow_the_adapter_and_the_tower():
    clip = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 7}
    assert QwenVLConfig(vision_config=clip, num_queries=9).num_image_tokens == 9
    assert QwenVLConfig(vision_config=clip, adapter_type="mlp").num_image_tokens == 16
    with_class_token = QwenVLConfig(vision_config=clip, adapter_type="mlp", vision_feature_select_strategy="full")
    assert with_class_token.num_image_tokens == 17


def test_tied_embeddings_said_by_either_config_hold_for_both():
    assert QwenVLConfig(text_config={"tie_word_embeddings": True}).tie_word_embeddings
    assert QwenVLConfig(tie_word_embeddings=True).text_config.tie_word_embeddings
    assert not QwenVLConfig().text_config.tie_word_embeddings
