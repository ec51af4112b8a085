"""Joining towers and language models of other kinds by a fresh adapter."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from modeling_qwenvl import QwenVLConfig, QwenVLForConditionalGeneration, add_image_tokens

VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"image_size": 20, "patch_size": 5}
TEXT = {"hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
TEXT |= {"num_key_value_heads": 1, "vocab_size": 41, "bos_token_id": 0, "eos_token_id": 1}
from_vision_text = QwenVLForConditionalGeneration.from_vision_text_pretrained


def clip() -> CLIPVisionModel:
    return CLIPVisionModel(CLIPVisionConfig(**VISION)).eval()


def siglip() -> SiglipVisionModel:
    return SiglipVisionModel(SiglipVisionConfig(**VISION)).eval()


def llama(**fields) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**TEXT, **fields)).eval()


def qwen2(**fields) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(Qwen2Config(**TEXT, **fields)).eval()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(39)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), unk_token="w0")


def question(model: QwenVLForConditionalGeneration, num_pictures: int = 2) -> dict[str, torch.Tensor]:
    config = model.config
    picture = [
        config.image_start_token_id,
        *[config.image_token_id] * config.num_image_tokens,
        config.image_end_token_id,
    ]
    ids = torch.tensor([[2, 3, *picture * num_pictures, 4, 5]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(num_pictures, 3, 20, 20),
    }


@pytest.mark.parametrize("text", [llama, qwen2])
@pytest.mark.parametrize("vision", [clip, siglip])
@pytest.mark.parametrize(
    "fields",
    [
        {"adapter": "mlp", "vision_feature_layer": -2},
        {"adapter": "linear"},
        {"adapter": "resampler", "num_queries": 4, "adapter_num_heads": 3},
    ],
    ids=lambda fields: fields["adapter"],
)
def test_any_tower_adapter_and_language_model_answer_train_and_reload(vision, text, fields, tmp_path):
    model = from_vision_text(vision(), text(), **fields)
    inputs = question(model)
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert ids.shape[1] > inputs["input_ids"].shape[1]
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    # The tower's last layers are unused where the adapter reads an earlier one, or a pooling head of its own.
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(name.startswith("model.visual") for name in without)
    assert any(name.startswith("model.visual") for name, p in model.named_parameters() if p.grad is not None)
    model.save_pretrained(tmp_path)
    loaded, report = QwenVLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_the_adapter_reads_the_chosen_layer_and_patch_tokens():
    tower = clip()
    hidden = tower(pixels := torch.randn(1, 3, 20, 20), output_hidden_states=True).hidden_states
    expected = {
        (-2, "default"): hidden[-2][:, 1:],
        (1, "default"): hidden[1][:, 1:],
        (-2, "full"): hidden[-2],
    }
    for (layer, strategy), features in expected.items():
        fields = {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy}
        model = from_vision_text(tower, llama(), adapter="linear", **fields)
        seen = model.get_image_features(pixels)
        assert torch.equal(seen.last_hidden_state, features)
        assert len(seen.pooler_output[0]) == model.config.num_image_tokens == features.shape[1]
        torch.testing.assert_close(seen.pooler_output[0], model.model.adapter.linear(features[0]))


@torch.no_grad()
def test_a_tower_that_interpolates_takes_larger_pictures():
    model = from_vision_text(clip(), llama(), adapter="mlp")
    larger = torch.randn(1, 3, 30, 20)
    with pytest.raises(ValueError, match="doesn't match model"):
        model.get_image_features(larger)
    encoded = model.get_image_features(larger, interpolate_pos_encoding=True)
    assert encoded.pooler_output[0].shape == (6 * 4, 36)
    config = model.config
    ids = torch.tensor([[config.image_start_token_id, *[config.image_token_id] * 24, config.image_end_token_id]])
    assert model(ids, mm_encoder_outputs={"image": encoded}).logits.shape == (1, 26, 44)


@torch.no_grad()
@pytest.mark.parametrize("text", [llama, qwen2])
def test_text_alone_gives_the_logits_of_the_language_model_alone(text):
    ids = torch.tensor([[7, 8, 9, 10]])
    language_model = text()
    expected = language_model(ids).logits
    model = from_vision_text(clip(), language_model, adapter="mlp")
    torch.testing.assert_close(model(ids).logits[..., :41], expected)


def test_the_given_tokenizer_learns_the_tokens_and_the_embeddings_grow(tokenizer):
    model = from_vision_text(clip(), llama(), adapter="mlp", tokenizer=tokenizer, extra_tokens=("<box>", "</box>"))
    assert tokenizer.convert_tokens_to_ids(["<img>", "</img>", "<imgpad>", "<box>", "</box>"]) == [39, 40, 41, 42, 43]
    assert model.get_input_embeddings().weight.shape == model.lm_head.weight.shape == (44, 36)
    assert model.config.text_config.vocab_size == 44
    ids = (model.config.image_start_token_id, model.config.image_end_token_id, model.config.image_token_id)
    assert ids == (39, 40, 41)


def test_rows_that_a_vocabulary_has_to_spare_are_used_and_never_taken_away(tokenizer):
    model = from_vision_text(
        clip(), LlamaForCausalLM(LlamaConfig(**TEXT | {"vocab_size": 64})), adapter="mlp", tokenizer=tokenizer
    )
    assert model.config.image_token_id == 41
    assert model.lm_head.weight.shape == (64, 36)


def test_tokens_that_a_tokenizer_knows_keep_their_ids(tokenizer):
    ids = add_image_tokens(tokenizer)
    assert ids == {"image_start_token_id": 39, "image_end_token_id": 40, "image_token_id": 41}
    assert add_image_tokens(tokenizer) == ids
    assert len(tokenizer) == 42


def test_a_misspelt_setting_is_refused():
    with pytest.raises(ValueError, match="no field num_querys"):
        from_vision_text(clip(), llama(), adapter="resampler", num_querys=4)


def test_without_a_tokenizer_the_tokens_follow_the_last_embedding():
    model = from_vision_text(clip(), llama(), adapter="mlp")
    ids = (model.config.image_start_token_id, model.config.image_end_token_id, model.config.image_token_id)
    assert ids == (41, 42, 43)
    assert model.lm_head.weight.shape == (44, 36)


def test_the_language_models_generation_settings_are_kept():
    language_model = llama()
    language_model.generation_config.max_new_tokens = 17
    assert from_vision_text(clip(), language_model, adapter="mlp").generation_config.max_new_tokens == 17


def test_extra_tokens_need_a_tokenizer():
    with pytest.raises(ValueError, match=r"'<box>'.*need the tokenizer"):
        from_vision_text(clip(), llama(), adapter="mlp", extra_tokens=("<box>",))


@torch.no_grad()
def test_parts_are_read_from_folders(tokenizer, tmp_path):
    text_config = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole_clip = CLIPModel(CLIPConfig(text_config=text_config, vision_config=VISION)).eval()
    whole_clip.save_pretrained(tmp_path / "clip")
    language_model = qwen2()
    language_model.save_pretrained(tmp_path / "qwen2")
    tokenizer.save_pretrained(tmp_path / "qwen2")
    model = from_vision_text(str(tmp_path / "clip"), str(tmp_path / "qwen2"), adapter="mlp", vision_feature_layer=-2)
    pixels = torch.randn(1, 3, 20, 20)
    expected = whole_clip.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(model.get_image_features(pixels).last_hidden_state, expected)
    assert torch.equal(model.lm_head.weight[:41], language_model.lm_head.weight)
    # The folder's tokenizer says where the tokens go, so that adding them again finds the same ids.
    again = AutoTokenizer.from_pretrained(tmp_path / "qwen2")
    assert model.config.image_token_id == add_image_tokens(again)["image_token_id"]
    half = from_vision_text(str(tmp_path / "clip"), str(tmp_path / "qwen2"), adapter="mlp", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_our_own_tower_is_taken_from_a_model_or_a_folder(tiny_model, tmp_path):
    qwen_vl = tiny_model()
    qwen_vl.save_pretrained(tmp_path / "whole")
    qwen_vl.model.visual.save_pretrained(tmp_path / "tower")
    pixels = torch.randn(1, 3, 28, 28)
    expected = qwen_vl.model.visual(pixels).last_hidden_state
    for vision in (qwen_vl, qwen_vl.model.visual, str(tmp_path / "whole"), str(tmp_path / "tower")):
        model = from_vision_text(vision, llama(), num_queries=9, adapter_num_heads=3)
        assert torch.equal(model.get_image_features(pixels).last_hidden_state, expected)
        assert model.config.vision_config.model_type == "qwen_vl_vision"


def test_a_fresh_adapter_is_initialised_and_alone_new(tiny_model):
    model = from_vision_text(tiny_model(), llama(), num_queries=4, adapter_num_heads=1, adapter_init="local")
    adapter = model.model.adapter
    assert adapter.positions.table.abs().max() <= 1
    assert not adapter.positions.table.requires_grad
    assert not any(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert (adapter.ln_kv.weight == 0).sum() == 8  # two frequencies, sine and cosine, two axes
    assert not model.training


@pytest.mark.parametrize("tie", [False, True])
def test_a_language_model_with_other_names_keeps_its_tied_head(tie, tmp_path):
    config = GPT2Config(
        vocab_size=41, n_embd=36, n_layer=1, n_head=3, bos_token_id=0, eos_token_id=1, tie_word_embeddings=tie
    )
    model = from_vision_text(siglip(), GPT2LMHeadModel(config).eval(), adapter="linear")
    assert (model.lm_head.weight is model.model.language_model.wte.weight) == tie
    model.save_pretrained(tmp_path)
    loaded, report = QwenVLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert (loaded.lm_head.weight is loaded.model.language_model.wte.weight) == tie
    inputs = question(model)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lambda: GraniteForCausalLM(GraniteConfig(**TEXT, logits_scaling=3.0)), "logits_scaling = 3.0"),
        (lambda: PhiForCausalLM(PhiConfig(**TEXT | {"num_key_value_heads": 3})), "'phi' has a bias in its head"),
    ],
)
def test_heads_that_do_more_than_multiply_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        from_vision_text(clip(), text(), adapter="mlp")


def test_a_language_model_that_changes_its_logits_unsaid_is_refused():
    class Doubled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = 2 * outputs.logits
            return outputs

    with pytest.raises(ValueError, match="Doubled does something to its logits"):
        from_vision_text(clip(), Doubled(LlamaConfig(**TEXT)), adapter="mlp")


def test_a_config_alone_composes_too():
    config = QwenVLConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION},
        text_config={"model_type": "llama", **TEXT},
        adapter_type="mlp",
        image_token_id=40,
        image_start_token_id=38,
        image_end_token_id=39,
    )
    model = QwenVLForConditionalGeneration(config).eval()
    assert model(**question(model)).logits.shape == (1, 2 + 2 * 18 + 2, 41)
