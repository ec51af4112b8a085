"""Positions in time, height and width: however rows reach the model, each gives what it gives alone.

Three families, with rows of text, pictures and video that the test makes. Everything goes through the package's own
data path and transformers' own forward.
"""

from contextlib import suppress

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from processing.collators import PackedCollator, PaddedCollator
from processing.example import Example
from processing.processing_families import load_processor
from processing.supervision import Supervision

TOLERANCE = {"atol": 2e-5, "rtol": 0}


@pytest.fixture(params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def loaded(request, model_folder):
    """(model, processor) of a family."""
    model = AutoModelForImageTextToText.from_pretrained(model_folder(request.param)).eval()
    return model, load_processor(model_folder(request.param))


@pytest.fixture
def examples(write_video, tmp_path):
    """Text; a picture; two pictures; a video; a video and a picture: of different lengths, in an order that mixes."""
    video = {"type": "video", "video": write_video(tmp_path / "a.mp4", num_frames=8, fps=4)}
    short = {"type": "video", "video": write_video(tmp_path / "b.mp4", num_frames=4, fps=1), "fps": 1}

    def picture(width, height):
        return {"type": "image", "image": Image.linear_gradient("L").resize((width, height)).convert("RGB")}

    def ask(*parts, question="What?", answer="A thing."):
        content = [*parts, {"type": "text", "text": question}]
        return Example([{"role": "user", "content": content}, {"role": "assistant", "content": answer}])

    return [
        ask(picture(8, 8)),
        ask(question="1+1?", answer="2"),
        ask(video, question="And now?"),
        ask(picture(16, 4), picture(4, 8), question="Which one is wider?", answer="The first."),
        ask(short, picture(8, 4), question="Is it in the video?", answer="No."),
    ]


@pytest.fixture
def encoded(loaded, examples):
    return list(Supervision(loaded[1]).stream(examples))


@torch.no_grad()
def alone(model, example):
    """Logits (L, V) of one row in a batch of its own."""
    return model(**model_inputs(PaddedCollator(0)([example]))).logits[0]


def model_inputs(batch):
    return {name: value for name, value in batch.items() if name not in ("labels", "loss_weights")}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_give_what_they_give_alone(loaded, encoded, side):
    model, _ = loaded
    batch = PaddedCollator(0, padding_side=side)(encoded)
    with torch.no_grad():
        logits = model(**model_inputs(batch)).logits
    for row, example in enumerate(encoded):
        kept = logits[row][batch["attention_mask"][row].bool()]
        torch.testing.assert_close(kept, alone(model, example), **TOLERANCE)


def test_packed_rows_give_what_they_give_alone(loaded, encoded):
    model, processor = loaded
    collate = PackedCollator.for_processor(
        processor, tokens_per_second=model.config.to_dict()["vision_config"].get("tokens_per_second")
    )
    with torch.no_grad():
        logits = model(**model_inputs(collate(encoded))).logits[0]
    start = 0
    for example in encoded:
        torch.testing.assert_close(logits[start : start + example.length], alone(model, example), **TOLERANCE)
        start += example.length


def test_the_packed_positions_are_those_of_the_model_s_own_get_rope_index(loaded, encoded):
    model, processor = loaded
    collate = PackedCollator.for_processor(
        processor, tokens_per_second=model.config.to_dict()["vision_config"].get("tokens_per_second")
    )
    for example in encoded:
        batch = PaddedCollator(0)([example])
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        theirs, _ = model.model.get_rope_index(**{name: batch[name] for name in names if name in batch})
        assert torch.equal(collate([example])["position_ids"][1:], theirs)


def test_leaving_out_the_kinds_of_tokens_is_refused_or_gives_other_logits(loaded, encoded):
    """So that a collator that dropped them would be seen: positions then are those of text."""
    model, _ = loaded
    batch = model_inputs(PaddedCollator(0)([encoded[3]]))
    del batch["mm_token_type_ids"]
    without = None
    with suppress(ValueError), torch.no_grad():
        without = model(**batch).logits[0]
    assert without is None or not torch.allclose(without, alone(model, encoded[3]), **TOLERANCE)


def test_no_step_of_the_data_path_loses_the_kinds_of_tokens(loaded, encoded):
    _, processor = loaded
    padded, packed = PaddedCollator(0)(encoded), PackedCollator.for_processor(processor, 1.0)(encoded)
    kinds = torch.cat([example.mm_token_type_ids for example in encoded])
    assert torch.equal(packed["mm_token_type_ids"][0], kinds)
    assert torch.equal(padded["mm_token_type_ids"][padded["attention_mask"].bool()], kinds)
    for token, kind in ((processor.image_token_id, 1), (processor.video_token_id, 2)):
        assert torch.equal(packed["input_ids"][0] == token, kinds == kind)
        assert (kinds == kind).sum() > 0


def test_inputs_embeds_with_positions_give_the_logits_of_the_ids(loaded, encoded):
    """Positions are given: without them transformers takes those of the forward before."""
    model, _ = loaded
    for example in (encoded[3], encoded[2]):
        batch = model_inputs(PaddedCollator(0)([example]))
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        positions, _ = model.model.get_rope_index(**{name: batch[name] for name in names if name in batch})
        embeds = model.get_input_embeddings()(batch["input_ids"])
        text = {"attention_mask": batch["attention_mask"], "position_ids": positions}
        vision = {name: value for name, value in batch.items() if name.startswith(("pixel", "image_", "video_"))}
        with torch.no_grad():
            logits = model(inputs_embeds=embeds, **text, **vision).logits[0]
        torch.testing.assert_close(logits, alone(model, example), **TOLERANCE)


def test_generation_in_a_batch_padded_on_the_left_is_generation_one_by_one(loaded, examples):
    model, processor = loaded
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    prompts = [list(example.messages[:-1]) for example in examples]

    def inputs_of(conversations):
        return processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"padding": True, "padding_side": "left", "return_tensors": "pt"},
        )

    together = inputs_of(prompts)
    new = model.generate(**together, **options)[:, together["input_ids"].shape[1] :]
    for row, prompt in enumerate(prompts):
        single = inputs_of([prompt])
        expected = model.generate(**single, **options)[0, single["input_ids"].shape[1] :]
        assert new[row].tolist() == expected.tolist()


def test_generation_goes_on_from_the_positions_of_the_whole_forward(loaded, examples):
    """Greedy tokens with the cache are those of one forward over prompt and answer, step by step."""
    model, processor = loaded
    example = examples[4]
    inputs = processor.apply_chat_template(
        list(example.messages[:-1]),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt"},
    )
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    ids = model.generate(**inputs, **options)
    new = ids.shape[1] - inputs["input_ids"].shape[1]
    whole = dict(inputs) | {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, new)),
    }
    with torch.no_grad():
        logits = model(**whole).logits[0]
    assert logits[-new - 1 : -1].argmax(-1).tolist() == ids[0, -new:].tolist()
