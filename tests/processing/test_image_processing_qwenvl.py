"""Pixel values: PIL equals the original bit for bit; torchvision is close; both save their size."""

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoImageProcessor

import processing  # noqa: F401  (registers the image processors' names)
from processing.image_processing_pil_qwenvl import QwenVLImageProcessorPil
from processing.image_processing_qwenvl import QwenVLImageProcessor

BOTH = pytest.mark.parametrize("processor_class", [QwenVLImageProcessor, QwenVLImageProcessorPil])


def pixels(processor, picture, side: int) -> torch.Tensor:
    """(3, side, side)"""
    return processor(picture, size={"height": side, "width": side}, return_tensors="pt")["pixel_values"][0]


@pytest.fixture(scope="module")
def recordings(shared):
    """file@side -> pixels of the original, and the folder of the files."""
    with torch.serialization.safe_globals([torch.torch_version.TorchVersion]):
        tensors = torch.load(shared / "reference/preprocess.pt")["tensors"]
    assert len(tensors) == 21
    return tensors, shared / "reference/images"


def differences(processor, recordings) -> dict[str, float]:
    """Largest difference in grey levels of each recording."""
    tensors, folder = recordings
    std_C11 = torch.tensor(processor.image_std)[:, None, None]
    found = {}
    for name, expected in tensors.items():
        file, side = name.split("@")
        ours = pixels(processor, PIL.Image.open(folder / file), int(side))
        if expected.shape != ours.shape:
            ours = ours[:, ::7, ::7]  # recorded sub-sampled
        found[name] = ((ours - expected) * std_C11 * 255).abs().max().item()
    return found


def test_pil_pixels_equal_the_original_bit_for_bit(recordings):
    assert set(differences(QwenVLImageProcessorPil(), recordings).values()) == {0.0}


def test_torchvision_is_within_two_grey_levels_but_for_a_picture_enlarged_and_reduced_at_once(recordings):
    found = differences(QwenVLImageProcessor(), recordings)
    odd_one = found.pop("a.png@112")  # 90x120 -> 112x112
    assert max(found.values()) < 2.01
    assert 2 < odd_one < 17.01


@BOTH
def test_the_default_gives_one_row_of_448_by_448_float32_per_picture(processor_class):
    pictures = [PIL.Image.new("RGB", (31, 17)), PIL.Image.new("L", (5, 700))]
    values = processor_class()(pictures, return_tensors="pt")["pixel_values"]
    assert values.shape == (2, 3, 448, 448)
    assert values.dtype == torch.float32


@BOTH
def test_black_and_white_become_minus_and_plus_what_mean_and_std_say(processor_class):
    red = pixels(processor_class(), PIL.Image.new("RGB", (7, 7), (255, 0, 0)), 7)
    expected = [(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, -0.40821073 / 0.27577711]
    torch.testing.assert_close(red.mean((1, 2)), torch.tensor(expected), rtol=0, atol=1e-6)


def test_pil_pixels_are_those_of_pillows_bicubic_resize_scaled_and_normalised():
    noise = np.random.default_rng(3).integers(0, 256, (41, 67, 4), dtype=np.uint8)
    picture = PIL.Image.fromarray(noise)
    resized = np.asarray(picture.convert("RGB").resize((28, 28), PIL.Image.Resampling.BICUBIC), dtype=np.float64)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    expected = torch.tensor((resized / 255 - mean) / std).permute(2, 0, 1).float()
    torch.testing.assert_close(pixels(QwenVLImageProcessorPil(), picture, 28), expected, rtol=0, atol=1e-6)


@BOTH
def test_the_aspect_ratio_is_not_kept(processor_class):
    left_half_white = np.zeros((10, 20, 3), dtype=np.uint8)
    left_half_white[:, :10] = 255
    values = pixels(processor_class(), PIL.Image.fromarray(left_half_white), 28)
    assert (values[0, :, :10] > 1).all()
    assert (values[0, :, -10:] < -1).all()


@BOTH
@pytest.mark.parametrize("form", ["picture", "array", "tensor"])
def test_alpha_is_dropped_and_not_laid_on_white(processor_class, form):
    rgba = np.zeros((11, 13, 4), dtype=np.uint8)  # black and fully transparent
    picture = {"picture": PIL.Image.fromarray(rgba), "array": rgba, "tensor": torch.from_numpy(rgba)}[form]
    assert torch.equal(
        pixels(processor_class(), picture, 14), pixels(processor_class(), PIL.Image.new("RGB", (13, 11)), 14)
    )


@BOTH
def test_palettes_are_expanded_and_grey_becomes_three_equal_channels(processor_class):
    rgb = PIL.Image.new("RGB", (9, 9), (10, 200, 30))
    assert torch.equal(
        pixels(processor_class(), rgb.convert("P", palette=PIL.Image.Palette.ADAPTIVE), 9),
        pixels(processor_class(), rgb, 9),
    )
    grey = pixels(processor_class(), PIL.Image.new("L", (9, 9), 77), 9)
    std, mean = torch.tensor(processor_class.image_std), torch.tensor(processor_class.image_mean)
    torch.testing.assert_close(grey[:, 4, 4] * std + mean, torch.full((3,), 77 / 255))


@BOTH
def test_an_array_gives_the_same_as_the_picture_it_came_from(processor_class):
    array = np.random.default_rng(5).integers(0, 256, (37, 23, 3), dtype=np.uint8)
    from_picture = pixels(processor_class(), PIL.Image.fromarray(array), 28)
    assert torch.equal(pixels(processor_class(), array, 28), from_picture)
    assert torch.equal(pixels(processor_class(), array.transpose(2, 0, 1), 28), from_picture)


@pytest.mark.parametrize(("backend", "expected"), [(None, QwenVLImageProcessor), ("pil", QwenVLImageProcessorPil)])
@BOTH
def test_the_size_is_saved_and_auto_image_processor_picks_the_backend(processor_class, backend, expected, tmp_path):
    processor_class(size={"height": 224, "width": 224}).save_pretrained(tmp_path)
    reloaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    assert type(reloaded) is expected
    assert (reloaded.size["height"], reloaded.size["width"]) == (224, 224)
    assert reloaded(PIL.Image.new("RGB", (9, 9)), return_tensors="pt")["pixel_values"].shape == (1, 3, 224, 224)
