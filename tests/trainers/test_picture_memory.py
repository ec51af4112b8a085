"""What of encoded pictures policy and reference share, and that it never goes to other pictures or other weights."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trainers.families import find_parts, unwrap
from trainers.freezing import TrainedParts, freeze
from trainers.picture_memory import PictureMemory
from trainers.shared_pictures import encode, spread


@pytest.fixture
def pictures(make_rows, collate):
    def _pictures(family, seed=0):
        batch = collate(make_rows(family, 3, seed=seed))
        return {key: batch[key] for key in ("pixel_values", "image_grid_thw") if key in batch}

    return _pictures


def runs_of(model):
    """A list that grows by one whenever the last block's attention or MLP runs."""
    runs = []
    next(iter(find_parts(model).blocks[-1].children())).register_forward_hook(lambda *_: runs.append(1))
    return runs


def tensors(encoded):
    found = list(encoded.pooler_output)
    if "deepstack_features" in encoded:
        found += [feature for layer in encoded.deepstack_features for feature in layer]
    return found


@pytest.mark.parametrize(("parts", "shared"), [(("language_model",), "features"), (("adapter",), "blocks")])
def test_two_models_encode_once_and_get_what_each_would_compute(build, pictures, family, parts, shared):
    policy = build(family)
    freeze(policy, TrainedParts(parts))
    reference = copy.deepcopy(policy).requires_grad_(False)
    with torch.no_grad():
        for _, parameter in find_parts(reference).parameters("adapter"):
            if shared == "blocks" and parameter.is_floating_point():
                parameter.mul_(1.5)  # its own adapter
    memory = PictureMemory(policy, reference)
    assert memory.shared == shared
    runs = [runs_of(policy), runs_of(reference)]
    found = [memory.encode(model, pictures(family)) for model in (policy, reference)]
    assert [len(counted) for counted in runs] == [1, 0]
    for model, encoded in zip((policy, reference), found, strict=True):
        wanted = encode(model.base_model, pictures(family))
        for ours, plain in zip(tensors(encoded), tensors(wanted), strict=True):
            torch.testing.assert_close(ours, plain)
    assert all(feature.requires_grad == (shared == "blocks") for feature in tensors(found[0]))


def test_other_pictures_are_encoded_and_the_same_ones_again_after_forgetting(build, pictures, family):
    model = build(family)
    freeze(model, TrainedParts(("language_model",)))
    memory, runs = PictureMemory(model), runs_of(model)
    first = memory.encode(model, pictures(family))
    memory.encode(model, pictures(family))
    assert len(runs) == 1
    other = memory.encode(model, pictures(family, seed=5))
    assert len(runs) == 2
    assert not torch.equal(tensors(other)[0], tensors(first)[0])
    memory.forget()
    memory.encode(model, pictures(family, seed=5))
    assert len(runs) == 3


def test_equal_pixels_on_another_grid_are_other_pictures(build, pictures):
    model = build("qwen2_5_vl")
    freeze(model, TrainedParts(("language_model",)))
    memory, runs = PictureMemory(model), runs_of(model)
    given = pictures("qwen2_5_vl")
    square = memory.encode(model, given)
    wide = memory.encode(model, given | {"image_grid_thw": torch.tensor([[1, 2, 8]] * 3)})
    assert len(runs) == 2
    assert not torch.equal(tensors(square)[0], tensors(wide)[0])


def test_nothing_is_shared_where_the_tower_trains_differs_or_has_lora(build):
    def models(parts=("language_model",)):
        policy = build("qwen2_5_vl")
        freeze(policy, TrainedParts(parts))
        return policy, copy.deepcopy(policy).requires_grad_(False)

    assert PictureMemory(*models()).shared == "features"
    assert PictureMemory(*models(("tower",))).shared == "nothing"
    policy, reference = models()
    with torch.no_grad():
        next(p for _, p in find_parts(reference).parameters("tower")).add_(1e-3)
    assert PictureMemory(policy, reference).shared == "nothing"
    policy, reference = models()
    with torch.no_grad():
        next(p for _, p in find_parts(reference).parameters("adapter")).add_(1e-3)
    assert PictureMemory(policy, reference).shared == "blocks"
    # Frozen LoRA in the tower: the reference has it switched off.
    wrapped = get_peft_model(
        build("qwen2_5_vl"), LoraConfig(r=2, target_modules=r"model\.visual\.blocks\.\d+\.attn\.qkv")
    )
    assert PictureMemory(wrapped.requires_grad_(False)).shared == "nothing"
    wrapped = get_peft_model(build("qwen2_5_vl"), LoraConfig(r=2, target_modules=r"model\.language_model\..*\.q_proj"))
    assert PictureMemory(wrapped).shared == "features"
    wrapped = get_peft_model(
        build("qwen2_5_vl"),
        LoraConfig(r=2, target_modules=r"model\.language_model\..*\.q_proj", modules_to_save=["model.visual.merger"]),
    )
    assert PictureMemory(wrapped).shared == "blocks"
    assert unwrap(wrapped) is not wrapped


def test_spread_repeats_features_and_adds_their_gradients(build, pictures):
    model = build("qwen3_vl")
    encoded = encode(model.base_model, pictures("qwen3_vl"))
    again = spread(encoded, [2, 0, 2])
    assert [torch.equal(f, encoded.pooler_output[i]) for f, i in zip(again.pooler_output, (2, 0, 2), strict=True)] == [
        True
    ] * 3
    assert len(again.deepstack_features) == 2
    assert torch.equal(again.deepstack_features[1][1], encoded.deepstack_features[1][0])
    (gradient,) = torch.autograd.grad(sum(f.sum() for f in again.pooler_output), encoded.pooler_output[2])
    assert gradient.unique().tolist() == [2.0]
