"""The reference's log-probabilities on disk: read where everything is as it was, refused where anything differs."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from processing.example import Example, RowError, Source
from processing.processing_families import load_processor
from trainers.reference_cache import (
    COLUMNS,
    fingerprint_of_model,
    fingerprint_of_processor,
    load_or_compute,
    row_key,
)

PRINTS = {"model": "m", "processor": "p", "max_length": "None"}


def row(picture, question="Who?", chosen="Ada", rejected="Bob", line=1):
    return Example(
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}],
        kind="preference",
        chosen=[{"role": "assistant", "content": chosen}],
        rejected=[{"role": "assistant", "content": rejected}],
        source=Source("rows.jsonl", line),
    )


@pytest.fixture
def pictures(tmp_path):
    """Two files of the same picture and one of another."""
    for name, colour in (("a", 10), ("copy of a", 10), ("b", 200)):
        Image.new("RGB", (8, 8), (colour,) * 3).save(tmp_path / f"{name}.png")
    return {name: str(tmp_path / f"{name}.png") for name in ("a", "copy of a", "b")}


def compute():
    return {name: torch.tensor([-1.5, -2.25]) for name in COLUMNS}


def must_not_compute():
    raise AssertionError("computed again")


def test_what_was_computed_once_is_read_afterwards(tmp_path, pictures):
    rows = [row(pictures["a"]), row(pictures["b"])]
    path = tmp_path / "cache" / "train.safetensors"
    first = load_or_compute(path, rows, PRINTS, compute)
    again = load_or_compute(path, rows, PRINTS, must_not_compute)
    assert {name: values.tolist() for name, values in again.items()} == {name: [-1.5, -2.25] for name in COLUMNS}
    assert first.keys() == again.keys()
    assert [file.name for file in path.parent.iterdir()] == ["train.safetensors"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "other"}, r"made with another model\. Delete"),
        ({"processor": "other", "max_length": "64"}, "made with another processor, max_length"),
    ],
)
def test_another_model_processor_or_setting_is_refused_by_name(tmp_path, pictures, changed, message):
    rows = [row(pictures["a"]), row(pictures["b"])]
    load_or_compute(tmp_path / "train.safetensors", rows, PRINTS, compute)
    with pytest.raises(ValueError, match=message):
        load_or_compute(tmp_path / "train.safetensors", rows, PRINTS | changed, must_not_compute)


def test_other_rows_are_refused_and_the_first_is_named(tmp_path, pictures):
    path = tmp_path / "train.safetensors"
    load_or_compute(path, [row(pictures["a"]), row(pictures["b"])], PRINTS, compute)
    with pytest.raises(ValueError, match=r"1 of 2 rows differ .* row 1, rows.jsonl:2"):
        load_or_compute(path, [row(pictures["a"]), row(pictures["a"], line=2)], PRINTS, must_not_compute)
    with pytest.raises(ValueError, match="of 2 rows, the data has 1"):
        load_or_compute(path, [row(pictures["a"])], PRINTS, must_not_compute)
    with pytest.raises(ValueError, match="2 of 2 rows differ"):
        load_or_compute(path, [row(pictures["b"]), row(pictures["a"])], PRINTS, must_not_compute)


def test_a_damaged_file_is_refused(tmp_path, pictures):
    path = tmp_path / "train.safetensors"
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match="cannot be read"):
        load_or_compute(path, [row(pictures["a"])], PRINTS, must_not_compute)


def test_a_row_is_known_by_its_contents_not_by_where_its_picture_lies(pictures):
    same = row(pictures["a"])
    assert row_key(same) == row_key(row(pictures["copy of a"], line=9))
    others = [
        row(pictures["b"]),
        row(pictures["a"], question="Who"),
        row(pictures["a"], chosen="Eva"),
        row(pictures["a"], rejected="Eva"),
        row(pictures["a"], chosen="Bob", rejected="Ada"),
        row(Image.open(pictures["a"])),
    ]
    assert len({row_key(example) for example in [same, *others]}) == 7


def test_a_models_fingerprint_changes_with_any_weight_and_not_with_a_fresh_adapter(build):
    model = build("qwen2_5_vl")
    plain = fingerprint_of_model(model, with_adapters=False)
    assert plain == fingerprint_of_model(build("qwen2_5_vl"), with_adapters=False)
    config = LoraConfig(
        r=2, target_modules=r"model\.language_model\..*\.q_proj", modules_to_save=["model.visual.merger"]
    )
    wrapped = get_peft_model(build("qwen2_5_vl"), config)
    assert fingerprint_of_model(wrapped, with_adapters=False) == plain
    whole = fingerprint_of_model(wrapped, with_adapters=True)
    with torch.no_grad():
        next(p for name, p in wrapped.named_parameters() if "lora_B" in name)[0, 0] = 1.0
    assert fingerprint_of_model(wrapped, with_adapters=False) == plain
    assert fingerprint_of_model(wrapped, with_adapters=True) != whole
    with torch.no_grad():
        model.lm_head.weight[5, 7] += 1e-3
    assert fingerprint_of_model(model, with_adapters=False) != plain


def test_the_same_weights_under_another_configuration_are_another_model_wherever_they_lie(build):
    model = build("qwen2_5_vl")
    plain = fingerprint_of_model(model, with_adapters=False)
    model.config._name_or_path = "moved/elsewhere"
    assert fingerprint_of_model(model, with_adapters=False) == plain
    model.config.text_config.rms_norm_eps *= 10
    assert fingerprint_of_model(model, with_adapters=False) != plain


def test_a_processors_fingerprint_changes_with_template_pixels_and_vocabulary(model_folder):
    def processor():
        return load_processor(str(model_folder("qwen2_5_vl")))

    prints = [fingerprint_of_processor(processor())]
    changed = processor()
    changed.chat_template += " "
    prints.append(fingerprint_of_processor(changed))
    changed = processor()
    changed.image_processor.size = {"shortest_edge": 16, "longest_edge": 128}
    prints.append(fingerprint_of_processor(changed))
    changed = processor()
    changed.tokenizer.add_tokens(["<new>"])
    prints.append(fingerprint_of_processor(changed))
    assert len(set(prints)) == 4
    assert fingerprint_of_processor(processor()) == prints[0]


def test_a_row_with_a_video_is_refused_by_its_line(pictures):
    example = row(pictures["a"], line=23)
    example.messages[0]["content"].append({"type": "video", "video": "a.mp4"})
    with pytest.raises(RowError, match=r"rows\.jsonl:23: .* has a video: take reference 'adapter_off' or 'copy'"):
        row_key(example)
