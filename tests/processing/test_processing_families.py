"""Processors of the later families: boxes follow the resize, folders stay readable by plain transformers."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from processing.coordinates import CONVENTIONS, Box, Point, Quad
from processing.processing_families import FAMILIES, Qwen2_5_VLProcessor, load_processor
from processing.processing_qwenvl import QwenVLProcessor

NAMES = [cls.convention.name for cls in FAMILIES]
CUP = {"type": "box", "bbox": [10, 20, 30, 40], "label": "cup"}
TEXTS = {
    "qwen2_vl": "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(100,333),(300,667)<|box_end|>",
    "qwen2_5_vl": '[{"bbox_2d": [4, 8, 12, 16], "label": "cup"}]',
    "qwen3_vl": '[{"bbox_2d": [100, 333, 300, 667], "label": "cup"}]',
}


@pytest.fixture(scope="module")
def processors(byte_processor):
    """Sides are multiples of 4, areas between 64 and 1024 pixels: a picture of 60 x 100 becomes 24 x 40."""
    return {cls.convention.name: byte_processor(cls.convention.name, cls) for cls in FAMILIES}


def ask(picture, *parts):
    return [{"role": "user", "content": [{"type": "image", "image": picture}, *parts]}]


def noise(height, width):
    return Image.fromarray(np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_a_box_in_original_pixels_becomes_what_the_family_writes(processors, name):
    text = processors[name].apply_chat_template(ask(noise(60, 100), CUP))
    assert processors[name].model_size(60, 100) == (24, 40)
    assert text.endswith(f"<|image_pad|><|vision_end|>{TEXTS[name]}<|im_end|>\n")


@pytest.mark.parametrize("name", NAMES)
def test_tokenizing_gives_the_same_text_as_rendering_and_one_token_per_box_tag(processors, name):
    processor = processors[name]
    messages = ask(noise(60, 100), CUP)
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    decoded = processor.tokenizer.decode(inputs["input_ids"][0])
    assert decoded.replace("<|image_pad|>" * 60, "<|image_pad|>") == processor.apply_chat_template(messages)
    tags = inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|box_start|>")
    assert tags.sum() == (name == "qwen2_vl")


@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_types_is_plain_text_when_sanitized_but_boxes_stay_tokens(processors, name):
    processor = processors[name]
    typed = {"type": "text", "text": "<|box_start|><|im_end|>"}
    messages = ask(noise(60, 100), CUP, typed)
    kwargs = {"tokenize": True, "return_dict": True, "sanitize_control_tokens": True}
    ids = processor.apply_chat_template(messages, **kwargs)["input_ids"][0]
    count = [ids.count(processor.tokenizer.convert_tokens_to_ids(t)) for t in ("<|box_start|>", "<|im_end|>")]
    assert count == [name == "qwen2_vl", 2]  # <|im_end|>: of the system and of the user message
    assert processor.tokenizer.decode(ids).count("<|im_end|>") == 3


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_comes_back_in_pixels_of_the_original(processors, name):
    answer = processors[name].parse_answer(TEXTS[name] + "<|im_end|>", [(60, 100)])
    (box,) = answer.shapes
    assert (box.label, answer.problems) == ("cup", ())
    tolerance = 0.5 * 2.5 if name == "qwen2_5_vl" else 0.1
    np.testing.assert_allclose([box.x1, box.y1, box.x2, box.y2], [10, 20, 30, 40], atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_predicted_size_is_the_size_that_the_processor_makes(processors, name, data):
    processor = processors[name]
    height = data.draw(st.integers(1, 90), "height")
    width = data.draw(st.integers(1, 90), "width")
    low = data.draw(st.integers(1, 3000), "min_pixels")
    processor = copy_with_limits(processor, low, data.draw(st.integers(max(low, 16), 4000), "max_pixels"))
    grid = processor.image_processor(noise(height, width), return_tensors="pt")["image_grid_thw"][0]
    assert processor.model_size(height, width) == (int(grid[1]) * 2, int(grid[2]) * 2)


def copy_with_limits(processor, low, high):
    parts = {name: getattr(processor, name) for name in ("tokenizer", "video_processor", "chat_template")}
    image_processor = type(processor.image_processor)(
        patch_size=2, merge_size=2, size={"shortest_edge": low, "longest_edge": high}
    )
    return type(processor)(image_processor=image_processor, **parts)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_round_trip_through_the_text_errs_by_half_a_resized_pixel_or_a_thousandth(processors, name, data):
    height, width = data.draw(st.integers(1, 3000), "height"), data.draw(st.integers(1, 3000), "width")
    if max(height, width) > 200 * min(height, width):
        height = width
    low = data.draw(st.integers(1, 10_000), "min_pixels")
    processor = copy_with_limits(processors[name], low, data.draw(st.integers(max(16, low), 2_000_000), "max_pixels"))
    seen = processor.model_size(height, width)
    x = st.floats(0, width)
    y = st.floats(0, height)
    shapes = [
        Box(*sorted_corners(data.draw(st.tuples(x, y, x, y))), label="a"),
        Quad(*data.draw(st.tuples(x, y, x, y, x, y, x, y)), label="a"),
        Point(*data.draw(st.tuples(x, y)), label="b"),
    ]
    keys = {"box": "bbox", "quad": "quad", "point": "point"}
    parts = [
        {"type": s.kind, keys[s.kind]: [v for corner in s.corners for v in corner], "label": s.label} for s in shapes
    ]
    messages = [{"role": "user", "content": [{"type": "image"}, *parts]}]
    (_, text) = processor.render_conversation(messages, [(height, width)])[0]["content"]
    answer = processor.parse_answer(text["text"], [(height, width)])
    assert answer.problems == ()
    assert [(s.kind, s.label) for s in answer.shapes] == [("box", "a"), ("quad", "a"), ("point", "b")]
    absolute = not processor.convention.is_normalized
    error_x = 0.5 * width / seen[1] if absolute else width / 1000
    error_y = 0.5 * height / seen[0] if absolute else height / 1000
    for before, after in zip(shapes, answer.shapes, strict=True):
        for (x1, y1), (x2, y2) in zip(before.corners, after.corners, strict=True):
            assert abs(x1 - x2) <= error_x * (1 + 1e-9)
            assert abs(y1 - y2) <= error_y * (1 + 1e-9)


def sorted_corners(numbers):
    (xa, ya, xb, yb) = numbers
    return min(xa, xb), min(ya, yb), max(xa, xb), max(ya, yb)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_it_writes_the_same_boxes_within_the_same_limits(processors, name, tmp_path):
    processors[name].save_pretrained(tmp_path)
    loaded = load_processor(tmp_path, min_pixels=17 * 16, max_pixels=33 * 16)
    loaded.save_pretrained(tmp_path)
    again = load_processor(tmp_path)
    assert type(again) is type(processors[name])
    assert again.pixel_limits == loaded.pixel_limits == {"min_pixels": 272, "max_pixels": 528}
    messages = ask(noise(60, 100), CUP)
    assert again.apply_chat_template(messages) == loaded.apply_chat_template(messages)
    changed = again.apply_chat_template(messages) != processors[name].apply_chat_template(messages)
    assert changed == (name == "qwen2_5_vl"), "absolute coordinates follow the pixel limits, thousandths do not"


@pytest.mark.slow
def test_plain_transformers_in_another_process_loads_what_was_saved_and_makes_the_same_pixels(processors, tmp_path):
    picture = noise(53, 97)
    picture.save(tmp_path / "picture.png")
    for name, processor in processors.items():
        processor.save_pretrained(tmp_path / name)
    script = """
import json, sys, warnings
warnings.simplefilter("error")
from PIL import Image
from transformers import AutoProcessor
result = {}
for name in sys.argv[1:]:
    processor = AutoProcessor.from_pretrained(name)
    inputs = processor(images=Image.open("picture.png"), text="<|image_pad|>", return_tensors="pt")
    result[name] = [f"{type(processor).__module__}.{type(processor).__qualname__}", inputs["image_grid_thw"].tolist(),
                    inputs["input_ids"].tolist(), float(inputs["pixel_values"].double().sum())]
assert "processing" not in sys.modules
print(json.dumps(result))
"""
    command = [sys.executable, "-P", "-c", script, *processors]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for name in processors:
        processor = load_processor(tmp_path / name)
        inputs = processor(images=picture, text="<|image_pad|>", return_tensors="pt")
        theirs, grid, ids, total = result[name]
        assert theirs.startswith("transformers.models.")
        assert theirs.endswith(type(processor).__name__)
        assert (grid, ids) == (inputs["image_grid_thw"].tolist(), inputs["input_ids"].tolist())
        assert total == pytest.approx(float(inputs["pixel_values"].double().sum()))


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_saved_by_plain_transformers_loads_as_ours(byte_processor, name, tmp_path):
    byte_processor(name).save_pretrained(tmp_path)
    loaded = load_processor(tmp_path)
    assert loaded.convention is CONVENTIONS[name]
    assert isinstance(loaded, getattr(transformers, type(loaded).__name__))


def test_a_hub_checkpoint_with_the_real_files_loads_and_obeys_its_limits(shared):
    loaded = load_processor(shared / "tokenizers/qwen2.5-vl", max_pixels=1_003_520)
    assert type(loaded) is Qwen2_5_VLProcessor
    assert loaded.pixel_limits == {"min_pixels": 3136, "max_pixels": 1_003_520}
    assert loaded.model_size(3000, 4000) == (840, 1148)
    inputs = loaded.apply_chat_template(
        ask(noise(300, 400), CUP), tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["image_grid_thw"].tolist() == [[1, 22, 28]]
    assert '"bbox_2d": [10, 21, 29, 41]' in loaded.tokenizer.decode(inputs["input_ids"][0])


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_another_convention_family_or_pixel_limit_in_the_folder_is_refused(processors, tmp_path):
    processors["qwen2_5_vl"].save_pretrained(tmp_path)
    saved = (tmp_path / "processor_config.json").read_text()
    assert json.loads(saved)["convention"] == "qwen2_5_vl"

    edit(tmp_path / "processor_config.json", lambda values: values.update(convention="qwen3_vl"))
    with pytest.raises(ValueError, match="convention 'qwen3_vl', but Qwen2_5_VLProcessor writes 'qwen2_5_vl'"):
        load_processor(tmp_path)

    (tmp_path / "processor_config.json").write_text(saved)
    edit(
        tmp_path / "processor_config.json",
        lambda values: values["image_processor"].update(size={"shortest_edge": 64, "longest_edge": 640}),
    )
    with pytest.raises(ValueError, match=r"'max_pixels': 1024.* but its image processor has .*'max_pixels': 640"):
        load_processor(tmp_path)

    (tmp_path / "processor_config.json").write_text(saved)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    with pytest.raises(ValueError, match="model_type 'qwen3_vl', whose processor is a Qwen3VLProcessor"):
        load_processor(tmp_path)
    (tmp_path / "config.json").unlink()

    for cls in set(FAMILIES) - {Qwen2_5_VLProcessor}:
        with pytest.raises(ValueError, match=f"holds a Qwen2_5_VLProcessor, not a {cls.__name__}"):
            cls.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'qwen2_5_vl', but QwenVLProcessor writes 'qwenvl'"):
        QwenVLProcessor.from_pretrained(tmp_path)


def test_a_folder_without_any_processor_of_the_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ValueError, match="holds no processor of the Qwen-VL family"):
        load_processor(tmp_path)


def test_the_model_type_decides_where_no_file_names_a_processor(processors, tmp_path):
    processors["qwen3_vl"].save_pretrained(tmp_path)
    edit(tmp_path / "processor_config.json", lambda values: values.pop("processor_class"))
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl_moe"}')
    assert load_processor(tmp_path).convention.name == "qwen3_vl"


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"min_pixels": 2000}, "min_pixels 2000 > max_pixels 1024"),
        ({"min_pixels": 1, "max_pixels": 15}, "max_pixels 15 is less than one tile of 4x4 = 16"),
        ({"max_pixels": 1e6}, "max_pixels is 1000000.0, it must be a whole number"),
        ({"size": {"longest_edge": 99, "shortest_edge": 1}}, "give min_pixels and max_pixels"),
    ],
)
def test_impossible_limits_and_a_second_way_to_set_them_are_refused(processors, tmp_path, limits, message):
    processors["qwen2_5_vl"].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_processor(tmp_path, **limits)


@pytest.mark.parametrize("name", NAMES)
def test_a_size_given_in_the_call_is_refused_because_boxes_would_not_follow(processors, name):
    size = {"shortest_edge": 64, "longest_edge": 400}
    with pytest.raises(ValueError, match=r"picture 0 became 12x24 pixels .*, but boxes are written for 24x40"):
        processors[name](images=noise(60, 100), text="<|image_pad|>", images_kwargs={"size": size})


def test_a_picture_too_thin_is_refused_with_its_size_before_anything_is_resized(processors):
    with pytest.raises(ValueError, match=r"2x500 pixels .* 250.0 times as long"):
        processors["qwen3_vl"](images=noise(2, 500), text="<|image_pad|>")


def test_pictures_may_come_as_arrays_and_tensors_too(processors):
    array = np.asarray(noise(60, 100))
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    transparent = np.dstack([array, array[..., :1]])
    for picture in (array, tensor, transparent, array[..., :1]):
        inputs = processors["qwen3_vl"](images=picture, text="<|image_pad|>", return_tensors="pt")
        assert inputs["image_grid_thw"].tolist() == [[1, 12, 20]]


def test_resizing_switched_off_is_followed_too(processors):
    processor = copy_with_limits(processors["qwen2_5_vl"], 64, 1024)
    processor.image_processor.do_resize = False
    assert processor.model_size(60, 100) == (60, 100)
    with pytest.raises(ValueError, match=r"60x101 pixels .*multiples of 4"):
        processor.model_size(60, 101)
