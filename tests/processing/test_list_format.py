"""The list format: equal to the original's recordings, in both directions."""

import doctest
import json

import pytest

import processing.list_format
from processing.list_format import boxes_with_ref, from_list_format, list_format_parts, to_list_format


def test_texts_equal_the_original(tokenizer_reference):
    assert len(tokenizer_reference["list_format_build"]) == 5
    for recorded in tokenizer_reference["list_format_build"]:
        assert from_list_format(recorded["list"]) == recorded["text"]


@pytest.mark.parametrize(("function", "name"), [(to_list_format, "list_format"), (boxes_with_ref, "boxes")])
def test_pieces_and_boxes_equal_the_original_and_are_refused_where_it_refuses(tokenizer_reference, function, name):
    refused = 0
    for string in tokenizer_reference["strings"]:
        if name in string:
            assert json.loads(json.dumps(function(string["text"]))) == string[name], string["text"]
        else:
            refused += 1
            with pytest.raises(ValueError, match="take one message's text only"):
                function(string["text"])
    assert refused == 2


def test_pictures_are_numbered_from_one_and_boxes_lose_their_decimals():
    elements = [{"image": "a"}, {"text": "x "}, {"image": "b"}, {"box": [[1.9, 2, 3, 4], [5, 6, 7, 8]], "ref": "dog"}]
    assert from_list_format(elements) == (
        "Picture 1: <img>a</img>\nx Picture 2: <img>b</img>\n"
        "<ref>dog</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>"
    )


def test_what_is_written_is_read_back_piece_by_piece():
    text = from_list_format([{"image": "a"}, {"box": [[1, 2, 3, 4], [5, 6, 7, 8]], "ref": "dog"}, {"text": "?"}])
    assert to_list_format(text) == [
        {"text": "Picture 1: "},
        {"image": "a"},
        {"text": "\n"},
        {"ref": "dog"},
        {"box": "(1,2),(3,4)"},
        {"box": "(5,6),(7,8)"},
        {"text": "?"},
    ]


def test_only_the_box_right_behind_a_phrase_carries_it():
    text = "<ref> a dog </ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box><ref>b</ref> <box>(0,0),(9,9)</box>"
    assert boxes_with_ref(text) == [
        {"box": (1, 2, 3, 4), "ref": "a dog"},
        {"box": (5, 6, 7, 8)},
        {"box": (0, 0, 9, 9)},
    ]


def test_the_placeholders_of_a_decoded_prompt_are_a_picture_without_a_path():
    assert to_list_format("<img><imgpad><imgpad></img>Hi") == [{"image": ""}, {"text": "Hi"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("see <box>(1,2)", "<box> at character 4 is never closed by </box>"),
        ("<img>a.png", "<img> at character 0 is never closed by </img>"),
        ("a<|extra_7|>", r"holds <\|extra_7\|> at character 1"),
    ],
)
def test_unclosed_tags_and_control_tokens_are_refused_by_name_and_place(text, message):
    with pytest.raises(ValueError, match=message):
        to_list_format(text)


@pytest.mark.parametrize("inside", ["(1,2)", "(1,2),(3,4),(5,6)", "(1,2),(3,x)", ""])
def test_a_box_that_is_not_four_integers_is_refused(inside):
    with pytest.raises(ValueError, match="is not four integers"):
        boxes_with_ref(f"<box>{inside}</box>")


@pytest.mark.parametrize("function", [from_list_format, list_format_parts])
def test_an_element_of_no_known_kind_is_refused_with_its_place(function):
    with pytest.raises(ValueError, match=r"Element 1 is \{'video': 'v'\}: it needs one of 'image', 'text', 'box'"):
        function([{"text": "a"}, {"video": "v"}])


def test_parts_for_the_processor_keep_the_thousandths_of_the_boxes():
    parts = list_format_parts([{"image": "a.png"}, {"text": "is "}, {"box": [(1, 2, 3, 4)]}])
    assert parts == [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "is "},
        {"type": "box", "bbox": [[1, 2, 3, 4]], "label": None, "normalized": 1000},
    ]


def test_the_examples_in_the_docstrings_are_true():
    result = doctest.testmod(processing.list_format, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
    assert result.attempted == 4
