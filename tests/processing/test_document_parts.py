"""A document part in a conversation: the boxes of its HTML follow the picture into what the family's model reads."""

from collections import Counter

import pytest
from PIL import Image

from processing.processing_families import FAMILIES
from processing.rows import read_rows
from processing.supervision import encode

HTML = '<p data-bbox="10 20 30 40">a</p><img data-bbox="0 0 100 60" />'
WRITTEN = {
    "qwen2_vl": '<p data-bbox="100 333 300 667">a</p><img data-bbox="0 0 999 999" />',
    "qwen2_5_vl": '<p data-bbox="4 8 12 16">a</p><img data-bbox="0 0 40 24" />',
    "qwen3_vl": '<p data-bbox="100 333 300 667">a</p><img data-bbox="0 0 1000 1000" />',
}


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    """A row of document parsing whose page has 100 x 60 pixels; the byte processors show it at 40 x 24."""
    path = tmp_path_factory.mktemp("pages") / "page.png"
    Image.new("RGB", (100, 60)).save(path)
    return {"image": str(path), "prefix": "QwenVL HTML", "suffix": HTML}


@pytest.mark.parametrize("cls", FAMILIES, ids=lambda cls: cls.convention.name)
def test_a_prefix_suffix_row_trains_on_html_in_the_numbers_of_its_model(byte_processor, row, cls):
    (example,) = read_rows([row])
    encoded = encode(example, byte_processor(cls.convention.name, cls))
    decode = byte_processor(cls.convention.name, cls).tokenizer.decode
    supervised = decode(
        [token for token, label in zip(encoded.input_ids, encoded.labels, strict=True) if label != -100]
    )
    assert supervised == WRITTEN[cls.convention.name] + "<|im_end|>"


def test_boxes_outside_the_page_are_refused_or_clipped_and_counted(byte_processor):
    processor = byte_processor("qwen2_5_vl", FAMILIES[1])
    document = {"type": "document", "html": '<p data-bbox="10 20 101 40">a</p>'}
    messages = [{"role": "user", "content": [{"type": "image"}, document]}]
    with pytest.raises(ValueError, match="message 0 part 1: box has x 101, but the picture is 60x100"):
        processor.render_conversation(messages, [(60, 100)])
    counts = Counter()
    (message,) = processor.render_conversation(messages, [(60, 100)], outside="clip", counts=counts)
    assert message["content"][1] == {"type": "text", "text": '<p data-bbox="4 8 40 16">a</p>'}
    assert counts == {"shapes": 1, "clipped": 1}


def test_a_document_means_the_latest_picture_unless_it_names_another(byte_processor):
    processor = byte_processor("qwen2_5_vl", FAMILIES[1])
    pictures = [{"type": "image"}, {"type": "image"}]
    document = {"type": "document", "html": '<p data-bbox="0 0 8 8">a</p>'}
    messages = [{"role": "user", "content": [*pictures, document, {**document, "image_index": 0}]}]
    assert [processor.model_size(*size) for size in ((60, 100), (8, 8))] == [(24, 40), (8, 8)]
    (message,) = processor.render_conversation(messages, [(60, 100), (8, 8)])
    assert [part["text"] for part in message["content"][2:]] == [
        '<p data-bbox="0 0 8 8">a</p>',
        '<p data-bbox="0 0 3 3">a</p>',
    ]


def test_the_chat_template_looks_up_the_size_of_the_page(byte_processor, row):
    (example,) = read_rows([row])
    text = byte_processor("qwen2_5_vl", FAMILIES[1]).apply_chat_template(list(example.messages))
    assert WRITTEN["qwen2_5_vl"] in text
