"""The feature cache gives what the tower would have given, and the tower's blocks do not run for it."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from processing.example import Example
from processing.processing_families import load_processor
from trainers.example_batches import ExampleCollator, at_stage_resolution
from trainers.families import find_parts
from trainers.feature_cache import FeatureCache
from trainers.freezing import TrainedParts, freeze
from trainers.stages import SFT

STAGE_3 = TrainedParts(("adapter", "language_model", "embeddings"))


@pytest.fixture
def frozen(build, family):
    model = build(family)
    return freeze(model, STAGE_3).parts


def count_blocks(parts, run):
    """How often attention ran in the tower during `run`, and what `run` gave."""
    calls = []
    modules = [m for m in parts.blocks.modules() if type(m).__name__.endswith("Attention")]
    handles = [m.register_forward_hook(lambda *_: calls.append(1)) for m in modules]
    result = run()
    for handle in handles:
        handle.remove()
    return len(calls), result


def loss_and_gradients(parts, batch, cache=None):
    parts.base.zero_grad()
    if cache is None:
        loss = parts.base(**batch).loss
    else:
        with cache.serving(batch):
            loss = parts.base(**batch).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in parts.base.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def test_the_second_pass_gives_equal_loss_and_gradients_without_running_a_block(
    frozen, family, make_rows, collate, tmp_path
):
    batch = collate(make_rows(family, 2, seed=3))
    truth, true_gradients = loss_and_gradients(frozen, batch)
    cache = FeatureCache(frozen, tmp_path)
    first_calls, (first, _) = count_blocks(frozen, lambda: loss_and_gradients(frozen, batch, cache))
    second_calls, (second, gradients) = count_blocks(frozen, lambda: loss_and_gradients(frozen, batch, cache))
    assert first_calls == len(frozen.blocks)
    assert second_calls == 0
    assert (cache.hits, cache.misses) == (2, 2)
    torch.testing.assert_close(first, truth, rtol=0, atol=0)
    torch.testing.assert_close(second, truth, rtol=0, atol=0)
    assert gradients.keys() == true_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, true_gradients[name], rtol=0, atol=1e-7)
    assert all("forward" not in vars(block) for block in frozen.blocks)


def test_pictures_come_back_in_the_order_of_the_batch(frozen, family, make_rows, collate, tmp_path):
    rows = make_rows(family, 3, seed=5)
    cache = FeatureCache(frozen, tmp_path)
    loss_and_gradients(frozen, collate(rows), cache)
    turned = collate(rows[::-1])
    torch.testing.assert_close(
        loss_and_gradients(frozen, turned, cache)[0], loss_and_gradients(frozen, turned)[0], rtol=0, atol=1e-6
    )
    assert (cache.hits, cache.misses) == (3, 3)


def test_another_picture_is_not_served_with_this_ones_features(frozen, family, make_rows, collate, tmp_path):
    batch = collate(make_rows(family, 1, seed=3))
    cache = FeatureCache(frozen, tmp_path)
    loss_and_gradients(frozen, batch, cache)
    batch["pixel_values"].view(-1)[-1] += 0.5
    served = loss_and_gradients(frozen, batch, cache)[0]
    assert cache.hits == 0
    torch.testing.assert_close(served, loss_and_gradients(frozen, batch)[0], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_blank_page_of_another_shape_is_not_served_with_this_ones_features(frozen, make_rows, collate, tmp_path):
    """4 x 4 and 2 x 8 patches of one colour are the same numbers, but lie elsewhere."""
    batch = collate(make_rows(frozen.base.config.model_type, 1, seed=3))
    batch["pixel_values"] = torch.full_like(batch["pixel_values"], 0.5)
    cache = FeatureCache(frozen, tmp_path)
    square = loss_and_gradients(frozen, batch, cache)[0]
    batch["image_grid_thw"] = torch.tensor([[1, 2, 8]])
    truth = loss_and_gradients(frozen, batch)[0]
    assert abs(truth - square) > 1e-5
    assert loss_and_gradients(frozen, batch, cache)[0] == truth
    assert (cache.hits, cache.misses) == (0, 2)


@pytest.mark.parametrize("family", ["qwen_vl", "qwen2_5_vl"])
def test_a_picture_in_another_resolution_is_another_entry(family, model_folder, tmp_path):
    """One colour again, so that nothing but the size tells them apart; and the first is still there afterwards."""
    folder = model_folder(family)
    parts = freeze(AutoModelForImageTextToText.from_pretrained(folder), STAGE_3).parts
    processor, config = load_processor(folder), parts.base.config
    picture = {"type": "image", "image": Image.new("RGB", (32, 32), "white")}
    row = Example([{"role": "user", "content": [picture]}, {"role": "assistant", "content": "White."}])
    cache = FeatureCache(parts, tmp_path)
    for side, counts in [(8, (0, 1)), (16, (0, 2)), (8, (1, 2)), (16, (2, 2))]:
        batch = ExampleCollator(at_stage_resolution(processor, config, SFT, side), SFT)([row])
        served = loss_and_gradients(parts, batch, cache)[0]
        assert (cache.hits, cache.misses) == counts
        assert served == loss_and_gradients(parts, batch)[0]


def test_every_weight_of_the_tower_and_its_configuration_tell_the_folder(build, family, tmp_path):
    parts = freeze(build(family), STAGE_3).parts
    folders = [FeatureCache(parts, tmp_path).folder]
    assert FeatureCache(parts, tmp_path).folder == folders[0]
    for _, weight in parts.parameters("tower"):
        with torch.no_grad():
            weight.view(-1)[-1] += 1e-3
        folders.append(FeatureCache(parts, tmp_path).folder)
    parts.base.config.vision_config.hidden_act = "relu"
    folders.append(FeatureCache(parts, tmp_path).folder)
    assert len(set(folders)) == len(folders)


def test_weights_outside_the_tower_may_train_and_keep_the_folder(build, family, tmp_path):
    parts = freeze(build(family), STAGE_3).parts
    before = FeatureCache(parts, tmp_path).folder
    for part in STAGE_3.parts:
        for _, weight in parts.parameters(part):
            weight.data += 1e-3
    assert FeatureCache(parts, tmp_path).folder == before


def test_a_tower_that_was_trained_meanwhile_is_run_again(frozen, family, make_rows, collate, tmp_path):
    batch = collate(make_rows(family, 2, seed=3))
    old = loss_and_gradients(frozen, batch, FeatureCache(frozen, tmp_path))[0]
    for _, weight in frozen.parameters("tower"):
        weight.data *= 1.5
    cache = FeatureCache(frozen, tmp_path)
    assert loss_and_gradients(frozen, batch, cache)[0] == loss_and_gradients(frozen, batch)[0] != old
    assert (cache.hits, cache.misses) == (0, 2)


def test_a_batch_of_text_alone_passes_by(build, make_rows, collate, tmp_path):
    parts = freeze(build("qwen_vl"), STAGE_3).parts
    cache = FeatureCache(parts, tmp_path)
    loss_and_gradients(parts, collate(make_rows("qwen_vl", 2, pictures=0)), cache)
    assert (cache.hits, cache.misses) == (0, 0)


@pytest.mark.parametrize("layer", [-2, 2])  # of 3 blocks; hidden state 0 is what goes into the first
def test_an_inner_layer_that_is_read_is_kept_too(build, make_rows, collate, tmp_path, layer):
    model = build("llava")
    model.config.vision_feature_layer = layer
    parts = freeze(model, STAGE_3).parts
    batch = collate(make_rows("llava", 2, seed=3))
    cache = FeatureCache(parts, tmp_path)
    assert cache.kept == {1, 2}
    truth = loss_and_gradients(parts, batch)[0]
    loss_and_gradients(parts, batch, cache)
    torch.testing.assert_close(loss_and_gradients(parts, batch, cache)[0], truth, rtol=0, atol=0)
    assert cache.hits == 2


def test_a_trained_tower_is_refused(build, tmp_path):
    parts = find_parts(build("qwen_vl"))
    with pytest.raises(ValueError, match=r"needs a frozen tower, but .* train"):
        FeatureCache(parts, tmp_path)


def test_a_damaged_file_is_named(build, make_rows, collate, tmp_path):
    parts = freeze(build("qwen_vl"), STAGE_3).parts
    batch = collate(make_rows("qwen_vl", 1))
    cache = FeatureCache(parts, tmp_path)
    loss_and_gradients(parts, batch, cache)
    [path] = cache.folder.rglob("*.safetensors")
    path.write_bytes(b"half")
    with pytest.raises(ValueError, match=f"{path.name} cannot be read"):
        loss_and_gradients(parts, batch, cache)
