"""4-bit loading with bitsandbytes, on the CPU: from native and original files, saved and loaded again."""

import subprocess
import sys

import pytest
import torch
from transformers import BitsAndBytesConfig

from modeling_qwenvl import QwenVLForConditionalGeneration, to_original_state_dict

# bitsandbytes' own CPU kernels say that faster ones exist.
pytestmark = pytest.mark.filterwarnings("ignore:.*kernels:UserWarning")


def four_bit(folder) -> QwenVLForConditionalGeneration:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["model.visual", "model.adapter", "lm_head"],
    )
    return QwenVLForConditionalGeneration.from_pretrained(folder, quantization_config=quantization, device_map="cpu")


def kinds(model) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules() if "Linear" in type(module).__name__}


@torch.no_grad()
def test_an_original_checkpoint_loads_in_4_bit_and_stays_near(recording, original):
    model = four_bit(recording.folder)
    for name, kind in kinds(model).items():
        assert kind == ("Linear4bit" if "language_model" in name else "Linear"), name
    inputs = recording.inputs("one_image")
    expected, found = original(**inputs).logits, model(**inputs).logits
    assert 0 < (found - expected).abs().mean() < 0.5 * expected.std()
    # What is not quantised is untouched.
    assert torch.equal(
        model.get_image_features(inputs["pixel_values"]).pooler_output[0], found_features(original, inputs)
    )


def found_features(model, inputs) -> torch.Tensor:
    return model.get_image_features(inputs["pixel_values"]).pooler_output[0]


COMPARE = """
import sys, torch
import modeling_qwenvl
from transformers import AutoModelForImageTextToText
inputs, expected = torch.load(sys.argv[1])
model = AutoModelForImageTextToText.from_pretrained(sys.argv[2], device_map="cpu")
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, expected)
print("same logits")
"""


@pytest.mark.slow
@torch.no_grad()
def test_a_saved_4_bit_model_gives_the_same_logits_in_a_new_process(recording, tmp_path):
    model = four_bit(recording.folder)
    model.save_pretrained(tmp_path / "model")
    inputs = recording.inputs("one_image")
    torch.save((inputs, model(**inputs).logits), tmp_path / "expected.pt")
    command = [sys.executable, "-c", COMPARE, str(tmp_path / "expected.pt"), str(tmp_path / "model")]
    result = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=180)
    assert result.stdout.strip().endswith("same logits"), result.stderr


@torch.no_grad()
def test_a_4_bit_model_saves_native_names_and_loads_again(original, recording, tmp_path):
    original.save_pretrained(tmp_path / "native")
    model = four_bit(tmp_path / "native")
    inputs = recording.inputs("two_images")
    # Saved before it runs: on some CPUs bitsandbytes repacks the weights in the first evaluation, with rounded scales.
    model.save_pretrained(tmp_path / "saved")
    expected = model(**inputs).logits
    loaded = QwenVLForConditionalGeneration.from_pretrained(tmp_path / "saved", device_map="cpu")
    assert torch.equal(loaded(**inputs).logits, expected)
    with pytest.raises(ValueError, match="no quantised weights"):
        to_original_state_dict(loaded)


def test_a_4_bit_model_passes_gradients_to_its_adapter(recording):
    model = four_bit(recording.folder).train()
    model.activation_checkpointing_enable()
    inputs = recording.inputs("one_image")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.adapter.query.grad.abs().sum() > 0


@torch.no_grad()
def test_quantising_every_part_but_the_head_works_too(recording):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = QwenVLForConditionalGeneration.from_pretrained(
        recording.folder, quantization_config=quantization, device_map="cpu"
    )
    linears = kinds(model)
    assert linears.pop("lm_head") == "Linear"
    assert set(linears.values()) == {"Linear4bit"}
    # In training mode: some CPU kernels of bitsandbytes refuse widths that are no multiple of 32 in evaluation.
    assert model.train()(**recording.inputs("one_image")).logits.isfinite().all()
