"""The interface of a transformers 5 vision-language model: pictures into text, caches, generation, training."""

import copy
from unittest.mock import patch

import pytest
import torch
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_qwenvl import QwenVLForConditionalGeneration, QwenVLVisionModel

GREEDY = {"do_sample": False, "eos_token_id": 96, "pad_token_id": 96}


def count_encoded_pictures(model) -> tuple[list[int], object]:
    """A list that grows by the number of pictures at every call of the tower, and the hook."""
    counts: list[int] = []
    hook = model.model.visual.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    return counts, hook


# Pictures and their places


@torch.no_grad()
def test_image_features_are_one_tensor_per_picture(tiny_model, tiny_inputs):
    model = tiny_model()
    features = model.get_image_features(tiny_inputs["pixel_values"])
    assert isinstance(features.pooler_output, tuple)
    assert [tuple(f.shape) for f in features.pooler_output] == [(4, 64)] * 3
    assert features.last_hidden_state.shape == (3, 16, 32)
    assert model.get_image_features(None).pooler_output == ()
    assert model.get_image_features(torch.zeros(0, 3, 28, 28)).pooler_output == ()


@torch.no_grad()
def test_pictures_go_to_their_rows_in_order(tiny_model, tiny_inputs):
    model = tiny_model()
    together = model(**tiny_inputs).logits
    ids, pixel_values = tiny_inputs["input_ids"], tiny_inputs["pixel_values"]
    torch.testing.assert_close(model(ids[:1], pixel_values[:1]).logits, together[:1], rtol=0, atol=1e-5)
    torch.testing.assert_close(model(ids[1:], pixel_values[1:]).logits, together[1:], rtol=0, atol=1e-5)
    assert (model(ids[1:], pixel_values[[2, 1]]).logits - together[1:]).abs().max() > 1e-4


@torch.no_grad()
def test_encoded_pictures_and_pixels_give_the_same(tiny_model, tiny_inputs):
    model = tiny_model()
    pixel_values = tiny_inputs.pop("pixel_values")
    expected = model(**tiny_inputs, pixel_values=pixel_values).logits
    encoded = {"image": model.get_image_features(pixel_values)}
    assert torch.equal(model(**tiny_inputs, mm_encoder_outputs=encoded).logits, expected)
    with pytest.raises(ValueError, match="either pixel_values or mm_encoder_outputs"):
        model(**tiny_inputs, pixel_values=pixel_values, mm_encoder_outputs=encoded)


@torch.no_grad()
def test_embeddings_may_be_given_instead_of_ids(tiny_model, tiny_inputs):
    model = tiny_model()
    expected = model(**tiny_inputs).logits
    ids = tiny_inputs.pop("input_ids")
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeddings, **tiny_inputs).logits, expected)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(input_ids=ids, inputs_embeds=embeddings)


@pytest.mark.parametrize(
    ("num_pictures", "message"),
    [
        (2, r"placeholders for 3 pictures \(by row: \[1, 2\]\) but 2 pictures"),
        (4, r"placeholders for 3 pictures \(by row: \[1, 2\]\) but 4 pictures"),
        (0, r"placeholders for 3 pictures \(by row: \[1, 2\]\) but 0 pictures"),
    ],
)
def test_a_wrong_number_of_pictures_is_refused_with_both_numbers(tiny_model, tiny_inputs, num_pictures, message):
    tiny_inputs["pixel_values"] = torch.zeros(num_pictures, 3, 28, 28)
    with pytest.raises(ValueError, match=message):
        tiny_model()(**tiny_inputs)


def test_pictures_without_any_place_are_refused(tiny_model, tiny_inputs):
    with pytest.raises(ValueError, match=r"for 0 pictures \(by row: \[0\]\) but 3 pictures"):
        tiny_model()(torch.tensor([[1, 2, 3]]), tiny_inputs["pixel_values"])


def test_a_row_cut_inside_a_picture_is_named(tiny_model, tiny_inputs):
    tiny_inputs["input_ids"][1, 10] = 7
    with pytest.raises(ValueError, match=r"Row 1 has 7 picture placeholders \(id 93\).*multiple of the 4"):
        tiny_model()(**tiny_inputs)


def test_placeholders_moved_between_rows_are_refused_though_their_sum_fits(tiny_model, tiny_inputs):
    ids = tiny_inputs["input_ids"]
    ids[0, 12], ids[1, 10] = 93, 7
    with pytest.raises(ValueError, match="Row 0 has 5 picture placeholders"):
        tiny_model()(**tiny_inputs)


# Padding, caches, generation


def padded(rows: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    pads = [[96] * (length - len(row)) for row in rows]
    ids = [pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)]
    masks = [
        [0] * len(p) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(p)
        for r, p in zip(rows, pads, strict=True)
    ]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}


PICTURE = [91, 93, 93, 93, 93, 92]
ROWS = [[5, *PICTURE, 11, 12, 13], [*PICTURE, 17, *PICTURE, 23], [3, 4]]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_does_not_change_logits(tiny_model, tiny_inputs, side, implementation):
    model = tiny_model()
    model.set_attn_implementation(implementation)
    pixel_values = tiny_inputs["pixel_values"]
    batch = padded(ROWS, side)
    logits = model(**batch, pixel_values=pixel_values).logits
    alone = [(ROWS[0], pixel_values[:1]), (ROWS[1], pixel_values[1:]), (ROWS[2], None)]
    for row, (ids, pictures) in enumerate(alone):
        expected = model(torch.tensor([ids]), pictures).logits[0]
        torch.testing.assert_close(logits[row][batch["attention_mask"][row] == 1], expected, rtol=0, atol=1e-5)


def test_batched_generation_with_left_padding_equals_one_by_one(tiny_model, tiny_inputs):
    model = tiny_model(text_config={"initializer_range": 0.3})
    pixel_values = tiny_inputs["pixel_values"]
    batch = padded(ROWS, "left")
    new = batch["input_ids"].shape[1]
    together = model.generate(**batch, pixel_values=pixel_values, max_new_tokens=19, **GREEDY)[:, new:]
    pictures = [{"pixel_values": pixel_values[:1]}, {"pixel_values": pixel_values[1:]}, {}]
    for row, (ids, extra) in enumerate(zip(ROWS, pictures, strict=True)):
        ids = torch.tensor([ids])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **extra, max_new_tokens=19, **GREEDY)
        alone = alone[0, ids.shape[1] :].tolist()
        assert together[row, : len(alone)].tolist() == alone
        assert len(set(alone)) > 3


@pytest.mark.parametrize(
    ("options", "is_greedy"),
    [
        ({}, True),
        ({"num_beams": 3}, False),
        ({"do_sample": True, "num_return_sequences": 4}, False),
        ({"use_cache": False}, True),
    ],
)
def test_generation_encodes_each_picture_once(tiny_model, tiny_inputs, options, is_greedy):
    model = tiny_model()
    expected = model.generate(**tiny_inputs, max_new_tokens=5, **GREEDY)
    counts, _ = count_encoded_pictures(model)
    suppress = {"suppress_tokens": [93]}
    ids = model.generate(**tiny_inputs, max_new_tokens=5, **(GREEDY | suppress | options))
    assert counts == [3]
    if is_greedy:
        assert torch.equal(ids, expected)


def test_repeated_answers_see_the_pictures_of_their_own_row(tiny_model, tiny_inputs):
    model = tiny_model(text_config={"initializer_range": 0.3})
    expected = model.generate(**tiny_inputs, max_new_tokens=7, **GREEDY)
    beams = model.generate(**tiny_inputs, max_new_tokens=7, num_beams=2, num_return_sequences=2, **GREEDY)
    copies = {k: v.repeat_interleave(2, 0) for k, v in tiny_inputs.items() if k != "pixel_values"}
    pictures = tiny_inputs["pixel_values"][[0, 0, 1, 2, 1, 2]]
    repeated = model.generate(**copies, pixel_values=pictures, max_new_tokens=7, **GREEDY)
    assert torch.equal(repeated[::2], expected)
    scores = model(input_ids=beams, pixel_values=pictures).logits.log_softmax(-1)
    assert beams.shape[0] == 4
    assert scores.isfinite().all()


def test_generation_takes_no_pictures_as_none(tiny_model):
    ids = torch.tensor([[1, 2, 3]])
    mask = torch.ones_like(ids)
    model = tiny_model()
    with_none = model.generate(ids, attention_mask=mask, pixel_values=None, max_new_tokens=3, **GREEDY)
    assert torch.equal(with_none, model.generate(ids, attention_mask=mask, max_new_tokens=3, **GREEDY))


@torch.no_grad()
def test_a_cached_conversation_takes_a_new_picture(tiny_model, tiny_inputs):
    model = tiny_model()
    ids, pixel_values = tiny_inputs["input_ids"][1:], tiny_inputs["pixel_values"]
    whole = model(ids, pixel_values[1:]).logits
    first = model(ids[:, :6], pixel_values[1:2], use_cache=True)
    second = model(ids[:, 6:], pixel_values[2:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_placeholder_that_was_sampled_may_follow_a_cache(tiny_model):
    model = tiny_model()
    cache = model(torch.tensor([[1, 2]]), use_cache=True).past_key_values
    assert model(torch.tensor([[93]]), past_key_values=cache, use_cache=True).logits.isfinite().all()


@torch.no_grad()
def test_logits_may_be_asked_for_some_places_only(tiny_model, tiny_inputs):
    model = tiny_model()
    logits = model(**tiny_inputs).logits
    torch.testing.assert_close(model(**tiny_inputs, logits_to_keep=2).logits, logits[:, -2:])
    places = torch.tensor([3, 11])
    torch.testing.assert_close(model(**tiny_inputs, logits_to_keep=places).logits, logits[:, places])


@torch.no_grad()
def test_outputs_come_as_a_tuple_and_with_hidden_states(tiny_model, tiny_inputs):
    model = tiny_model()
    outputs = model(**tiny_inputs, output_hidden_states=True)
    assert [h.shape for h in outputs.hidden_states] == [(2, 13, 64)] * 3
    assert torch.equal(model(**tiny_inputs, return_dict=False)[0], outputs.logits)
    model.set_attn_implementation("eager")
    attentions = model(**tiny_inputs, output_attentions=True).attentions
    assert [a.shape for a in attentions] == [(2, 4, 13, 13)] * 2


@torch.no_grad()
# transformers passes an argument that torch has deprecated, and eager flex attention says that it is slow.
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_gives_the_same_logits(tiny_model, tiny_inputs):
    model = tiny_model()
    expected = model(**tiny_inputs).logits
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):  # compiling it takes a minute on the CPU
        torch.testing.assert_close(model(**tiny_inputs).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_keys_that_processors_and_trainers_add_do_not_hurt(tiny_model, tiny_inputs):
    model = tiny_model()
    types = (tiny_inputs["input_ids"] == 93).long()
    logits = model(**tiny_inputs, mm_token_type_ids=types, num_items_in_batch=torch.tensor(7)).logits
    assert torch.equal(logits, model(**tiny_inputs).logits)
    hidden = model.base_model(**tiny_inputs, mm_token_type_ids=types).last_hidden_state
    torch.testing.assert_close(model.get_output_embeddings()(hidden), logits)


# Training


def supervised(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, 8:] = inputs["input_ids"][0, 8:]
    labels[1, 12:] = inputs["input_ids"][1, 12:]
    return labels


def test_the_loss_is_the_mean_over_supervised_tokens_only(tiny_model, tiny_inputs):
    outputs = tiny_model()(**tiny_inputs, labels=supervised(tiny_inputs))
    log_probs = outputs.logits.log_softmax(-1)
    ids = tiny_inputs["input_ids"]
    targets = [(0, t) for t in range(8, 13)] + [(1, 12)]
    expected = -sum(log_probs[b, t - 1, ids[b, t]] for b, t in targets) / 6
    torch.testing.assert_close(outputs.loss, expected)


def test_the_loss_of_micro_batches_adds_up_to_the_token_mean(tiny_model, tiny_inputs):
    model, labels = tiny_model(), supervised(tiny_inputs)
    assert model.accepts_loss_kwargs
    whole = model(**tiny_inputs, labels=labels).loss
    ids, pictures = tiny_inputs["input_ids"], tiny_inputs["pixel_values"]
    parts = [
        model(ids[rows], pictures[images], labels=labels[rows], num_items_in_batch=torch.tensor(6)).loss
        for rows, images in ((slice(0, 1), slice(0, 1)), (slice(1, 2), slice(1, 3)))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_the_head_may_run_on_supervised_tokens_only(tiny_model, tiny_inputs):
    model, labels = tiny_model(), supervised(tiny_inputs)
    whole = model(**tiny_inputs, labels=labels).loss
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    is_target = shifted != -100
    outputs = model(**tiny_inputs, labels=labels, logits_to_keep=is_target, shift_labels=shifted[is_target])
    assert outputs.logits.shape == (6, 97)
    torch.testing.assert_close(outputs.loss, whole)


def gradients(model, inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs, labels=supervised(inputs)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("is_reentrant", [False, True])
@pytest.mark.parametrize("adapter_type", ["resampler", "mlp"])
def test_recomputing_activations_gives_the_same_gradients(tiny_model, tiny_inputs, adapter_type, is_reentrant):
    model = tiny_model(adapter_type=adapter_type).train()
    if adapter_type == "mlp":
        picture = [91, *[93] * 16, 92]
        ids = torch.tensor([[*picture, *picture, *picture, 7, 8, 9, 10, 11, 12, 13, 14, 15]])
        tiny_inputs = {"input_ids": ids.repeat(2, 1), "pixel_values": torch.randn(6, 3, 28, 28)}
    plain = gradients(model, tiny_inputs)
    model.activation_checkpointing_enable({"use_reentrant": is_reentrant})
    recomputed = gradients(model, tiny_inputs)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("part", ["visual", "adapter", "language_model"])
def test_each_part_recomputes_on_its_own(tiny_model, tiny_inputs, part):
    model = tiny_model().train()
    choice = {"visual": False, "adapter": False, "language_model": False} | {part: True}
    model.set_checkpointed_parts(**choice)
    calls = dict.fromkeys(choice, 0)

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    first = {
        "visual": model.model.visual.layers[0].norm1,
        "adapter": model.model.adapter.ln_kv,
        "language_model": model.model.language_model.layers[0].input_layernorm,
    }
    for name, module in first.items():
        module.register_forward_hook(count(name))
    gradients(model, tiny_inputs)
    assert calls == {name: 1 + is_on for name, is_on in choice.items()}


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_frozen_tower_keeps_no_graph(tiny_model, tiny_inputs, is_checkpointed):
    model = tiny_model().train()
    if is_checkpointed:
        model.activation_checkpointing_enable()  # hooks the tower's input so that it requires a gradient
    calls = []
    model.model.visual.layers[0].register_forward_hook(lambda _, __, out: calls.append(out.requires_grad))
    model.model.visual.requires_grad_(False)
    features = model.get_image_features(tiny_inputs["pixel_values"])
    assert not features.last_hidden_state.requires_grad
    assert all(f.requires_grad for f in features.pooler_output)
    found = gradients(model, tiny_inputs)
    assert calls == [False, False]
    assert not any(name.startswith("model.visual") for name in found)
    assert found["model.adapter.query"].abs().sum() > 0
    model.model.visual.layers[0].norm1.weight.requires_grad_(True)
    assert model.get_image_features(tiny_inputs["pixel_values"]).last_hidden_state.requires_grad


def test_a_frozen_tower_passes_a_gradient_to_pixels_that_want_one(tiny_model, tiny_inputs):
    model = tiny_model()
    model.model.visual.requires_grad_(False)
    pixel_values = tiny_inputs.pop("pixel_values").requires_grad_(True)
    model(**tiny_inputs, pixel_values=pixel_values).logits.sum().backward()
    assert pixel_values.grad.abs().sum() > 0


def test_a_frozen_language_model_passes_gradients_to_the_adapter(tiny_model, tiny_inputs):
    model = tiny_model().train()
    model.model.language_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    model.activation_checkpointing_enable()
    found = gradients(model, tiny_inputs)
    assert found["model.adapter.query"].abs().sum() > 0
    assert found["model.visual.patch_embedding.weight"].abs().sum() > 0
    assert not any("language_model" in name for name in found)


def test_training_makes_no_cache_unless_asked(tiny_model, tiny_inputs):
    model = tiny_model().train()
    assert model(**tiny_inputs).past_key_values is None
    assert model(**tiny_inputs, use_cache=True).past_key_values.get_seq_length() == 13
    assert model.eval()(**tiny_inputs).past_key_values.get_seq_length() == 13


def test_a_blank_picture_on_text_only_batches_changes_nothing_but_the_graph(tiny_model):
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]])
    inputs = {"input_ids": ids, "labels": ids}
    plain, blank = tiny_model().train(), tiny_model(run_tower_on_text_only_batches=True).train()
    losses = []
    for model in (plain, blank):
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    assert plain.model.visual.patch_embedding.weight.grad is None
    for name, parameter in blank.named_parameters():
        if "language_model" in name or "lm_head" in name:
            assert torch.equal(parameter.grad, plain.get_parameter(name).grad), name
        elif parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() == 0, name
    counts, _ = count_encoded_pictures(blank)
    blank.eval()(ids)
    assert counts == []


# Embeddings, dtypes, devices


def test_embeddings_and_head_are_resized_together(tiny_model, tiny_inputs):
    model = tiny_model()
    expected = model(**tiny_inputs).logits
    model.resize_token_embeddings(101)
    assert model.config.text_config.vocab_size == 101
    assert (model.get_input_embeddings().weight.shape, model.lm_head.weight.shape) == ((101, 64), (101, 64))
    logits = model(**tiny_inputs, labels=tiny_inputs["input_ids"]).logits
    torch.testing.assert_close(logits[..., :97], expected)


def test_tied_embeddings_stay_tied_through_saving_and_resizing(tiny_model, tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded, report = QwenVLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for m in (model, loaded):
        assert m.lm_head.weight is m.get_input_embeddings().weight
    loaded.resize_token_embeddings(103)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert not torch.equal(tiny_model().lm_head.weight, tiny_model().get_input_embeddings().weight)


@torch.no_grad()
def test_saving_and_loading_leaves_no_garbage_in_any_buffer(tiny_model, tiny_inputs, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = QwenVLForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded(**tiny_inputs).logits, model(**tiny_inputs).logits)
    assert all(torch.equal(b, dict(model.named_buffers())[name]) for name, b in loaded.named_buffers())


@torch.no_grad()
def test_bfloat16_is_close_to_float32(tiny_model, tiny_inputs, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    half = QwenVLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    logits = half(**tiny_inputs).logits
    assert logits.dtype == torch.bfloat16
    expected = model(**tiny_inputs).logits
    assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max()
    half.save_pretrained(tmp_path / "half")
    assert QwenVLForConditionalGeneration.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


@torch.no_grad()
def test_an_adapter_in_float32_works_between_parts_in_bfloat16(tiny_model, tiny_inputs):
    model = tiny_model().bfloat16()
    model.model.adapter.float()
    assert model(**tiny_inputs).logits.dtype == torch.bfloat16


@torch.no_grad()
def test_parts_may_lie_on_disk(tiny_model, tiny_inputs, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    device_map = {"model.visual": "cpu", "model.adapter": "disk", "model.language_model": "cpu", "lm_head": "disk"}
    spread = QwenVLForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert spread.model.adapter.query.device.type == "meta"
    torch.testing.assert_close(spread(**tiny_inputs).logits, model(**tiny_inputs).logits)


def test_the_parts_are_found_by_transformers(tiny_model):
    model = tiny_model()
    assert isinstance(model.get_encoder(modality="image"), QwenVLVisionModel)
    assert model.get_decoder() is model.model.language_model
    assert model.base_model is model.model
    assert model._no_split_modules == {"QwenVLVisionLayer", "QwenVLResampler", "Qwen2DecoderLayer"}


def test_a_copied_model_is_independent(tiny_model, tiny_inputs):
    model = tiny_model()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.adapter.query.add_(1)
        assert not torch.equal(model(**tiny_inputs).logits, twin(**tiny_inputs).logits)
    assert not twin.model.adapter.positions.table.requires_grad


def test_a_tower_that_gives_too_few_tokens_is_refused(tiny_model, tiny_inputs):
    model = tiny_model()
    short = BaseModelOutputWithPooling(last_hidden_state=torch.zeros(3, 9, 32))
    with (
        patch.object(model.model.visual, "forward", return_value=short),
        pytest.raises(ValueError, match=r"9 tokens.*16 patches"),
    ):
        model(**tiny_inputs)
