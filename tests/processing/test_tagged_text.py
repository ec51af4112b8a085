"""Qwen-VL's tags become typed parts, and the parts still say every character of the text."""

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processing.tagged_text import parts_from_tags


def text_of(parts):
    """The text that the parts stand for, as Qwen-VL writes it; written without looking at the code under test."""
    text = ""
    for part in parts:
        kind = part["type"]
        if kind == "text":
            text += part["text"]
        elif kind == "ref":
            text += f"<ref>{part['text']}</ref>"
        elif kind == "image":
            text += f"<img>{part['image']}</img>"
        else:
            key, tag = {"box": ("bbox", "box"), "quad": ("quad", "quad"), "point": ("point", "box")}[kind]
            shapes = part[key] if isinstance(part[key][0], list) else [part[key]]
            text += f"<ref>{part['label']}</ref>" if "label" in part else ""
            for shape in shapes:
                pairs = ",".join(f"({x},{y})" for x, y in zip(shape[::2], shape[1::2], strict=True))
                text += f"<{tag}>{pairs}</{tag}>"
    return text


number = st.integers(0, 999).map(str)
pair = st.builds(lambda x, y: f"({x},{y})", number, number)
words = st.text(st.sampled_from("ab \n:(1,2)犬<>"), max_size=5).filter(lambda text: "<" not in text or ">" not in text)
piece = st.one_of(
    words,
    words.map(lambda text: f"<ref>{text}</ref>"),
    st.sampled_from(["<ref>dog</ref>", "<img>a.png</img>", "Picture 1: ", "\n"]),
    st.lists(pair, min_size=2, max_size=2).map(lambda pairs: f"<box>{','.join(pairs)}</box>"),
    st.lists(pair, min_size=4, max_size=4).map(lambda pairs: f"<quad>{','.join(pairs)}</quad>"),
    pair.map(lambda p: f"<box>{p}</box>"),
)


@settings(deadline=None)
@given(st.lists(piece, max_size=9).map("".join))
def test_parts_say_every_character_of_the_text_they_came_from(text):
    assert text_of(parts_from_tags(text)) == text


@settings(deadline=None)
@given(st.lists(piece, max_size=9).map("".join))
def test_no_two_neighbours_share_a_label_because_they_would_share_one_ref_when_written(text):
    parts = parts_from_tags(text)
    labels = [(a.get("label"), b.get("label")) for a, b in pairwise(parts)]
    assert not [pair for pair in labels if pair[0] is not None and pair[0] == pair[1]]


def test_a_picture_keeps_the_number_that_the_text_gives_it_and_gets_no_other():
    assert parts_from_tags("Picture 1: <img>a.png</img>\nWho?") == [
        {"type": "text", "text": "Picture 1: "},
        {"type": "image", "image": "a.png", "numbered": False},
        {"type": "text", "text": "\nWho?"},
    ]


def test_boxes_side_by_side_are_one_part_under_the_label_before_them():
    text = "<ref>bees</ref><box>(2,3),(5,7)</box><box>(11,13),(17,19)</box><box>(23,29),(31,37)</box>"
    shapes = [[2, 3, 5, 7], [11, 13, 17, 19], [23, 29, 31, 37]]
    assert parts_from_tags(text) == [{"type": "box", "bbox": shapes, "normalized": 1000, "label": "bees"}]


def test_a_label_that_is_said_twice_stays_said_twice():
    text = "<ref>bee</ref><box>(2,3),(5,7)</box><ref>bee</ref><box>(11,13),(17,19)</box>"
    parts = parts_from_tags(text)
    assert [part["type"] for part in parts] == ["box", "ref", "box"]
    assert text_of(parts) == text


def test_a_blank_between_phrase_and_quad_stays_and_keeps_them_apart():
    assert parts_from_tags("<ref>It</ref> <quad>(2,3),(5,7),(11,13),(17,19)</quad>") == [
        {"type": "ref", "text": "It"},
        {"type": "text", "text": " "},
        {"type": "quad", "quad": [2, 3, 5, 7, 11, 13, 17, 19], "normalized": 1000},
    ]


def test_one_corner_in_a_box_is_a_point():
    assert parts_from_tags("<box>(2,3)</box>") == [{"type": "point", "point": [2, 3], "normalized": 1000}]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a <box>(1,2),(3,4)", "<box> without its partner in 'a <box>(1,2),(3,4)'"),
        ("</ref> a", "</ref> without its partner"),
        ("<img></img>", "<img></img> is empty"),
        ("<ref>a <box>(1,2),(3,4)</box></ref>", "<box> inside <ref>..</ref>"),
        (
            "<box>(1,2),(3,1000)</box>",
            "<box> holds '(1,2),(3,1000)', wanted is (x1,y1),(x2,y2) or (x,y) in whole numbers",
        ),
        ("<box>(1000,2),(3,4)</box>", "<box> holds '(1000,2),(3,4)'"),
        ("<box>(1, 2),(3,4)</box>", "without blanks"),
        ("<box>(1.5,2),(3,4)</box>", "whole numbers from 0 to 999"),
        ("<box>(-1,2),(3,4)</box>", "whole numbers from 0 to 999"),
        ("<quad>(1,2),(3,4)</quad>", "wanted is (x1,y1),(x2,y2),(x3,y3),(x4,y4)"),
        ("<box></box>", "<box> holds ''"),
    ],
)
def test_malformed_tags_are_refused_with_what_they_hold(text, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        parts_from_tags(text)
