"""Both layouts, there and back: every tensor, every kind of file, little memory, and nothing that only looks whole."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

import trainers.convert
from modeling_qwenvl import (
    QwenVLConfig,
    QwenVLForConditionalGeneration,
    to_original_state_dict,
    write_original_checkpoint,
)
from modeling_qwenvl.original_config import original_config
from processing.processing_families import load_processor
from processing.special_tokens import QWEN_VL_SPECIAL_TOKENS
from processing.tokenization_qwenvl import QWenTokenizer, train_qwenvl_tokenizer
from trainers.cli import app
from trainers.convert import convert
from trainers.convert_companions import rank_file
from trainers.convert_files import SafetensorsWriter, TensorFolder, TensorInfo
from trainers.convert_layout import Layouts


def tiny_config(vocabulary=512, **text):
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": vocabulary, "hidden_size": 128, "intermediate_size": 80, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64} | text  # fmt: skip
    return QwenVLConfig(
        vision_config={"model_type": "qwen_vl_vision", "image_size": 28, "patch_size": 14, **vision},
        text_config={"model_type": "qwen_vl_text", **text},
        num_queries=4, image_start_token_id=501, image_end_token_id=502, image_token_id=503,
    )  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return QwenVLForConditionalGeneration(tiny_config()).to(torch.bfloat16)


@pytest.fixture
def original(tmp_path, model):
    """An original folder in safetensors shards, with the files of Qwen-VL-Chat beside them."""
    folder = tmp_path / "original"
    model.config.dtype = torch.bfloat16
    write_original_checkpoint(model, folder, max_shard_size="100KB", safe_serialization=True)
    settings = {"chat_format": "chatml", "eos_token_id": 151643, "pad_token_id": 151643, "max_new_tokens": 512}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    (folder / "qwen.tiktoken").write_bytes(rank_file(train_qwenvl_tokenizer(["a dog and a cat"] * 3, 480)))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "QWenTokenizer"}')
    (folder / "LICENSE").write_text("terms")
    return folder


def tensors_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_an_original_folder_becomes_what_from_pretrained_reads_from_it(tmp_path, original, model):
    found = convert(original, tmp_path / "native")
    assert found.direction == "to native"
    assert len(list((tmp_path / "native").glob("*.safetensors"))) == len(list(original.glob("*.safetensors"))) > 3
    assert_equal(tensors_of(tmp_path / "native"), model.state_dict())
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert not any(report.values())
    assert loaded.dtype == torch.bfloat16
    same = {"_name_or_path": "", "architectures": []}
    from_original = AutoModelForImageTextToText.from_pretrained(original)
    assert loaded.config.to_dict() | same == from_original.config.to_dict() | same


def test_bin_shards_are_read_too(tmp_path, model):
    write_original_checkpoint(model, tmp_path / "original", max_shard_size="100KB")
    assert len(list((tmp_path / "original").glob("*.bin"))) > 3
    found = convert(tmp_path / "original", tmp_path / "native")
    assert_equal(tensors_of(tmp_path / "native"), model.state_dict())
    assert "no tokenizer" in found.notes[0]


def test_there_and_back_is_the_same_folder(tmp_path, original):
    there = convert(original, tmp_path / "native")
    back = convert(tmp_path / "native", tmp_path / "back")
    assert_equal(tensors_of(tmp_path / "back"), tensors_of(original))
    for name in ("qwen.tiktoken", "LICENSE"):
        assert (tmp_path / "back" / name).read_bytes() == (original / name).read_bytes()
    for name in ("generation_config.json", "config.json"):
        ours, theirs = (json.loads((folder / name).read_text()) for folder in (tmp_path / "back", original))
        ours.pop("transformers_version", None)
        assert ours == theirs
    assert back.direction == "to original"
    again = convert(tmp_path / "back", tmp_path / "again")
    assert again.hashes == there.hashes
    assert json.loads((tmp_path / "again" / "conversion.json").read_text())["tensors"] == there.hashes


def test_the_converted_folder_has_the_chats_stop_words_and_a_processor(tmp_path, original):
    convert(original, tmp_path / "native")
    settings = json.loads((tmp_path / "native" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [151643, 151644, 151645]
    processor = load_processor(tmp_path / "native")
    assert processor.num_image_tokens == 4
    assert processor.tokenizer("a dog")["input_ids"] == load_processor(original).tokenizer("a dog")["input_ids"]


def test_parts_of_one_tensor_may_lie_in_different_shards(tmp_path, model):
    """Query, key and value of a layer are one tensor there."""
    model.save_pretrained(tmp_path / "native", max_shard_size="40KB")
    files = TensorFolder(tmp_path / "native")
    layer = "model.language_model.layers.0.self_attn"
    assert len({files.shard_of[f"{layer}.{name}_proj.weight"] for name in "qkv"}) > 1
    convert(tmp_path / "native", tmp_path / "original")
    assert_equal(tensors_of(tmp_path / "original"), to_original_state_dict(model))


def test_each_native_tensor_is_in_one_group_of_the_real_model():
    groups = Layouts(QwenVLConfig()).groups
    assert len(groups) == 853
    assert sum(len(group.natives) for group in groups) == 853 + 2 * (2 * 32 + 2)
    fused = {group.original for group in groups if len(group.natives) == 3}
    assert len(fused) == 32 * 2 + 2


@pytest.mark.parametrize("layout", ["bin", "safetensors"])
def test_a_missing_an_unknown_and_a_misshapen_tensor_are_refused(tmp_path, model, layout):
    write_original_checkpoint(model, tmp_path / "original", safe_serialization=layout == "safetensors")
    path = tmp_path / "original" / ("model.safetensors" if layout == "safetensors" else "pytorch_model.bin")
    weights = load_file(path) if layout == "safetensors" else torch.load(path)
    save = save_file if layout == "safetensors" else torch.save
    name = "transformer.h.1.mlp.w2.weight"
    kept = {key: tensor for key, tensor in weights.items() if key != name}
    for wrong, message in [
        (kept, rf"missing: {name}; unknown: none"),
        (weights | {"base_model.x": torch.ones(2)}, r"missing: none; unknown: base_model\.x"),
        (weights | {name: weights[name].T.contiguous()}, rf"{name} has shape \(128, 80\), but config.json asks"),
    ]:  # fmt: skip
        save(wrong, path)
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "original", tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_quantised_weights_are_refused(tmp_path, model):
    model.save_pretrained(tmp_path / "native")
    path = tmp_path / "native" / "model.safetensors"
    save_file(load_file(path) | {"model.adapter.proj.weight": torch.ones(2, dtype=torch.uint8)}, path)
    with pytest.raises(ValueError, match=r"proj\.weight is of type U8; only floating-point"):
        convert(tmp_path / "native", tmp_path / "original")


def test_an_index_that_names_other_tensors_than_the_shards_hold_is_refused(original, tmp_path):
    path = original / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["transformer.x"] = index["weight_map"].pop("transformer.ln_f.weight")
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"missing: transformer\.x; not in the index: transformer\.ln_f\.weight"):
        convert(original, tmp_path / "native")
    next(iter(original.glob("*00002-of*"))).unlink()
    with pytest.raises(ValueError, match=r"names (\d+) shards, \d+ are here; missing: model-00002"):
        convert(original, tmp_path / "native")


@pytest.mark.parametrize("step", ["convert", "check"])
def test_an_interrupted_conversion_leaves_nothing_that_looks_whole(tmp_path, original, step):
    def stop(name, done, total):
        if name == step and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(original, tmp_path / "native", on_tensor=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


@pytest.mark.slow
def test_what_a_killed_process_leaves_is_hidden_and_removed_by_the_next(tmp_path, original):
    """A kill leaves the work folder as it is: no cleaning runs."""
    code = (
        "import os, sys\nfrom trainers.convert import convert\n"
        "def die(name, done, total):\n    os._exit(9) if name == 'check' else None\n"
        "convert(sys.argv[1], sys.argv[2], die)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(original), str(tmp_path / "native")])
    assert done.returncode == 9
    assert {path.name for path in tmp_path.iterdir()} == {"original", ".native.unfinished"}
    convert(original, tmp_path / "native")
    assert {path.name for path in tmp_path.iterdir()} == {"original", "native"}


def test_a_tensor_that_was_written_wrong_is_found_by_its_hash(tmp_path, original, monkeypatch):
    write = trainers.convert.SafetensorsWriter.write

    def flip_a_bit(self, name, tensor):
        if name == "model.language_model.layers.1.self_attn.k_proj.bias":
            tensor = tensor.clone()
            tensor.view(torch.int16)[3] ^= 1
        write(self, name, tensor)

    monkeypatch.setattr(trainers.convert.SafetensorsWriter, "write", flip_a_bit)
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.attn\.c_attn\.bias did not come back as it was"):
        convert(original, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_other_models_and_full_folders_are_refused(tmp_path, original):
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        convert(tmp_path / "other", tmp_path / "native")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ValueError, match="has model_type 'llava': only Qwen-VL has two layouts"):
        convert(tmp_path / "other", tmp_path / "native")
    with pytest.raises(ValueError, match="exists and is not empty"):
        convert(original, tmp_path / "other")


def test_a_vocabulary_that_the_original_tokenizer_cannot_hold_is_refused():
    tokenizer = train_qwenvl_tokenizer(["a"], 480)
    tokenizer.add_tokens(["<cell>"])
    with pytest.raises(ValueError, match="last 217 tokens are not the original's"):
        rank_file(tokenizer)


def test_the_real_rank_file_comes_back_byte_for_byte(shared, tmp_path):
    path = shared / "tokenizers/qwen-vl/qwen.tiktoken"
    shutil.copy(path, tmp_path)
    tokenizer = QWenTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 151_643 + len(QWEN_VL_SPECIAL_TOKENS)
    assert rank_file(tokenizer) == path.read_bytes()


def test_the_command_converts_and_says_what_is_missing(tmp_path, model):
    write_original_checkpoint(model, tmp_path / "original")
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "original"), str(tmp_path / "native")])
    assert result.exit_code == 0, result.output
    assert "to native layout; each comes back bit for bit" in result.output
    assert "Note: no tokenizer" in result.output
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "original"), str(tmp_path / "native")])
    assert result.exit_code == 2
    assert "is not empty" in result.output


SHARD = 500_000_000
# VmHWM and not ru_maxrss: a new process starts with the ru_maxrss of the one that started it.
CONVERT_AND_MEASURE = """
import json, sys
from pathlib import Path
from trainers.convert import convert
def highest():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = highest()
convert(sys.argv[1], sys.argv[2])
print(json.dumps([before, highest()]))
"""


@pytest.mark.slow
def test_two_gigabytes_take_no_more_memory_than_a_shard_and_a_fifth_and_one_gigabyte(tmp_path):
    if shutil.disk_usage(tmp_path).free < 8_000_000_000:
        pytest.skip("needs 8 GB of disk for a checkpoint and its conversion")
    config = tiny_config(
        vocabulary=100_000, hidden_size=2048, intermediate_size=5504, num_hidden_layers=13, num_attention_heads=16,
        num_key_value_heads=16,
    )  # fmt: skip
    layouts = Layouts(config)
    source = tmp_path / "original"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(original_config(config)))
    # Any bits will do, NaN included: what is checked is that they are the same.
    noise = torch.randint(-(2**15), 2**15, (8_000_000,), dtype=torch.int16).repeat(27).view(torch.bfloat16)
    shards: list[dict[str, TensorInfo]] = [{}]
    for name, shape in layouts.original_shapes.items():
        info = TensorInfo(shape, torch.bfloat16)
        if sum(other.num_bytes for other in shards[-1].values()) + info.num_bytes > SHARD:
            shards.append({})
        shards[-1][name] = info
    weight_map = {}
    for number, infos in enumerate(shards):
        with SafetensorsWriter(source / f"model-{number}.safetensors", infos) as file:
            for place, (name, info) in enumerate(infos.items()):
                weight_map[name] = file.path.name
                count = torch.Size(info.shape).numel()
                file.write(name, noise[7 * place : 7 * place + count].reshape(info.shape))
    sizes = [path.stat().st_size for path in source.glob("*.safetensors")]
    assert sum(sizes) >= 2_000_000_000
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    folders = [str(source), str(tmp_path / "native")]
    done = subprocess.run([sys.executable, "-c", CONVERT_AND_MEASURE, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, highest = json.loads(done.stdout)
    print(f"{sum(sizes):,} bytes in {len(sizes)} shards: {before:,} bytes before, {highest:,} at the peak")
    assert highest <= 1.2 * max(sizes) + 1_000_000_000
    # Imports and one shard, not two: the sources are let go.
    assert highest - before < 2 * max(sizes)
