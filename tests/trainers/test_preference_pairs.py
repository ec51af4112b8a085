"""Preference rows as pairs of completions: ids, labels, pictures, lengths; and batches of groups."""

import pytest
import torch
from PIL import Image

from processing.example import Example, RowError, Source
from processing.processing_families import load_processor
from trainers.completion_batch import CompletionGroup, collate_groups
from trainers.preference_pairs import PreferencePairs


@pytest.fixture(params=["qwen_vl", "qwen2_5_vl"])
def processor(request, model_folder):
    return load_processor(str(model_folder(request.param)))


def preference(chosen="Ada.", rejected="Bob the builder.", pictures=1, side=8, prompt=(), **fields):
    content = [{"type": "image", "image": Image.new("RGB", (side, side))} for _ in range(pictures)]
    content.append({"type": "text", "text": "Who?"})
    return Example(
        [*prompt, {"role": "user", "content": content}],
        kind="preference",
        chosen=[{"role": "assistant", "content": chosen}],
        rejected=[{"role": "assistant", "content": rejected}],
        source=Source("rows.jsonl", 7),
        **fields,
    )


def test_a_pair_is_one_prompt_and_two_answers_with_their_end_tokens(processor):
    pair = PreferencePairs(processor)(preference(pictures=2))
    decode = processor.tokenizer.decode
    assert [decode(completion) for completion in pair.completions] == ["Ada.<|im_end|>", "Bob the builder.<|im_end|>"]
    assert all(torch.equal(c, labels) for c, labels in zip(pair.completions, pair.labels, strict=True))
    assert decode(pair.prompt_P).endswith("<|im_start|>assistant\n")
    assert int((pair.prompt_P == processor.image_token_id).sum()) == 2 * 4
    assert pair.num_pictures == 2
    assert len(pair.vision["pixel_values"]) in (2, 2 * 16)


def numbers_preprocessed(monkeypatch, processor):
    """How many pictures or videos each later call of `processor` gets."""
    seen = []
    original = type(processor).preprocess

    def preprocess(self, pictures, *args, **kwargs):
        seen.append(len(pictures))
        return original(self, pictures, *args, **kwargs)

    monkeypatch.setattr(type(processor), "preprocess", preprocess)
    return seen


def test_a_video_is_decoded_once_for_both_answers(model_folder, write_video, tmp_path, monkeypatch):
    example = preference(pictures=1)
    path = write_video(tmp_path / "a.mp4", num_frames=8)
    example.messages[-1]["content"].insert(0, {"type": "video", "video": path})
    processor = load_processor(str(model_folder("qwen2_5_vl")))
    seen = numbers_preprocessed(monkeypatch, processor.video_processor)
    pair = PreferencePairs(processor)(example)
    assert seen == [1]
    assert (pair.num_pictures, pair.num_videos) == (1, 1)
    tokens = int(pair.vision["video_grid_thw"].prod()) // 4
    assert int((pair.prompt_P == processor.video_token_id).sum()) == tokens > 0
    batch = collate_groups([pair, PreferencePairs(processor)(preference())], 0, order="completion")
    assert batch["num_videos"].tolist() == [1, 0]
    with pytest.raises(RowError, match=r"rows\.jsonl:7: QwenVLProcessor cannot write parts of type video"):
        PreferencePairs(load_processor(str(model_folder("qwen_vl"))))(example)


def test_answers_of_the_prompt_are_not_scored(processor):
    before = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"})
    pair = PreferencePairs(processor)(preference(prompt=before))
    assert "Hi<|im_end|>" in processor.tokenizer.decode(pair.prompt_P)
    assert processor.tokenizer.decode(pair.completions[0]) == "Ada.<|im_end|>"


def test_each_picture_is_processed_once_for_both_answers(processor, monkeypatch):
    seen = numbers_preprocessed(monkeypatch, processor.image_processor)
    PreferencePairs(processor)(preference(pictures=3))
    assert seen == [3]


def test_pictures_shrink_until_the_longer_answer_fits_and_no_text_is_cut(model_folder):
    processor = load_processor(str(model_folder("qwen2_5_vl")))
    processor.image_processor.size = {"shortest_edge": 16, "longest_edge": 4096}
    example = preference(side=64)
    whole = PreferencePairs(processor)(example)
    assert int((whole.prompt_P == processor.image_token_id).sum()) == 256
    longest = len(whole.prompt_P) + len(whole.completions[1])
    fitted = PreferencePairs(processor, max_length=longest - 1)(example)
    tokens = int((fitted.prompt_P == processor.image_token_id).sum())
    assert 100 < tokens < 256
    assert len(fitted.prompt_P) - tokens == len(whole.prompt_P) - 256
    assert [c.tolist() for c in fitted.completions] == [c.tolist() for c in whole.completions]
    assert len(fitted.vision["pixel_values"]) == 4 * tokens
    # The longer answer decides, wherever it stands.
    swapped = PreferencePairs(processor, max_length=longest - 1)(preference("Bob the builder.", "Ada.", side=64))
    assert torch.equal(swapped.prompt_P, fitted.prompt_P)


def test_pairs_that_no_shrinking_helps_are_refused_with_both_numbers_or_found_not_to_fit(processor):
    pairs = PreferencePairs(processor, max_length=40)
    with pytest.raises(RowError, match=r"rows.jsonl:7: \d+ tokens \(4 of them for 1 picture.*max_length is 40"):
        pairs(preference(pictures=1, rejected="x" * 40))
    assert not pairs.fits(preference(rejected="x" * 400))
    assert not pairs.fits(preference(chosen="x" * 400))
    assert PreferencePairs(processor, max_length=400).fits(preference())


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]), "row of kind 'sft'"),
        (preference(weight=2.0), "has weight 2.0"),
        (
            Example(
                [{"role": "user", "content": "a"}],
                kind="preference",
                chosen=[{"role": "assistant", "content": "b", "weight": 0.5}],
                rejected=[{"role": "assistant", "content": "c"}],
            ),
            "chosen has loss weights",
        ),
    ],
)
def test_rows_that_no_preference_loss_can_read_are_refused(model_folder, example, message):
    with pytest.raises(RowError, match=message):
        PreferencePairs(load_processor(str(model_folder("qwen_vl"))))(example)


def group(prompt, *completions):
    completions = tuple(torch.tensor(completion) for completion in completions)
    return CompletionGroup(torch.tensor(prompt), completions, completions)


def test_a_batch_of_groups_in_both_orders():
    groups = [group([1, 2], [3], [4, 5]), group([6], [7], [8])]
    batch = collate_groups(groups, pad_token_id=0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0], [1, 2, 4, 5], [6, 7, 0, 0], [6, 8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 0], [0, 0, 1, 1], [0, 1, 0, 0], [0, 1, 0, 0]]
    assert batch["group_of_row"].tolist() == [0, 0, 1, 1]
    chosen_first = collate_groups(groups, pad_token_id=0, order="completion")
    assert chosen_first["group_of_row"].tolist() == [0, 1, 0, 1]
    assert chosen_first["input_ids"].tolist() == [[1, 2, 3, 0], [6, 7, 0, 0], [1, 2, 4, 5], [6, 8, 0, 0]]
    with pytest.raises(ValueError, match=r"\[2, 1\] completions, not equal"):
        collate_groups([groups[0], group([6], [7])], 0, order="completion")
