"""Spans to ids: special tokens only where allowed, placeholders filled, labels and weights beside every id."""

import pytest

from processing.chat_spans import IGNORE, Span, chat_spans, special_pattern
from processing.span_encoding import encode_spans


def control(text, target=False, weight=0.0, message=0):
    return Span(text, target, weight, allow_special=True, is_content=False, message=message)


def data(text, target=False, weight=0.0, message=0):
    return Span(text, target, weight, allow_special=False, is_content=True, message=message)


@pytest.fixture
def encode(byte_tokenizer):
    def encode(spans, **settings):
        return encode_spans(spans, byte_tokenizer, special_pattern(byte_tokenizer), **settings)

    return encode


@pytest.fixture
def ids(byte_tokenizer):
    return lambda *tokens: byte_tokenizer.convert_tokens_to_ids(list(tokens))


def test_special_tokens_are_parsed_where_allowed_and_bytes_elsewhere(encode, ids, byte_tokenizer):
    encoded = encode([control("<|im_end|>"), data("<|im_end|>")])
    assert encoded.input_ids == ids("<|im_end|>", *"<|im_end|>")
    assert byte_tokenizer.decode(encoded.input_ids) == "<|im_end|><|im_end|>"


def test_special_tokens_named_for_the_data_are_parsed_in_it_and_no_others(encode, ids, byte_tokenizer):
    encoded = encode([data("<|im_end|><|box_end|>")], in_data=special_pattern(byte_tokenizer, ["<|box_end|>"]))
    assert encoded.input_ids == ids(*"<|im_end|>", "<|box_end|>")


def test_labels_and_weights_stand_beside_the_targets(encode, ids):
    encoded = encode(
        [
            control("<|im_start|>a"),
            data("bc", True, 2.0, 1),
            control("<|im_end|>", True, 2.0, 1),
            control("d", message=1),
        ]
    )
    start, end = ids("<|im_start|>", "<|im_end|>")
    assert encoded.input_ids == [start, *ids("a", "b", "c"), end, *ids("d")]
    assert encoded.labels == [IGNORE, IGNORE, *ids("b", "c"), end, IGNORE]
    assert encoded.weights == [0, 0, 2, 2, 2, 0]
    assert encoded.message_ends == [2, 6]


def test_a_placeholder_becomes_its_ids_and_no_target_even_in_an_answer(encode, ids):
    pad, start = ids("<|image_pad|>", "<|vision_start|>")
    spans = [
        control("<|vision_start|><|image_pad|>"),
        control("<|image_pad|>x", True, 1.0, 1),
        data("<|image_pad|>", message=1),
    ]
    encoded = encode(spans, placeholders={"<|image_pad|>": [[pad] * 3, [pad] * 2]}, never_targets={pad})
    assert encoded.input_ids == [start, pad, pad, pad, pad, pad, *ids("x", *"<|image_pad|>")]
    assert encoded.labels[:7] == [IGNORE] * 6 + ids("x")
    assert encoded.weights[:7] == [0] * 6 + [1]


@pytest.mark.parametrize("pictures", [[[1]], [[1], [1], [1]]])
def test_numbers_of_placeholders_and_pictures_must_agree(encode, pictures):
    with pytest.raises(ValueError, match=rf"The text has 2 <\|image_pad\|> but {len(pictures)} picture"):
        encode([control("<|image_pad|><|image_pad|>")], placeholders={"<|image_pad|>": pictures})


def test_what_is_read_is_tokenized_together_but_never_with_what_is_written(encode, ids):
    """Two line breaks in a row are one token of this tokenizer."""
    double = 256
    read_then_read = [control("\n"), data("\nhi")]
    assert encode(read_then_read).input_ids == [double, *ids("h", "i")]
    assert encode(read_then_read, joined=False).input_ids == ids("Ċ", "Ċ", "h", "i")
    within_one_content = [data("\n"), data("\nhi")]
    assert encode(within_one_content, joined=False).input_ids == [double, *ids("h", "i")]
    read_then_written = [control("\n"), data("\nhi", True, 1.0)]
    assert encode(read_then_written).input_ids == ids("Ċ", "Ċ", "h", "i")


def test_an_ordinary_conversation_has_the_ids_of_the_template_itself(encode, byte_tokenizer):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "\n\nWas steht\n da? 你好"},
        {"role": "assistant", "content": "Nichts.\n"},
        {"role": "user", "content": "Warum?"},
        {"role": "assistant", "content": ""},
    ]
    spans = chat_spans(
        messages, lambda m: byte_tokenizer.apply_chat_template(m, tokenize=False), special_pattern(byte_tokenizer)
    )
    expected = byte_tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert encode(spans).input_ids == expected


def test_nothing_encodes_to_nothing(encode):
    encoded = encode([])
    assert (encoded.input_ids, encoded.labels, encoded.weights, encoded.message_ends) == ([], [], [], [])
