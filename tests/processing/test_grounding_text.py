"""The text forms of the four families, and back."""

import re

import pytest

from processing.answer_parsing import parse_shapes
from processing.coordinates import CONVENTIONS, Box, Frame, Point, Quad
from processing.grounding_text import render_ref, render_shapes
from processing.special_tokens import IMAGE_SPECIAL_TOKENS, QWEN2_VL_SPECIAL_TOKENS

V1, V2, V25, V3 = CONVENTIONS.values()
# A picture of 1000 x 2000 pixels that the model sees at 500 x 1000: one unit of qwenvl is 2 pixels in x and 1 in y.
FRAME = Frame(height=1000, width=2000, model_height=500, model_width=1000)
CUP = Box(20, 30, 400, 500, label="cup")


def parse(text, convention):
    return parse_shapes(text, [FRAME], convention)


@pytest.mark.parametrize(
    ("shapes", "convention", "text"),
    [
        ([CUP], V1, "<ref>cup</ref><box>(10,30),(200,500)</box>"),
        ([Box(20, 30, 400, 500)], V1, "<box>(10,30),(200,500)</box>"),
        ([CUP, Box(2, 2, 4, 4, "cup")], V1, "<ref>cup</ref><box>(10,30),(200,500)</box><box>(1,2),(2,4)</box>"),
        ([CUP, Point(2, 2, "tip")], V1, "<ref>cup</ref><box>(10,30),(200,500)</box><ref>tip</ref><box>(1,2)</box>"),
        ([Quad(2, 1, 8, 1, 8, 5, 2, 5, "Exit")], V1, "<ref>Exit</ref><quad>(1,1),(4,1),(4,5),(1,5)</quad>"),
        ([CUP], V2, "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(10,30),(200,500)<|box_end|>"),
        ([Quad(2, 1, 8, 1, 8, 5, 2, 5)], V2, "<|quad_start|>(1,1),(4,1),(4,5),(1,5)<|quad_end|>"),
        ([CUP], V25, '[{"bbox_2d": [10, 15, 200, 250], "label": "cup"}]'),
        ([CUP], V3, '[{"bbox_2d": [10, 30, 200, 500], "label": "cup"}]'),
        (
            [Point(2, 2, '出"口'), CUP],
            V3,
            '[{"point_2d": [1, 2], "label": "出\\"口"}, {"bbox_2d": [10, 30, 200, 500], "label": "cup"}]',
        ),
        ([Quad(2, 2, 8, 2, 8, 6, 2, 6)], V25, '[{"quad_2d": [1, 1, 4, 1, 4, 3, 1, 3]}]'),
    ],
)
def test_each_family_has_its_text_and_reads_it_back(shapes, convention, text):
    assert render_shapes(shapes, [FRAME], convention) == text
    answer = parse(text, convention)
    assert answer.shapes == tuple(shapes)
    assert answer.problems == ()


def test_a_phrase_is_marked_where_the_family_has_a_mark():
    marked = [render_ref("an ear", convention) for convention in CONVENTIONS.values()]
    assert marked == ["<ref>an ear</ref>", "<|object_ref_start|>an ear<|object_ref_end|>", "an ear", "an ear"]


@pytest.mark.parametrize(("convention", "tokens"), [(V1, IMAGE_SPECIAL_TOKENS), (V2, QWEN2_VL_SPECIAL_TOKENS)])
def test_a_label_cannot_forge_a_token_in_a_text_of_tokens(convention, tokens):
    for token in tokens:
        with pytest.raises(ValueError, match=re.escape(f"holds {token!r}, which would be read as a special token")):
            render_shapes([Box(0, 0, 1, 1, label=f"a{token}")], [FRAME], convention)


def test_a_label_in_json_is_only_a_string():
    label = '</ref>"}] <|im_end|>'
    assert parse(render_shapes([Box(0, 0, 2, 2, label)], [FRAME], V3), V3).shapes[0].label == label


def test_a_shape_without_a_label_is_refused_where_it_would_inherit_the_one_before():
    with pytest.raises(ValueError, match="a box without a label right after the label 'cup'"):
        render_shapes([CUP, Box(0, 0, 1, 1)], [FRAME], V2)
    assert parse(render_shapes([CUP, Box(0, 0, 2, 2)], [FRAME], V3), V3).shapes[1].label is None


def test_each_shape_is_measured_on_its_own_picture():
    frames = [FRAME, Frame(100, 100, 50, 50)]
    boxes = [Box(0, 0, 10, 10, image_index=1), Box(0, 0, 10, 10, image_index=0)]
    assert render_shapes(boxes, frames, V1) == "<box>(0,0),(100,100)</box><box>(0,0),(5,10)</box>"
