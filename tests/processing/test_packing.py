"""Bins, M-RoPE positions, and packed rows that give what padded rows give, in loss and gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from processing.chat_spans import IGNORE
from processing.collators import PackedCollator, PaddedCollator
from processing.encoded_example import EncodedExample
from processing.example import Example
from processing.packing import fill, mrope_positions, pack, pack_stream
from processing.supervision import Supervision


def test_the_longest_goes_first_into_the_first_row_with_room():
    assert pack([5, 7, 3, 2, 3], capacity=10) == [[1, 2], [0, 4, 3]]
    assert fill([[1, 2], [0, 4, 3]], [5, 7, 3, 2, 3], 10) == 1.0
    assert fill([[0], [1]], [5, 7], 10) == 0.6
    assert pack([], 10) == []


@given(st.lists(st.integers(1, 11), max_size=40), st.integers(11, 23))
def test_every_example_is_in_one_row_and_no_row_overflows(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= capacity for row in rows)
    # First fit leaves no two rows that would fit into one.
    room = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(rows) < 2 or room[0] + room[1] > capacity


def test_a_row_holds_one_task_if_tasks_are_given():
    rows = pack([5, 5, 5, 5], 10, tasks=["ocr", "vqa", "ocr", "vqa"])
    assert rows == [[0, 2], [1, 3]]
    with pytest.raises(ValueError, match="4 lengths but 1 tasks"):
        pack([5, 5, 5, 5], 10, tasks=["ocr"])


def test_an_example_longer_than_the_row_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="Example 1 has 11 tokens, a packed row holds 10"):
        pack([3, 11], 10)


def tokens(*lengths, task=None):
    return [
        EncodedExample(torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long), task=task) for n in lengths
    ]


def test_a_stream_is_packed_with_every_example_in_one_row():
    examples = tokens(5, 7, 3, 2, 3, 1, 9, 4, 8, 2, 6)
    rows = list(pack_stream(iter(examples), 10, window=4))
    assert sorted(id(e) for row in rows for e in row) == sorted(map(id, examples))
    assert max(sum(e.length for e in row) for row in rows) <= 10
    assert len(rows) <= 7  # 50 tokens
    assert [len(row) for row in pack_stream(iter(tokens(5, 5, 5)), 10, window=2)] == [2, 1]
    assert list(pack_stream(iter([]), 10)) == []


def test_a_stream_is_packed_by_task_if_asked():
    examples = [
        e for pair in zip(tokens(4, 5, 6, 3, task="a"), tokens(5, 4, 3, 6, task="b"), strict=True) for e in pair
    ]
    rows = list(pack_stream(iter(examples), 10, window=3, by_task=True))
    assert all(len({e.task for e in row}) == 1 for row in rows)
    assert sorted(id(e) for row in rows for e in row) == sorted(map(id, examples))


def test_positions_of_a_picture_between_texts():
    positions = mrope_positions([0, 1, 1, 0], merge_size=2, image_grid_thw=torch.tensor([[1, 2, 4]]))
    assert positions.tolist() == [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]]


def test_frames_of_a_video_are_spaced_by_their_seconds_or_stand_alone():
    grid = torch.tensor([[3, 2, 2]])
    together = [2, 2, 2, 0]
    spaced = mrope_positions(together, merge_size=2, video_grid_thw=grid, seconds_per_grid=[0.5], tokens_per_second=4)
    assert spaced[0].tolist() == [0, 2, 4, 1]
    assert mrope_positions(together, merge_size=2, video_grid_thw=grid)[0].tolist() == [0, 1, 2, 1]
    apart = [0, 2, 0, 2, 0, 2]
    assert mrope_positions(apart, merge_size=2, video_grid_thw=grid)[0].tolist() == [0, 1, 2, 3, 4, 5]


def test_grids_that_do_not_fit_the_tokens_are_refused():
    grid = torch.tensor([[1, 4, 4]])
    with pytest.raises(ValueError, match=r"A run of 3 picture tokens meets a grid of 1 x 2 x 2 = 4 tokens"):
        mrope_positions([1, 1, 1], merge_size=2, image_grid_thw=grid)
    with pytest.raises(ValueError, match="A run of 4 picture tokens has no grid"):
        mrope_positions([1, 1, 1, 1, 0, 1, 1, 1, 1], merge_size=2, image_grid_thw=grid)
    with pytest.raises(ValueError, match=r"left over: \{'picture': 1\}"):
        mrope_positions([0, 0], merge_size=2, image_grid_thw=grid)


# --- Against transformers' models ------------------------------------------------------------------------------------

VOCAB, PICTURE, VIDEO = 53, 47, 48  # token ids


def tiny_model(family: str, vocab_size: int = VOCAB, image_token_id: int = PICTURE):
    """A random model of `family`: 2 layers, M-RoPE over 8 frequencies; patches of 2 x 2 pixels, merged 2 x 2."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = {
        "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "use_cache": True,
        "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {"depth": 2, "num_heads": 2, "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {
        "qwen2_vl": {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        "qwen2_5_vl": {
            "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 19, "window_size": 8,
            "fullatt_block_indexes": [1], "tokens_per_second": 3,
        },
        "qwen3_vl": {
            "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 19, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    }[family]  # fmt: skip
    config = AutoConfig.for_model(
        family, text_config=text, vision_config=vision, image_token_id=image_token_id, video_token_id=VIDEO,
        vision_start_token_id=45, vision_end_token_id=46, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")


M_ROPE = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@pytest.mark.parametrize("family", M_ROPE)
def test_positions_equal_those_of_the_models(family):
    model = tiny_model(family)
    image_grid = torch.tensor([[1, 4, 6], [1, 8, 2]])  # 6 and 4 tokens
    video_grid = torch.tensor([[3, 4, 4], [2, 2, 4]])  # 3 x 4 and 2 x 2 tokens
    first = [2] * 12 if family != "qwen3_vl" else ([2] * 4 + [0]) * 3
    second = [2] * 4 if family != "qwen3_vl" else [2, 2, 0, 2, 2]
    types = [0, *[1] * 6, 0, 0, *first, 0, *[1] * 4, 0, 0, 0, *second, 0]
    seconds = [0.7, 1.5] if family == "qwen2_5_vl" else None
    ids = torch.tensor([[{0: 5, 1: PICTURE, 2: VIDEO}[kind] for kind in types]])
    theirs, _ = model.model.get_rope_index(
        ids, torch.tensor([types]), image_grid, video_grid, second_per_grid_ts=seconds
    )
    ours = mrope_positions(
        types,
        merge_size=2,
        image_grid_thw=image_grid,
        video_grid_thw=video_grid,
        seconds_per_grid=seconds,
        tokens_per_second=3,
    )
    assert torch.equal(ours, theirs[:, 0])


def example(types, *, seed, grids=()) -> EncodedExample:
    """A random example; every third token supervised, and its first too (as the rule of Qwen-VL has it)."""
    rng = torch.Generator().manual_seed(seed)
    types = torch.tensor(types)
    ids = torch.randint(3, 41, types.shape, generator=rng)
    ids[types == 1] = PICTURE
    labels = torch.where((torch.arange(len(ids)) % 3 == 0) & (types == 0), ids, IGNORE)
    vision = {}
    if grids:
        grid = torch.tensor(grids)
        channels = 3 * 2 * 2 * 2  # colours x frames x patch height x patch width
        vision = {
            "pixel_values": torch.randn(int(grid.prod(1).sum()), channels, generator=rng),
            "image_grid_thw": grid,
        }
    return EncodedExample(ids, labels, None, types, vision)


def loss_and_gradients(model, batch):
    """Loss summed over the supervised tokens, so that rows of different numbers of tokens can be added up."""
    labels = batch.pop("labels")
    logits = model(**batch).logits.float()
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_packed_equals_padded(model, examples, packed_collator):
    model.train()
    padded = loss_and_gradients(model, PaddedCollator(pad_token_id=0)(examples))
    packed = loss_and_gradients(model, packed_collator(examples))
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-5, atol=1e-5)
    assert packed[1].keys() == padded[1].keys()
    assert max(gradient.abs().max() for gradient in padded[1].values()) > 0.1
    for name, gradient in padded[1].items():
        torch.testing.assert_close(
            packed[1][name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", M_ROPE)
def test_packed_equals_padded_with_m_rope(family, attention):
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    examples = [
        example([0, *[1] * 6, 0, 0, 0, 0], seed=1, grids=[[1, 4, 6]]),
        example([0] * 5, seed=2),
        example([0, *[1] * 2, 0, *[1] * 3, 0, 0, 0], seed=3, grids=[[1, 4, 2], [1, 2, 6]]),
    ]
    assert_packed_equals_padded(model, examples, PackedCollator(merge_size=2))


def test_rows_packed_on_the_whole_way_from_examples_equal_padded_ones(byte_processor):
    processor = byte_processor("qwen3_vl")
    model = tiny_model("qwen3_vl", len(processor.tokenizer), processor.image_token_id)

    def conversation(question, answer, *pictures):
        parts = [{"type": "image", "image": Image.new("RGB", size, (40, 90, 200))} for size in pictures]
        user = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
        return Example([user, {"role": "assistant", "content": answer}])

    examples = [
        conversation("What?", "A plate.", (32, 16)),
        conversation("1+1?", "2"),
        conversation("Which is larger?", "The first.", (24, 24), (8, 12)),
    ]
    encoded = list(Supervision(processor).stream(examples))
    assert_packed_equals_padded(model, encoded, PackedCollator.for_processor(processor))


@pytest.mark.parametrize("family", M_ROPE)
def test_a_neighbour_in_the_row_changes_nothing(family):
    """The same example after two different neighbours: its logits are the same numbers."""
    model = tiny_model(family).eval()
    last = example([0, *[1] * 2, 0, 0, 0], seed=3, grids=[[1, 4, 2]])
    logits = []
    for seed in (5, 7):
        row = PackedCollator(merge_size=2)([example([0] * 7, seed=seed), last])
        row.pop("labels")
        with torch.no_grad():
            logits.append(model(**row).logits[0, 7:])
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)


@pytest.fixture
def qwen_vl():
    from modeling_qwenvl import QwenVLConfig, QwenVLForConditionalGeneration, QwenVLTextConfig, QwenVLVisionConfig

    vision = QwenVLVisionConfig(
        hidden_size=16, intermediate_size=19, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=3,
        position_grid=4,
    )  # fmt: skip
    text = QwenVLTextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=2,
        seq_length=7,
    )
    config = QwenVLConfig(
        vision_config=vision, text_config=text, num_queries=4, adapter_num_heads=2, image_token_id=PICTURE,
        image_start_token_id=45, image_end_token_id=46,
    )  # fmt: skip
    torch.manual_seed(0)
    return QwenVLForConditionalGeneration(config)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_padded_with_qwen_vl(qwen_vl, attention):
    """Also beyond `seq_length` (7 here): NTK and log-n belong to evaluation, and a row is packed for training only."""
    qwen_vl.set_attn_implementation(attention)

    def native(types, seed):
        encoded = example(types, seed=seed)
        pictures = sum(types) // 4
        rng = torch.Generator().manual_seed(seed)
        vision = {"pixel_values": torch.randn(pictures, 3, 12, 12, generator=rng)} if pictures else {}
        return EncodedExample(encoded.input_ids, encoded.labels, vision=vision)

    examples = [
        native([0, 1, 1, 1, 1, 0, 0, 0, 0], 1),
        native([0] * 5, 2),
        native([0, *[1] * 4, 0, *[1] * 4, 0, 0, 0], 3),
    ]
    assert_packed_equals_padded(qwen_vl, examples, PackedCollator())
