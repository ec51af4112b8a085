"""Our model gives what the original code gave, on weights that a formula gives (2e-5 in float32)."""

import numpy as np
import pytest
import torch

from modeling_qwenvl import QwenVLForConditionalGeneration, to_original_state_dict

TOLERANCE = 2e-5
CASES = ["one_image", "two_images", "text_only", "batch"]


def assert_near(ours: torch.Tensor, theirs: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == theirs.shape
    assert (ours.detach() - torch.from_numpy(theirs)).abs().max() < tolerance


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(recording, request) -> QwenVLForConditionalGeneration:
    return QwenVLForConditionalGeneration.from_pretrained(recording.folder, attn_implementation=request.param)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_and_visual_vectors_are_the_originals(model, recording, case):
    outputs = model(**recording.inputs(case))
    assert_near(outputs.logits, recording.data[f"{case}/logits"])
    if case == "text_only":
        assert outputs.image_hidden_states is None
    else:
        assert_near(torch.stack(outputs.image_hidden_states), recording.data[f"{case}/visual"])


@pytest.mark.parametrize("case", CASES)
def test_greedy_answers_are_the_originals(model, recording, case):
    inputs = recording.inputs(case)
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=310, pad_token_id=310)
    new = inputs["input_ids"].shape[1]
    assert ids[:, new:].tolist() == recording.data[f"{case}/greedy"][:, new:].tolist()


@torch.no_grad()
def test_a_picture_of_twice_the_size_gives_the_originals_vectors(model, recording):
    generator = np.random.Generator(np.random.PCG64(int(recording.data["seed"]) + 1))
    pixel_values = torch.from_numpy(generator.standard_normal((1, 3, 224, 224), dtype=np.float32))
    features = model.get_image_features(pixel_values).pooler_output
    assert_near(torch.stack(features), recording.data["double_size/visual"])


@pytest.fixture(scope="module")
def long_model(recording) -> QwenVLForConditionalGeneration:
    """With a training length of 32, so that NTK and log-n begin early."""
    model = QwenVLForConditionalGeneration.from_pretrained(recording.folder)
    model.config.text_config.seq_length = 32
    return model


@torch.no_grad()
def test_rows_beyond_the_training_length_give_the_originals_logits(long_model, recording):
    ids = torch.from_numpy(recording.data["long/input_ids"])
    for length, theirs in zip(recording.data["long/lengths"], recording.data["long/last_logits"], strict=True):
        assert_near(long_model(input_ids=ids[:, :length], logits_to_keep=1).logits[0, 0], theirs)


def test_forty_greedy_tokens_that_cross_the_training_length_are_the_originals(long_model, recording):
    ids = torch.from_numpy(recording.data["long/input_ids"])[:, :20]
    ids = long_model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=310,
        pad_token_id=310,
    )
    assert ids.tolist() == recording.data["long/greedy_from_20"].tolist()


def test_training_loss_and_gradients_are_the_originals(original, recording):
    labels = torch.from_numpy(recording.data["train/labels"])
    loss = original.train()(**recording.inputs("one_image"), labels=labels).loss
    loss.backward()
    assert abs(loss.item() - recording.data["train/loss"]) < TOLERANCE
    for parameter in original.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradients = to_original_state_dict(original)
    names = recording.data["train/grad_names"].tolist()
    assert set(gradients) - set(names) == {"transformer.visual.attn_pool.pos_embed"}
    for name, norm, total in zip(
        names, recording.data["train/grad_norms"], recording.data["train/grad_sums"], strict=True
    ):
        assert abs(gradients[name].double().norm().item() - norm) < TOLERANCE * max(1, norm), name
        assert abs(gradients[name].double().sum().item() - total) < TOLERANCE * max(1, norm), name
