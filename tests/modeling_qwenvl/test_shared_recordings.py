"""Recordings of the original code with its intermediates: each layer, padded rows, 16 lengths of NTK and log-n."""

import json

import pytest
import torch

from modeling_qwenvl import QwenVLForConditionalGeneration, to_original_state_dict
from modeling_qwenvl.position_tables import resize_table, sincos_table

TOLERANCE = 2e-5
IMAGE_START = 300


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours.float() - theirs.float()).abs().max().item()


@pytest.fixture(scope="module")
def case_a(shared) -> dict:
    return torch.load(shared / "reference/caseA_112_q16.pt", weights_only=False)


@pytest.fixture(scope="module")
def case_b(shared) -> dict:
    return torch.load(shared / "reference/caseB_ntk_logn.pt", weights_only=False)


@pytest.fixture(scope="module")
def folder(case_a, tmp_path_factory):
    path = tmp_path_factory.mktemp("case_a")
    (path / "config.json").write_text(json.dumps(case_a["config"]))
    torch.save(case_a["state_dict"], path / "pytorch_model.bin")
    return path


@pytest.fixture(scope="module")
def model(folder) -> QwenVLForConditionalGeneration:
    return QwenVLForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(scope="module")
def long_model(folder) -> QwenVLForConditionalGeneration:
    model = QwenVLForConditionalGeneration.from_pretrained(folder)
    model.config.text_config.seq_length = 32
    return model


@pytest.fixture
def inputs_of(case_a, with_placeholders):
    def build(name: str) -> dict[str, torch.Tensor]:
        case = case_a["cases"][name]
        ids = with_placeholders(case["input_ids"], IMAGE_START)
        images = case_a["cases"]["left_pad"]["images"] if name == "right_pad" else case["images"]
        mask = case.get("attention_mask")
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids) if mask is None else mask,
            "pixel_values": images,
        }

    return build


@pytest.mark.parametrize("name", ["one_image", "two_images", "text_only", "batch_eqlen"])
@torch.no_grad()
def test_every_layer_and_its_cache_is_the_originals(model, case_a, inputs_of, name):
    case = case_a["cases"][name]
    recorded = case["inter"]
    hooked = {
        "vit_conv1": model.model.visual.patch_embedding,
        "vit_ln_pre": model.model.visual.pre_norm,
        "resampler_ln_kv": model.model.adapter.ln_kv,
        "resampler_out": model.model.adapter.out_proj,
        "visual_ln_post": model.model.adapter.ln_post,
        "visual_out": model.model.adapter,
        "llm_ln_f": model.model.language_model.norm,
    }
    for i in range(2):
        block, layer = model.model.visual.layers[i], model.model.language_model.layers[i]
        hooked |= {f"vit_block{i}": block, f"vit_block{i}_mlp": block.mlp}
        hooked |= {f"llm_block{i}": layer, f"llm_block{i}_mlp": layer.mlp}
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, key=key: seen.update({key: out}))
        for key, module in hooked.items()
    ]
    outputs = model(**inputs_of(name), use_cache=True)
    for hook in hooks:
        hook.remove()
    assert seen.keys() == hooked.keys() & recorded.keys()
    for key, ours in seen.items():
        theirs = recorded[key].transpose(0, 1) if key.startswith("vit_block") else recorded[key]
        assert difference(ours, theirs) < TOLERANCE, key
    assert difference(outputs.logits, case["logits"]) < TOLERANCE
    for layer, (keys, values) in zip(outputs.past_key_values.layers, case["kv"], strict=True):
        assert difference(layer.keys.transpose(1, 2), keys) < TOLERANCE
        assert difference(layer.values.transpose(1, 2), values) < TOLERANCE


@pytest.mark.parametrize("name", ["left_pad", "right_pad"])
@torch.no_grad()
def test_padded_rows_give_the_originals_logits(model, case_a, inputs_of, name):
    inputs = inputs_of(name)
    real = inputs["attention_mask"].bool()
    assert difference(model(**inputs).logits[real], case_a["cases"][name]["logits"][real]) < TOLERANCE


@pytest.mark.parametrize("name", ["one_image", "two_images", "text_only", "batch_eqlen", "left_pad"])
def test_greedy_answers_are_the_originals(model, case_a, inputs_of, name):
    inputs, expected = inputs_of(name), case_a["cases"][name]["greedy"]
    new = inputs["input_ids"].shape[1]
    count = expected.shape[1] - new
    ids = model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=310, pad_token_id=310)
    assert ids[:, new:].tolist() == expected[:, new:].tolist()


@torch.no_grad()
def test_pictures_of_other_sizes_give_the_originals_vectors(model, case_a):
    for size, case in case_a["visual_only"].items():
        features = model.get_image_features(case["x"])
        assert difference(features.last_hidden_state, case["vit_out"]) < TOLERANCE, size
        assert difference(torch.stack(features.pooler_output), case["out"]) < TOLERANCE, size


@torch.no_grad()
def test_position_tables_are_the_originals(model, case_a):
    for count, table in case_a["abs_pos"].items():
        grid = (round(int(count) ** 0.5),) * 2
        assert difference(resize_table(model.model.visual.position_embedding, grid), table) < 1e-6
    for count, table in case_a["pool_pos"].items():
        grid = (round(int(count) ** 0.5),) * 2
        assert difference(model.model.adapter.positions(grid), table) < 1e-6
    for sizes, table in case_a["sincos"].items():
        width, grid_size = map(int, sizes.split("x"))
        assert difference(sincos_table(grid_size, width), table) < 1e-6


@pytest.mark.parametrize("name", ["train_image", "train_text"])
def test_every_gradient_is_the_originals(folder, case_a, with_placeholders, name):
    case = case_a[name]
    model = QwenVLForConditionalGeneration.from_pretrained(folder).train()
    images = case_a["cases"]["one_image"]["images"] if name == "train_image" else None
    loss = model(with_placeholders(case["input_ids"], IMAGE_START), images, labels=case["labels"]).loss
    loss.backward()
    assert difference(loss, case["loss"]) < TOLERANCE
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradients = to_original_state_dict(model)
    for key, theirs in case.get("grads", {}).items():
        assert difference(gradients[key], theirs) < TOLERANCE * max(1.0, theirs.abs().max().item()), key


@torch.no_grad()
def test_bfloat16_is_as_near_to_the_originals_bfloat16_as_that_is_to_float32(folder, case_a, inputs_of):
    model = QwenVLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    recorded = case_a["bf16_one_image"]
    assert difference(model(**inputs_of("one_image")).logits, recorded["logits"]) < recorded["max_abs_diff_vs_fp32"]


@torch.no_grad()
def test_all_lengths_give_the_originals_logits(long_model, case_b):
    ids = case_b["input_ids"]
    for length, case in case_b["lens"].items():
        logits = long_model(ids[:, : int(length)]).logits[0]
        assert difference(logits[-1], case["logits_last"]) < TOLERANCE, length
        if case["logits"] is not None:
            assert difference(logits, case["logits"]) < TOLERANCE, length


@pytest.mark.parametrize("name", ["gen_cross", "gen_ntk"])
def test_long_greedy_answers_are_the_originals(long_model, case_b, name):
    ids, expected = case_b[name]["input_ids"], case_b[name]["greedy"]
    count = expected.shape[1] - ids.shape[1]
    mask = torch.ones_like(ids)
    ids = long_model.generate(
        ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=310, pad_token_id=310
    )
    assert ids.tolist() == expected.tolist()


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 60, [27, 33], [59, 1]], ids=["one by one", "two pieces", "long piece"])
def test_a_cache_continued_beyond_the_training_length_gives_the_originals_logits(long_model, case_b, pieces):
    recorded, ids = case_b["teacher_forced_decode"], case_b["input_ids"]
    outputs = long_model(ids[:, : recorded["prefill"]], use_cache=True)
    logits, start = [outputs.logits[0, -1:]], recorded["prefill"]
    for count in pieces:
        outputs = long_model(ids[:, start : start + count], past_key_values=outputs.past_key_values, use_cache=True)
        logits.append(outputs.logits[0])
        start += count
    assert start == recorded["upto"]
    assert difference(torch.cat(logits), recorded["logits"]) < TOLERANCE


@torch.no_grad()
def test_a_long_row_with_a_picture_gives_the_originals_logits(long_model, case_a, case_b, with_placeholders):
    case = case_b["image_long"]
    ids = with_placeholders(case["input_ids"], IMAGE_START)
    logits = long_model(ids, case_a["cases"]["one_image"]["images"]).logits
    assert difference(logits, case["logits"]) < TOLERANCE


@torch.no_grad()
def test_a_long_training_row_gives_the_originals_logits(folder, case_b):
    model = QwenVLForConditionalGeneration.from_pretrained(folder)
    model.config.text_config.seq_length = 32
    model(case_b["input_ids"])  # in the original this would leak its stretch into what follows
    logits = model.train()(case_b["input_ids"][:, :100]).logits
    assert difference(logits[0, -1], case_b["train_100"]["logits_last"]) < TOLERANCE
