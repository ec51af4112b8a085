"""Original checkpoints: every key and shape, read from every kind of file, written back bit for bit."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
)

from modeling_qwenvl import (
    QwenVLConfig,
    QwenVLForConditionalGeneration,
    QwenVLModel,
    parameter_counts,
    parameter_table,
    to_original_state_dict,
    write_original_checkpoint,
)

# The sizes of Qwen/Qwen-VL and Qwen/Qwen-VL-Chat.
REAL = {
    "model_type": "qwen",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 22016,
    "visual": {
        "width": 1664,
        "layers": 48,
        "heads": 16,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "image_size": 448,
        "patch_size": 14,
        "image_start_id": 151857,
    },
}


@pytest.fixture(scope="module")
def real_model() -> QwenVLForConditionalGeneration:
    with torch.device("meta"):
        return QwenVLForConditionalGeneration(QwenVLConfig.from_dict(dict(REAL)))


def shapes(state_dict: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


def test_the_real_model_has_the_853_keys_and_shapes_of_the_checkpoint(real_model, shapes_of_original):
    expected = shapes_of_original(REAL)
    assert len(expected) == 853
    assert shapes(to_original_state_dict(real_model)) == expected


def test_the_default_config_is_the_real_one(real_model):
    assert QwenVLConfig().to_dict() == real_model.config.to_dict() | {"_name_or_path": ""}


def test_the_real_model_has_9_656_935_168_parameters(real_model):
    assert sum(p.numel() for p in real_model.parameters()) == 9_656_935_168
    assert {part: count for part, (count, _) in parameter_counts(real_model).items()} == {
        "vision tower": 1_842_770_688,
        "adapter": 92_839_936,
        "language model": 7_721_324_544,
        "total": 9_656_935_168,
    }
    assert parameter_table(real_model).splitlines()[-1].split() == ["total", "9,656,935,168", "9,655,886,592"]


def test_the_recorded_key_list_and_config_agree(shared, shapes_of_original):
    keys = (shared / "reference/checkpoint_keys.txt").read_text().split()
    assert set(keys) == set(shapes_of_original(REAL))
    for name in ("Qwen-VL", "Qwen-VL-Chat"):
        config = AutoConfig.from_pretrained(shared / "tokenizers/qwen-vl" / name)
        assert config.to_dict() | {"_name_or_path": "", "dtype": None} == QwenVLConfig().to_dict() | {"dtype": None}


def test_weights_come_back_bit_for_bit(original, recording):
    back = to_original_state_dict(original)
    assert back.keys() == recording.weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in recording.weights.items())


def test_weights_come_back_bit_for_bit_through_native_files(original, recording, tmp_path):
    original.save_pretrained(tmp_path)
    back = to_original_state_dict(QwenVLForConditionalGeneration.from_pretrained(tmp_path))
    assert back.keys() == recording.weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in recording.weights.items())


def test_a_native_model_writes_original_names_too(tiny_model, shapes_of_original):
    model = tiny_model(
        adapter_num_heads=1,
        text_config={"hidden_size": 128},
        vision_config={"position_grid": 16, "patch_size": 14},
    )
    config = {"hidden_size": 128, "vocab_size": 97, "num_hidden_layers": 2, "intermediate_size": 160}
    visual = {"width": 32, "layers": 3, "mlp_ratio": 1.5, "output_dim": 128, "patch_size": 14, "n_queries": 4}
    assert shapes(to_original_state_dict(model)) == shapes_of_original(config | {"visual": visual})


@pytest.mark.parametrize("is_safe", [False, True], ids=["bin", "safetensors"])
def test_sharded_original_files_are_written_and_read(recording, original, tmp_path, is_safe):
    write_original_checkpoint(original, tmp_path, max_shard_size="300KB", safe_serialization=is_safe)
    files = sorted(tmp_path.glob("*.safetensors" if is_safe else "*.bin"))
    assert len(files) > 3
    written: dict[str, torch.Tensor] = {}
    for file in files:
        written |= load_file(file) if is_safe else torch.load(file, weights_only=True)
    assert all(torch.equal(written[name], tensor) for name, tensor in recording.weights.items())
    (index,) = tmp_path.glob("*.index.json")
    assert set(json.loads(index.read_text())["weight_map"]) == set(recording.weights)
    loaded, report = QwenVLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(p, loaded.state_dict()[name]) for name, p in original.state_dict().items())


@pytest.mark.parametrize("auto_class", [AutoModelForImageTextToText, AutoModelForCausalLM, AutoModel])
def test_auto_classes_read_the_original_folder(recording, original, auto_class):
    model, report = auto_class.from_pretrained(recording.folder, output_loading_info=True)
    assert type(model) is (QwenVLModel if auto_class is AutoModel else QwenVLForConditionalGeneration)
    assert report["missing_keys"] == set()
    layer = "language_model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(model.base_model.state_dict()[layer], original.model.state_dict()[layer])


@pytest.mark.parametrize(("chat_format", "stops"), [("chatml", [151643, 151644, 151645]), ("raw", 151643)])
def test_generation_stops_where_the_original_chat_stops(original, tmp_path, chat_format, stops):
    write_original_checkpoint(original, tmp_path)
    settings = {"chat_format": chat_format, "eos_token_id": 151643, "pad_token_id": 151643, "max_window_size": 6144}
    settings |= {"do_sample": True, "top_k": 0, "top_p": 0.3, "max_new_tokens": 512}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    model = QwenVLForConditionalGeneration.from_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == stops
    model.save_pretrained(tmp_path / "native")
    again = QwenVLForConditionalGeneration.from_pretrained(tmp_path / "native")
    assert again.generation_config.eos_token_id == stops


def test_an_original_checkpoint_is_saved_under_native_names(original, tmp_path):
    original.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == set(original.state_dict())
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen_vl"
    with pytest.raises(ValueError, match="write_original_checkpoint"):
        original.save_pretrained(tmp_path, save_original_format=True)


def test_saved_names_are_those_of_the_modules_so_that_a_trainer_can_resume(original, tmp_path):
    original.save_pretrained(tmp_path)
    report = original.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert not report.missing_keys


LOAD_AND_COMPARE = """
import sys, torch
import modeling_qwenvl
from transformers import AutoModelForImageTextToText
inputs, expected = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected), folder
print("same logits")
"""


@pytest.mark.slow
def test_a_new_process_elsewhere_reads_both_layouts_and_gives_the_same_logits(original, recording, tmp_path):
    inputs = recording.inputs("two_images")
    with torch.no_grad():
        torch.save((inputs, original(**inputs).logits), tmp_path / "expected.pt")
    original.save_pretrained(tmp_path / "native")
    write_original_checkpoint(original, tmp_path / "original")
    folders = [str(tmp_path / name) for name in ("expected.pt", "native", "original")]
    command = [sys.executable, "-c", LOAD_AND_COMPARE, *folders]
    result = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "same logits", result.stderr


def test_what_the_original_format_cannot_say_is_refused(tiny_model):
    with pytest.raises(ValueError, match="position_grid is 3; the original checkpoint format can only say 16"):
        to_original_state_dict(tiny_model())
    clip = CLIPVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    config = QwenVLConfig(vision_config=clip)
    with torch.device("meta"):
        model = QwenVLForConditionalGeneration(config)
    with pytest.raises(ValueError, match="'clip_vision_model'"):
        to_original_state_dict(model)


def test_missing_tensors_are_initialised_and_reported(recording, tmp_path):
    """Also the fixed table, which nothing but initialisation could fill."""
    partial = {name: t for name, t in recording.weights.items() if "attn_pool" not in name}
    (tmp_path / "config.json").write_text(json.dumps(recording.config))
    save_file(partial, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, report = QwenVLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {
        name
        for name in model.state_dict()
        if "adapter" in name and not name.endswith(("ln_post.weight", "ln_post.bias"))
    } - {"model.adapter.proj.weight"}
    table = model.model.adapter.positions.table
    assert torch.allclose(table, recording.weights["transformer.visual.attn_pool.pos_embed"], atol=1e-6)
    assert not table.requires_grad
    assert 0.015 < model.model.adapter.query.std() < 0.025
