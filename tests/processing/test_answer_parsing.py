"""Answers of models, also those that are not what they should be."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processing.answer_parsing import parse_shapes
from processing.coordinates import CONVENTIONS, Box, Frame, Point, Quad
from processing.grounding_text import render_shapes

V1, V2, V25, V3 = CONVENTIONS.values()
# A picture of 1000 x 2000 pixels that the model sees at 500 x 1000: one unit of qwenvl is 2 pixels in x and 1 in y.
FRAME = Frame(height=1000, width=2000, model_height=500, model_width=1000)
CUP = Box(20, 30, 400, 500, label="cup")


def parse(text, convention, **kwargs):
    return parse_shapes(text, [FRAME], convention, **kwargs)


def problems(text, convention, **kwargs):
    return [(problem.piece, problem.reason) for problem in parse(text, convention, **kwargs).problems]


labels = st.text(st.characters(blacklist_categories=("Cs",)), max_size=12).filter(
    lambda text: text == text.strip() and not any(token in text for token in ("<|", "<ref", "</ref", "<box", "<quad"))
)


@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=CONVENTIONS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shapes_with_any_labels_in_any_prose_are_found_again(convention, data):
    number = st.integers(0, 400).map(lambda value: 2 * value)
    prose = st.text(st.sampled_from("ab .,:中\n"), max_size=10)
    text, shapes = "", []
    for _ in range(data.draw(st.integers(1, 4))):
        x1, y1, x2, y2 = data.draw(st.tuples(number, number, number, number))
        box = Box(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2), data.draw(labels))
        text += data.draw(prose) + render_shapes([box], [FRAME], convention)
        shapes.append(box)
    answer = parse(text + data.draw(prose), convention)
    assert answer.shapes == tuple(shapes)
    assert answer.problems == ()


def test_the_answers_of_the_original_model_are_read():
    # Instances of stage 2 (Qwen-VL paper, appendix B.1)
    answer = parse(
        "Beautiful shot of <ref>bees</ref><box>(661,612),(833,812)</box><box>(120,555),(265,770)</box> gathering "
        "nectars from <ref>an apricot flower</ref><box>(224,13),(399,313)</box><|endoftext|>",
        V1,
    )
    assert answer.text == "Beautiful shot of bees gathering nectars from an apricot flower"
    assert [(shape.label, shape.x1) for shape in answer.shapes] == [
        ("bees", 1322.0),
        ("bees", 240.0),
        ("an apricot flower", 448.0),
    ]
    line = parse("<ref>It is managed</ref> <quad> (568,121), (625,131), (624,182), (567,172)</quad>", V1)
    assert line.shapes == (Quad(1136, 121, 1250, 131, 1248, 182, 1134, 172, "It is managed"),)


def test_a_label_ends_with_the_boxes_right_after_it():
    answer = parse("<ref> cup </ref><box>(1,2),(3,4)</box> and <box>(1,2),(3,4)</box>", V1)
    assert [shape.label for shape in answer.shapes] == ["cup", None]


@pytest.mark.parametrize(
    "text",
    [
        '```json\n[\n\t{"bbox_2d": [10, 30, 200, 500], "label": "cup"},\n\t{"point_2d": [1, 2]}\n]\n```',
        '[{"bbox_2d": [10, 30, 200, 500], "label": "cup"}, {"point_2d": [1.0, 2]}]',
        '{"bbox_2d": [[10, 30, 200, 500]], "text_content": "cup"}\n{"point_2d": [1, 2]}',
        'Here:\n```\n{"label": "cup", "bbox_2d": [10, 30, 200, 500]},{"point_2d": [1, 2]}```',
    ],
)
def test_json_is_found_in_a_fence_in_a_list_and_bare(text):
    answer = parse(text, V3)
    assert answer.shapes == (CUP, Point(2, 2))
    assert (answer.problems, answer.text) == ((), "Here:" if text.startswith("Here") else "")


def test_points_in_the_element_of_qwen2_5_vl_are_read():
    text = '```xml\n<points x1="1" y1="2" x2="3" y2="4.5" alt="tips">tip</points>\n```'
    answer = parse(text, V3)
    assert answer.shapes == (Point(2, 2, "tip"), Point(6, 4.5, "tip"))
    assert (answer.problems, answer.text) == ((), "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('<points x1="1">tip</points>', "points are pairs"),
        ('<points x1="1" y2="2">tip</points>', "points are pairs"),
        ('<points alt="tip">tip</points>', "points are pairs"),
        ('<points x1="1001" y1="2">tip</points>', "x 1001 is outside"),
        ('<points x1="1" y1="2">tip', "not complete"),
    ],
)
def test_malformed_points_are_reported(text, reason):
    (problem,) = parse(text, V3).problems
    assert problem.reason.startswith(reason)
    assert parse(text, V3).shapes == ()


def test_prose_around_json_is_kept_and_foreign_json_is_not_touched():
    answer = parse('A [b] {"total": 3} then [{"bbox_2d": [10, 30, 200, 500], "label": "cup"}]! C<|im_end|>', V3)
    assert answer.text == 'A [b] {"total": 3} then ! C'
    assert answer.shapes == (CUP,)


def test_an_answer_is_about_the_last_picture_unless_told_otherwise():
    frames = [FRAME, Frame(100, 100, 50, 50)]
    text = "<box>(0,0),(500,500)</box>"
    assert parse_shapes(text, frames, V1).shapes == (Box(0, 0, 50, 50, image_index=1),)
    assert parse_shapes(text, frames, V1, image_index=0).shapes == (Box(0, 0, 1000, 500, image_index=0),)
    for index in (2, -1):
        with pytest.raises(ValueError, match=f"about picture {index}, but the conversation has 2 picture"):
            parse_shapes(text, frames, V1, image_index=index)


def test_without_a_picture_every_shape_is_a_problem():
    answer = parse_shapes("a <box>(0,0),(500,500)</box>", [], V1)
    assert (answer.shapes, answer.text) == ((), "a")
    assert [problem.reason for problem in answer.problems] == ["the conversation has no picture that it could lie in"]


@pytest.mark.parametrize(
    ("text", "piece", "reason"),
    [
        ("<box>(1,2),(3", "<box>(1,2),(3", "<box> is not closed"),
        ("<ref>a<box>(1,2),(3,4)</box>", "<ref>a", "<ref> is not closed"),
        ("a</box>b", "</box>b", "</box> closes nothing"),
        ("<box>(1,2),(3,4)</quad>", "<box>(1,2),(3,4)", "<box> is not closed"),
        ("<box>1,2,3,4</box>", "<box>1,2,3,4</box>", "cannot read '1,2,3,4' as (x,y)"),
        ("<box>(1,2),</box>", "<box>(1,2),</box>", "cannot read '' as (x,y)"),
        ("<box>(1,2)(3,4)</box>", "<box>(1,2)(3,4)</box>", "cannot read '(3,4)' as (x,y)"),
        ("<box>(1,2),(3,4),(5,6)</box>", "<box>(1,2),(3,4),(5,6)</box>", "a box has 2 corner(s), not 3"),
        ("<quad>(1,2)</quad>", "<quad>(1,2)</quad>", "a quad has 4 corner(s), not 1"),
        ("<box>(9,2),(3,4)</box>", "<box>(9,2),(3,4)</box>", "the second corner lies left of or above the first"),
        ("<box>(1,9),(3,4)</box>", "<box>(1,9),(3,4)</box>", "the second corner lies left of or above the first"),
        ("<box>(1,2),(1000,4)</box>", "<box>(1,2),(1000,4)</box>", "x 1000 is outside 0 ... 999"),
        ("<box>(-1,2),(3,4)</box>", "<box>(-1,2),(3,4)</box>", "x -1 is outside 0 ... 999"),
    ],
)
def test_a_malformed_tag_is_reported_with_its_piece_and_gives_no_shape_of_its_own(text, piece, reason):
    answer = parse(text, V1)
    assert [(p.piece, p.reason) for p in answer.problems if p.piece == piece] == [(piece, reason)]
    assert text[answer.problems[0].start :].startswith(answer.problems[0].piece)
    assert len(answer.shapes) == (1 if text.startswith("<ref>a<box>") else 0)


def test_boxes_that_lost_their_tags_while_decoding_are_reported():
    (problem,) = parse("Woman(451,379),(731,806)", V1).problems
    assert problem.piece == "(451,379),(731,806)"
    assert "skip_special_tokens" in problem.reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"bbox_2d": [1, 2, 3', "not complete: was the answer cut?"),
        ("[{'bbox_2d': [1, 2, 3, 4]}]", "not JSON: Expecting property name"),
        ('{"bbox_2d": [1, 2, 3]}', "bbox_2d has 3 numbers, which are not pairs"),
        ('{"bbox_2d": [1, 2]}', "a box has 2 corner(s), not 1"),
        ('{"bbox_2d": "1 2 3 4"}', "bbox_2d must be a list of numbers"),
        ('{"bbox_2d": [1, 2, 3, true]}', "bbox_2d must be a list of numbers"),
        ('{"bbox_2d": [1, 2, 3, NaN]}', "y nan is outside 0 ... 1000"),
        ('{"bbox_2d": [1, 2, 3, 1e999]}', "y inf is outside 0 ... 1000"),
        ('{"bbox_2d": [1, 2, 3, 4], "label": 5}', "the label is 5, not a text"),
        ('{"bbox_2d": [1, 2, 3, 4], "point_2d": [1, 2]}', "an object must have one of"),
        ('{"bbox_2d": [5, 2, 3, 4]}', "the second corner lies left of or above the first"),
        ('{"bbox_2d": [1, 2, 3, 4], "a": ' + "[" * 100_000 + "}", "not JSON"),
    ],
)
def test_a_malformed_object_is_reported_and_gives_no_shape(text, reason):
    answer = parse(text, V3)
    assert answer.shapes == ()
    ((piece, found),) = [(problem.piece, problem.reason) for problem in answer.problems]
    assert found.startswith(reason)
    assert len(piece) <= 80


def test_complete_objects_of_a_cut_answer_are_kept():
    answer = parse('```json\n[{"bbox_2d": [10, 30, 200, 500], "label": "cup"}, {"bbox_2d": [1, 2', V3)
    assert answer.shapes == (CUP,)
    assert [problem.piece for problem in answer.problems] == ['{"bbox_2d": [1, 2']


def test_numbers_out_of_range_can_be_clipped_and_are_reported_all_the_same():
    text = "<box>(-5,2),(3,1200)</box>"
    answer = parse(text, V1, outside="clip")
    assert answer.shapes == (Box(0, 2, 6, 999),)
    assert [problem.reason for problem in answer.problems] == ["x -5 is outside 0 ... 999: clipped"]
    assert parse(text, V1).shapes == ()


def test_problems_come_in_the_order_of_the_text():
    text = '{"bbox_2d": [1]} bbox_2d {"bbox_2d": "x"}'
    starts = [problem.start for problem in parse(text, V3).problems]
    assert starts == sorted(starts)
    assert len(starts) == 3


HOSTILE = [
    *("{", '{"', '"{', '{""', '{"\\', '\\"{', "[[", "```json\n", " ", "(1,2),", "(", "((1", "<", "9", "bbox_2d"),
    *('{"a":"bbox_2d"}', '{"bbox_2d":', '{"bbox_2d": [', '{"bbox_2d":[1,2,3,4]} x ', '[ {"bbox_2d":[1,2,3,4]}'),
    *("<box>", "</box>", "<box></box>", "<box>(1,", "<ref>", "<ref></ref>", "<quad>(1,2),"),
    *(
        "<|box_start|>",
        "<|box_start|>(",
        "<points ",
        "<points x1=",
        '<points x1="1" y1="2">',
        '<points x="1" y="1">a</points>',
    ),
]


@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=CONVENTIONS)
def test_no_text_makes_parsing_slower_than_linear(convention):
    for piece in HOSTILE:
        for text in (piece * (100_000 // len(piece)), "<box>" + piece * (100_000 // len(piece)) + "</box>"):
            start = time.perf_counter()
            parse(text, convention)
            # Linear: at most 0.3 s on one slow core. Quadratic: minutes.
            assert time.perf_counter() - start < 5, f"{piece!r} repeated"


@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=CONVENTIONS)
@settings(max_examples=100, deadline=None)
@given(
    text=st.lists(st.sampled_from([*HOSTILE, "cup", ",", "}", "]", "</ref>", "(1,2)", '"label":', '"x"'])).map("".join)
)
def test_no_text_makes_parsing_fail(convention, text):
    for outside in ("refuse", "clip"):
        answer = parse(text, convention, outside=outside)
        assert all(text[problem.start :].startswith(problem.piece.removesuffix("...")) for problem in answer.problems)


def test_json_of_many_objects_equals_what_the_json_module_reads():
    objects = [{"bbox_2d": [i, i, i + 1, i + 2], "label": f"{{{i}]"} for i in range(50)]
    answer = parse("```json\n" + json.dumps(objects, indent=1) + "\n```", V3)
    assert [(s.x1 / 2, s.label) for s in answer.shapes] == [(o["bbox_2d"][0], o["label"]) for o in objects]
    assert answer.text == ""
