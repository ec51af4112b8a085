"""Long examples: shrunk, trimmed, dropped or refused, and never cut inside a picture or an answer.

In the byte processors 16 pixels are one token; a ChatML frame with its default system turn costs 40 tokens.
"""

import pytest
from PIL import Image

from processing.chat_spans import IGNORE
from processing.example import Example, RowError
from processing.length import Draft, LengthPolicy, fit, picture_tokens, shrink_to, with_max_pixels
from processing.processing_families import Qwen2_5_VLProcessor
from processing.span_encoding import EncodedSpans
from processing.supervision import encode


@pytest.fixture
def processor(byte_processor):
    """Qwen2.5-VL with boxes in pixels of the resized picture."""
    return byte_processor("qwen2_5_vl", cls=Qwen2_5_VLProcessor)


def picture(width, height):
    return {"type": "image", "image": Image.new("RGB", (width, height), (50, 100, 150))}


def example(*contents) -> Example:
    roles = ["user", "assistant"] * len(contents)
    return Example([{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)])


def text_of(encoded, processor):
    return processor.tokenizer.decode(encoded.input_ids).replace("<|image_pad|>", "")


def num_picture_tokens(encoded) -> int:
    return int((encoded.mm_token_type_ids == 1).sum())


def test_an_example_that_fits_exactly_stays_as_it_is(processor):
    long = example([picture(32, 32), {"type": "text", "text": "What?"}], "Blue.")
    length = encode(long, processor).length
    kept = encode(long, processor, length=LengthPolicy(length, ("drop",)))
    assert (kept.length, kept.fitted) == (length, ())
    assert encode(long, processor, length=LengthPolicy(length - 1, ("drop",))) is None


def test_shrinking_takes_the_most_pixels_that_fit_and_keeps_the_text(processor):
    long = example([picture(32, 32), {"type": "text", "text": "What?"}], "Blue.")
    whole = encode(long, processor)
    assert num_picture_tokens(whole) == 64  # 8 x 8
    shrunk = encode(long, processor, length=LengthPolicy(whole.length - 1, ("shrink", "raise")))
    assert shrunk.fitted == ("shrink",)
    assert num_picture_tokens(shrunk) == 49  # 7 x 7: the largest square below 64
    assert shrunk.vision["image_grid_thw"].tolist() == [[1, 14, 14]]
    assert text_of(shrunk, processor) == text_of(whole, processor)


def test_boxes_follow_the_shrunken_picture(processor):
    """The box is the right half of the picture, in whatever pixels the model sees."""
    box = {"type": "box", "bbox": [32, 0, 64, 64], "label": "half"}
    long = example([picture(64, 64), {"type": "text", "text": "Where?"}], [box])
    whole = encode(long, processor)
    assert '"bbox_2d": [16, 0, 32, 32]' in text_of(whole, processor)  # 64 tokens = 32 x 32 pixels
    shrunk = encode(long, processor, length=LengthPolicy(whole.length - 32, ("shrink", "raise")))
    side = int(shrunk.vision["image_grid_thw"][0, 1]) * 2
    assert side == 20
    assert f'"bbox_2d": [{side // 2}, 0, {side}, {side}]' in text_of(shrunk, processor)


def test_the_largest_picture_gives_way_first(processor):
    long = example([picture(32, 32), picture(8, 8), {"type": "text", "text": "?"}], "b")
    whole = encode(long, processor)
    shrunk = encode(long, processor, length=LengthPolicy(whole.length - 30))
    assert shrunk.vision["image_grid_thw"].prod(1).tolist() == [5 * 5 * 4, 2 * 2 * 4]


def test_pictures_do_not_fall_below_the_processors_minimum(processor):
    long = example([picture(32, 32), {"type": "text", "text": "?"}], "b")
    smallest = encode(long, processor).length - 64 + 4
    assert num_picture_tokens(encode(long, processor, length=LengthPolicy(smallest))) == 4
    assert encode(long, processor, length=LengthPolicy(smallest - 1, ("shrink", "drop"))) is None


def test_trimming_leaves_out_the_last_turns_and_ends_with_a_whole_answer(processor):
    long = example([picture(16, 16), {"type": "text", "text": "q1"}], "a1", "q2", "a2", "q3", "a3" * 20)
    whole = encode(long, processor)
    trimmed = encode(long, processor, length=LengthPolicy(whole.length - 1, ("trim", "raise")))
    assert trimmed.fitted == ("trim",)
    assert text_of(trimmed, processor) == text_of(whole, processor).split("<|im_start|>user\nq3")[0]
    assert processor.tokenizer.decode(trimmed.input_ids[trimmed.labels != IGNORE]) == "a1<|im_end|>a2<|im_end|>"
    assert num_picture_tokens(trimmed) == 16


def test_a_trimmed_turn_takes_its_pictures_along(processor):
    long = example([picture(16, 16), {"type": "text", "text": "q1"}], "a1", [picture(32, 32)], "a2")
    trimmed = encode(long, processor, length=LengthPolicy(100, ("trim", "raise")))
    assert trimmed.vision["image_grid_thw"].tolist() == [[1, 8, 8]]
    assert trimmed.vision["pixel_values"].shape[0] == 64


def test_a_trimmed_conversation_ends_with_a_trained_answer(processor):
    messages = [*example("q1", "a1", "q2", "a2", "q3", "a3" * 30).messages]
    messages[3] = {**messages[3], "train": False}
    trimmed = encode(Example(messages), processor, length=LengthPolicy(100, ("trim", "raise")))
    assert "a1" in text_of(trimmed, processor)
    assert "q2" not in text_of(trimmed, processor)


def test_steps_are_tried_in_their_order_and_then_together(processor):
    long = example([picture(32, 32), {"type": "text", "text": "q1"}], "a1" * 20, "q2", "a2" * 20)
    whole = encode(long, processor).length
    for steps, expected in [(("shrink", "trim", "raise"), ("shrink",)), (("trim", "shrink", "raise"), ("trim",))]:
        assert encode(long, processor, length=LengthPolicy(whole - 20, steps)).fitted == expected
    both = encode(long, processor, length=LengthPolicy(whole - 110))
    assert both.fitted == ("trim", "shrink")
    assert both.length <= whole - 110
    # The last two turns are 63 tokens, which leaves 64 - (110 - 63) = 17 for the picture: a square of 4 x 4.
    assert num_picture_tokens(both) == 16


@pytest.mark.parametrize("max_length", range(60, 215, 11))
def test_no_limit_ever_cuts_a_picture_or_an_answer(processor, max_length):
    long = example([picture(32, 24), {"type": "text", "text": "q1"}], "a1", [picture(24, 32)], "a2" * 9)
    fitted = encode(long, processor, length=LengthPolicy(max_length, ("shrink", "trim", "drop")))
    if fitted is None:
        assert max_length < 40 + 22 + 4
        return
    assert fitted.length <= max_length
    pads, grids = num_picture_tokens(fitted), fitted.vision["image_grid_thw"]
    assert pads == grids.prod(1).sum() // 4
    assert len(fitted.vision["pixel_values"]) == pads * 4
    assert text_of(fitted, processor).endswith("<|im_end|>\n")


def test_families_of_one_resolution_cannot_shrink(byte_qwen_vl_processor):
    long = example([picture(8, 8), {"type": "text", "text": "?"}], "b")
    with pytest.raises(RowError, match=r"\(7 of them for 1 pictures\), but max_length is 50"):
        encode(long, byte_qwen_vl_processor, length=LengthPolicy(50))


def test_a_smaller_limit_leaves_the_processor_as_it_was(processor):
    limited = with_max_pixels(processor, 9 * 16)
    assert picture_tokens(limited, [(32, 32)]) == [9]
    assert picture_tokens(processor, [(32, 32)]) == [64]
    assert limited.tokenizer is processor.tokenizer
    assert picture_tokens(shrink_to(processor, [(32, 32), (32, 32)], 100), [(32, 32), (32, 32)]) == [49, 49]
    assert shrink_to(processor, [(32, 32)], 3) is None


def test_a_picture_shrinks_further_where_its_coordinates_take_more_tokens_than_before(processor):
    """Fewer digits may be more tokens for some tokenizer: here the text grows from 10 to 15 tokens when shrunk."""

    def draft(limited, num_messages):
        pads = picture_tokens(limited, [(32, 32)])[0]
        num_text = 10 if limited is processor else 15
        encoded = EncodedSpans([0] * (num_text + pads), [], [], [num_text + pads])
        return Draft(limited, num_messages, encoded, [], [(32, 32)], pads)

    fitted, steps = fit(draft(processor, 2), draft, [], LengthPolicy(60))
    assert steps == ("shrink",)
    assert (fitted.num_picture_tokens, fitted.length) == (36, 51)  # 49 would fit beside 10 tokens, not beside 15


@pytest.mark.parametrize(
    "steps", [(), ("shrink",), ("raise", "trim"), ("drop", "raise"), ("trim", "trim", "drop"), ("cut", "raise")]
)
def test_a_policy_that_does_not_decide_is_refused(steps):
    with pytest.raises(ValueError, match=r"end with 'drop' or 'raise'|Unknown step 'cut'"):
        LengthPolicy(100, steps)
    with pytest.raises(ValueError, match="max_length is 0"):
        LengthPolicy(0)
