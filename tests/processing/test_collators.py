"""The exact batches: padded, packed, with and without pictures."""

import pytest
import torch
from torch import tensor

from processing.collators import PackedCollator, PaddedCollator, SupervisedCollator
from processing.encoded_example import EncodedExample
from processing.example import Example

X = -100


@pytest.fixture
def with_picture():
    """Five tokens, two of them (99) for a picture of 2 x 4 patches."""
    return EncodedExample(
        input_ids=tensor([11, 99, 99, 12, 13]),
        labels=tensor([X, X, X, 12, 13]),
        mm_token_type_ids=tensor([0, 1, 1, 0, 0]),
        vision={"pixel_values": torch.arange(8 * 3.0).view(8, 3), "image_grid_thw": tensor([[1, 2, 4]])},
    )


@pytest.fixture
def text_only():
    """Three tokens, all supervised, with weight 2."""
    return EncodedExample(
        input_ids=tensor([21, 22, 23]),
        labels=tensor([21, 22, 23]),
        loss_weights=tensor([2.0, 2.0, 2.0]),
        mm_token_type_ids=tensor([0, 0, 0]),
    )


def assert_batches_equal(batch, expected):
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(batch[name], value), name
            assert batch[name].dtype == value.dtype, name
        else:
            assert batch[name] == value, name


def test_padded_batch(with_picture, text_only):
    expected = {
        "input_ids": tensor([[11, 99, 99, 12, 13], [21, 22, 23, 0, 0]]),
        "attention_mask": tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "labels": tensor([[X, X, X, 12, 13], [21, 22, 23, X, X]]),
        "loss_weights": tensor([[0.0, 0, 0, 1, 1], [2, 2, 2, 0, 0]]),
        "mm_token_type_ids": tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]),
        **with_picture.vision,
    }
    assert_batches_equal(PaddedCollator(pad_token_id=0)([with_picture, text_only]), expected)


def test_packed_batch(with_picture, text_only):
    expected = {
        "input_ids": tensor([[11, 99, 99, 12, 13, 21, 22, 23]]),
        # The first label of the second example is gone: here token 13 would be asked to predict it.
        "labels": tensor([[X, X, X, 12, 13, X, 22, 23]]),
        "loss_weights": tensor([[0.0, 0, 0, 1, 1, 0, 2, 2]]),
        "mm_token_type_ids": tensor([[0, 1, 1, 0, 0, 0, 0, 0]]),
        "position_ids": tensor(
            [
                [[0, 1, 2, 3, 4, 0, 1, 2]],  # text
                [[0, 1, 1, 3, 4, 0, 1, 2]],  # time
                [[0, 1, 1, 3, 4, 0, 1, 2]],  # height
                [[0, 1, 2, 3, 4, 0, 1, 2]],  # width
            ]
        ),
        "use_cache": False,
        **with_picture.vision,
    }
    assert_batches_equal(PackedCollator(merge_size=2)([with_picture, text_only]), expected)


def test_packed_batch_without_m_rope_has_plain_positions():
    rows = [EncodedExample(tensor([7, 8]), tensor([X, 8])), EncodedExample(tensor([9, 5, 6]), tensor([X, X, 6]))]
    expected = {
        "input_ids": tensor([[7, 8, 9, 5, 6]]),
        "labels": tensor([[X, 8, X, X, 6]]),
        "position_ids": tensor([[0, 1, 0, 1, 2]]),
        "use_cache": False,
    }
    assert_batches_equal(PackedCollator()(rows), expected)


def test_padding_on_the_left_and_to_a_multiple(text_only):
    batch = PaddedCollator(pad_token_id=23, pad_to_multiple_of=5, padding_side="left")([text_only])
    assert batch["input_ids"].tolist() == [[23, 23, 21, 22, 23]]
    assert batch["labels"].tolist() == [[X, X, 21, 22, 23]]


def test_a_padding_id_inside_a_text_stays_visible(text_only):
    batch = PaddedCollator(pad_token_id=22)([text_only])
    assert batch["attention_mask"].tolist() == [[1, 1, 1]]


def test_pictures_follow_one_another_and_a_batch_without_has_no_keys_for_them(with_picture, text_only):
    batch = PaddedCollator(0)([with_picture, text_only, with_picture])
    assert batch["pixel_values"].shape == (16, 3)
    assert batch["image_grid_thw"].tolist() == [[1, 2, 4], [1, 2, 4]]
    assert PaddedCollator(0)([text_only]).keys() == {
        "input_ids", "labels", "attention_mask", "loss_weights", "mm_token_type_ids"
    }  # fmt: skip
    plain = EncodedExample(text_only.input_ids, text_only.labels)
    assert PaddedCollator(0)([plain]).keys() == {"input_ids", "labels", "attention_mask"}


def test_flash_attention_finds_the_borders_of_the_examples_in_the_positions(with_picture, text_only):
    """What transformers derives for `flash_attn_varlen_func`, which needs a GPU to run itself."""
    from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

    batch = PackedCollator(merge_size=2)([with_picture, text_only, with_picture])
    text_positions = batch["position_ids"][0]  # what the models hand to attention
    assert _is_packed_sequence(text_positions, batch_size=1)
    (borders, _), (longest, _) = prepare_fa_kwargs_from_position_ids(text_positions)
    assert borders.tolist() == [0, 5, 8, 13]
    assert longest == 5


def test_what_does_not_belong_together_is_refused(with_picture, text_only):
    plain = EncodedExample(text_only.input_ids, text_only.labels)
    with pytest.raises(ValueError, match="with and without mm_token_type_ids"):
        PaddedCollator(0)([with_picture, plain])
    with pytest.raises(ValueError, match="has no mm_token_type_ids"):
        PackedCollator(merge_size=2)([plain])
    with pytest.raises(ValueError, match="at least one example"):
        PackedCollator()([])
    with pytest.raises(ValueError, match="padding_side is 'middle'"):
        PaddedCollator(0, padding_side="middle")
    video = EncodedExample(
        plain.input_ids, plain.labels, None, tensor([0, 2, 0]), {"second_per_grid_ts": tensor([1.0])}
    )
    with pytest.raises(ValueError, match="need tokens_per_second"):
        PackedCollator(merge_size=2)([video])


def test_examples_are_encoded_on_the_way_to_the_batch(byte_processor):
    from processing.length import LengthPolicy
    from processing.supervision import Supervision

    examples = [
        Example([{"role": "user", "content": "q" * size}, {"role": "assistant", "content": "a"}])
        for size in (1, 3, 90)
    ]
    supervise = Supervision(byte_processor("qwen2_vl"), length=LengthPolicy(60, ("drop",)))
    collate = SupervisedCollator(supervise, PaddedCollator(pad_token_id=0))
    assert collate(examples)["input_ids"].shape == (2, 44)
    with pytest.raises(ValueError, match=r"All 1 examples of a batch are too long .* <memory>: measure them"):
        collate(examples[2:])
