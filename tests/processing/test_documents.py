"""QwenVL HTML: what is built is what is read; boxes move and nothing else does; what is wrong is found, by line."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processing.coordinates import CONVENTIONS, Box, Frame
from processing.document_boxes import document_for_model, document_from_model, rescale_document
from processing.document_markdown import to_markdown
from processing.document_parsing import check_document, parse_document
from processing.documents import KINDS, MARKUP_KINDS, Document, Element, document_from_annotations, element

# One of each form that the Qwen2.5-VL technical report prints (section 2.2.1), with its swapped closing tags.
REPORT = """<html><body>
<p data-bbox="1 2 3 5"> content </p>
<style>table7{color:red}</style><table data-bbox="7 11 13 17" class="table7"> <tr><td>cell</td></tr> </table>
<div class="chart" data-bbox="19 23 29 31"> <img data-bbox="19 23 29 27" /><table> <tr><td>2</td></tr> </table></div>
<div class="formula" data-bbox="1 2 3 5"> <img data-bbox="1 2 3 5" /> <div> a^2 </div></div>
<div class="image caption" data-bbox="1 2 3 5"> <img data-bbox="1 2 3 5" /><p> a cat </p></div>
<div class="image ocr" data-bbox="1 2 3 5"> <img data-bbox="1 2 3 5" /><p> STOP </p></div>
<div class="music sheet" format="abc notation" data-bbox="1 2 3 5"> <img data-bbox="1 2 3 5" /> <div> X:1 </div></div>
<div class="chemical formula" format="smile" data-bbox="1 2 3 5"> <img data-bbox="1 2 3 5" /> <div> CCO </div></div>
</html></body>"""

boxes = st.builds(
    lambda x, y, width, height: Box(x, y, x + width, y + height),
    *[st.integers(0, 400)] * 2,
    *[st.integers(1, 400)] * 2,
)


def test_every_form_of_the_report_is_read():
    parsed = parse_document(f"```html\n{REPORT}\n```")
    assert [(item.kind, item.text) for item in parsed.document.elements] == [
        ("paragraph", "content"),
        ("table", "cell"),
        ("chart", "2"),
        ("formula", "a^2"),
        ("image_caption", "a cat"),
        ("image_ocr", "STOP"),
        ("music_sheet", "X:1"),
        ("chemical_formula", "CCO"),
    ]
    assert parsed.document.elements[1].box == Box(7, 11, 13, 17)
    assert parsed.document.elements[2].picture == Box(19, 23, 29, 27)
    assert parsed.problems == ()


def test_a_picture_without_words_may_stand_alone():
    (image,) = parse_document('<img src="a.png" data-bbox="1 2 3 5"/>').document.elements
    assert (image.kind, image.box) == ("image", Box(1, 2, 3, 5))


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(KINDS)), boxes, st.text(max_size=9), boxes | st.none())))
def test_a_page_that_is_written_and_read_again_is_the_same_page(rows):
    elements = []
    for kind, box, text, picture in rows:
        text = " ".join(text.replace("\r", "").replace("\0", "").split())
        words = element("paragraph", [0, 0, 1, 1], text).content
        content = "" if kind == "image" else "<tr><td>7</td></tr>" if kind in MARKUP_KINDS else words
        inner = picture if KINDS[kind].has_picture and picture != box else None
        elements.append(Element(kind, box, content, inner))
    page = Document(tuple(elements))
    assert parse_document(page.to_html()).document == page


def test_annotations_become_a_page_with_escaped_texts():
    page = document_from_annotations(
        [
            {"kind": "h2", "bbox": [1, 2, 30, 5], "text": "R&D <3"},
            {"kind": "table", "bbox": [1, 7, 30, 11.5], "content": "<tr><td>2</td></tr>"},
            {"kind": "formula", "bbox": [1, 13, 30, 17], "text": "a<b"},
        ]
    )
    assert page.to_html().split("\n") == [
        "<html><body>",
        '<h2 data-bbox="1 2 30 5">R&amp;D &lt;3</h2>',
        '<table data-bbox="1 7 30 11.5"><tr><td>2</td></tr></table>',
        '<div class="formula" data-bbox="1 13 30 17"><img data-bbox="1 13 30 17" /><div>a&lt;b</div></div>',
        "</body></html>",
    ]


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (
            {"kind": "paragrap", "bbox": [1, 2, 3, 5]},
            "annotation 1: unknown kind of element 'paragrap', did you mean 'para",
        ),
        ({"kind": "table", "bbox": [1, 2, 3, 5], "text": "a"}, "annotation 1: a table needs content"),
        ({"kind": "paragraph", "bbox": [1, 2, 3], "text": "a"}, r"bbox must be \[x1, y1, x2, y2\], it is \[1, 2, 3\]"),
        ({"kind": "paragraph", "bbox": [1, 2, 3, 5], "text": "a", "content": "b"}, "either text or content"),
        ({"kind": "paragraph", "bbox": [7, 2, 3, 5], "text": "a"}, "annotation 1: box has x1 7 > x2 3"),
        ({"kind": "paragraph", "box": [7, 2, 3, 5]}, "annotation 1 has the unknown key 'box'"),
        ({"kind": "paragraph"}, "annotation 1 needs bbox"),
        ({"kind": "image", "bbox": [1, 2, 3, 5], "text": "a"}, "an image has no content"),
    ],
)
def test_malformed_annotations_are_refused(annotation, reason):
    with pytest.raises(ValueError, match=reason):
        document_from_annotations([{"kind": "h1", "bbox": [1, 2, 3, 5], "text": "a"}, annotation])


def test_only_elements_that_show_a_picture_have_one_and_html_needs_boxes():
    with pytest.raises(ValueError, match="an element of kind 'h1' has no picture"):
        Element("h1", None, "a", Box(1, 2, 3, 5))
    with pytest.raises(ValueError, match=r"element 0 \(h1: 'a'\) has no box"):
        Document((Element("h1", None, "a"),)).to_html()


def test_boxes_move_and_nothing_else_does():
    html = (
        "<P class='x' data-bbox='10 20 30 50'>say data-bbox=\"1 2 3 5\" &lt;p data-bbox=\"7\"&gt;</P>\n"
        "<img DATA-BBOX=10,20,30,50>"
    )
    assert rescale_document(html, 0.5, 2) == html.replace("'10 20 30 50'", '"5 40 15 100"').replace(
        "10,20,30,50", '"5 40 15 100"'
    )


def test_numbers_are_rounded_to_the_nearest_and_both_axes_have_their_own_scale():
    assert rescale_document('<p data-bbox="3 3 7 7">a</p>', 0.5, 0.3) == '<p data-bbox="2 1 4 2">a</p>'


@pytest.mark.parametrize(
    ("html", "reason"),
    [
        ('<p data-bbox="1 2 3">a</p>', "data-bbox '1 2 3' is not four numbers"),
        ('<p data-bbox="1 2 x 5">a</p>', "is not four numbers"),
        ('<p data-bbox="7 2 3 5">a</p>', "x1 7 > x2 3"),
        ("<p data-bbox>a</p>", "cannot read the data-bbox of '<p data-bbox>'"),
        ('<p data-bbox="1 2 3 5" data-bbox="1 2 3 5">a</p>', "cannot read the data-bbox"),
        ('<p data-polygon="1 2 3 5 7 11">a</p>', "has a data-polygon, which is not read"),
    ],
)
def test_a_box_that_cannot_be_moved_is_refused_and_not_left_where_it_was(html, reason):
    with pytest.raises(ValueError, match=reason):
        rescale_document(html, 2, 2)


def test_what_a_model_reads_follows_its_convention_and_the_border_of_the_page():
    frame = Frame(height=600, width=800, model_height=588, model_width=812)
    html = '<p data-bbox="80 60 800 600">a</p>'
    assert document_for_model(html, frame, CONVENTIONS["qwen2_5_vl"]) == '<p data-bbox="81 59 812 588">a</p>'
    assert document_for_model(html, frame, CONVENTIONS["qwenvl"]) == '<p data-bbox="100 100 999 999">a</p>'
    assert document_for_model(html, frame, CONVENTIONS["qwen3_vl"]) == '<p data-bbox="100 100 1000 1000">a</p>'
    with pytest.raises(ValueError, match="box has x 801, but the picture is 600x800"):
        document_for_model('<p data-bbox="80 60 801 600">a</p>', frame, CONVENTIONS["qwen2_5_vl"])


@settings(deadline=None)
@given(boxes, st.sampled_from(["qwen2_5_vl", "qwen3_vl"]), st.integers(28, 2000), st.integers(28, 2000))
def test_to_the_model_and_back_stays_within_half_a_unit(box, name, model_height, model_width):
    frame = Frame(height=800, width=800, model_height=model_height, model_width=model_width)
    convention = CONVENTIONS[name]
    html = Document((Element("paragraph", box, "a"),)).to_html()
    back = document_from_model(document_for_model(html, frame, convention), frame, convention)
    moved = parse_document(back).document.elements[0].box
    for before, after, steps in (
        (box.x1, moved.x1, convention.steps or model_width),
        (box.y2, moved.y2, convention.steps or model_height),
    ):
        assert abs(before - after) <= 800 / steps / 2 + 0.006  # two decimals are written


@pytest.mark.parametrize(
    ("html", "problems"),
    [
        ('<p data-bbox="1 2 3 5">a', [("markup", "line 1: <p> is not closed")]),
        ('\n<p data-bbox="1 2 3 5">a</p></p>', [("markup", "line 2: </p> closes nothing")]),
        ('<p data-bbox="1 2 3 5">\n<b>a</p>', [("markup", "line 2: <b> is not closed before </p>")]),
        ('<p data-bbox="1 2 3 5" />', [("markup", "line 1: <p /> closes itself")]),
        ('<p data-bbox="1 2 3 5>a', [("markup", "line 1: a tag that does not end, or < that is not written &lt;")]),
        ("<p>a</p>", [("content", "line 1: <p> has no data-bbox")]),
        ("<img>", [("content", "line 1: <img> has no data-bbox")]),
        ('<p data-bbox="1 2 3">a</p>', [("box", "line 1: <p>: data-bbox '1 2 3' is not four numbers")]),
        ('<div data-bbox="1 2 3 5">a</div>', [("content", "line 1: <div> is no known kind of element")]),
        (
            '<div class="formula" data-bbox="1 2 3 5">a</div>',
            [("content", 'line 1: <div class="formula"> holds 0 <div>')],
        ),
        ('\n<p data-bbox="1 2 3 5">a<![CDATA[b</p>', [("markup", "line 2: <![ is no HTML; in a text it is written")]),
        ("hello", [("content", "line 1: text outside elements: 'hello'")]),
    ],
)
def test_problems_are_found_with_their_line_and_aspect(html, problems):
    found = parse_document(html, on_error="collect").problems
    assert [
        (problem.aspect, str(problem)[: len(wanted)]) for problem, (_, wanted) in zip(found, problems, strict=False)
    ] == problems
    with pytest.raises(ValueError, match=r"the document has \d problem\(s\): line"):
        parse_document(html)


pieces = st.sampled_from(
    [
        *(
            '<p data-bbox="1 2 3 5">',
            "</p>",
            '<img data-bbox="1 2 3 5" />',
            '<div class="formula" data-bbox="1 2 3 5">',
        ),
        *(
            "<div>",
            "</div>",
            "<table data-bbox=1,2,3,5>",
            "<tr>",
            "<td>",
            "<!--",
            "-->",
            "<![",
            "<![CDATA[",
            "<?",
            "<!",
        ),
        *(
            "<",
            ">",
            '"',
            "=",
            "&",
            "&#x;",
            "a",
            "\n",
            "<style>",
            "</style>",
            "<script>",
            "<html>",
            "</",
            "/>",
            "```",
            "$$",
        ),
    ]
)


@settings(deadline=None)
@given(st.lists(pieces, max_size=12).map("".join))
def test_whatever_a_model_writes_is_read_or_reported(html):
    page = parse_document(html, on_error="collect").document
    to_markdown(page, boxes=True)
    check_document(html, 50, 50, check_order=True)
    try:
        moved = rescale_document(html, 1, 1)
    except ValueError:
        return
    assert len(moved) >= len(html) - 1  # 1,2,3,5 gets quotes, "1 2 3 5" stays


def test_a_stray_end_tag_inside_an_element_does_not_end_it():
    parsed = parse_document('<p data-bbox="1 2 3 5">a</b>c</p>', on_error="collect")
    assert [str(problem) for problem in parsed.problems] == ["line 1: </b> closes nothing"]
    assert parsed.document.elements[0].text == "ac"


def test_good_elements_beside_a_bad_one_are_kept():
    parsed = parse_document('<p data-bbox="1 2 3 5">a</p><b>x</b><p data-bbox="7 11 13 17">c</p>', on_error="collect")
    assert [item.text for item in parsed.document.elements] == ["a", "c"]


def test_less_than_and_line_breaks_in_a_text_are_text():
    (item,) = parse_document('<p data-bbox="1 2 3 5">a &lt; b<br>c &amp; d</p>').document.elements
    assert item.text == "a < b\nc & d"


def test_boxes_are_checked_against_the_page_and_against_the_element_around_them():
    html = (
        '<p data-bbox="1 2 31 5">a</p>\n<p data-bbox="1 2 1 5">b</p>\n'
        '<div class="image" data-bbox="1 2 7 11"><img data-bbox="1 2 7 12" /></div>\n<p data-bbox="0 0 30 20">ok</p>'
    )
    assert [str(problem) for problem in check_document(html, width=30, height=20)] == [
        "line 1: <p> has the box (1, 2, 31, 5), the page has 30 x 20",
        "line 2: <p> has the box (1, 2, 1, 5), which has no area",
        "line 3: <img> has the box (1, 2, 7, 12), outside its element's (1, 2, 7, 11)",
    ]


def test_reading_order_is_checked_when_asked_for():
    html = '<p data-bbox="0 30 9 40">second</p>\n<p data-bbox="0 0 9 10">first</p>'
    assert check_document(html, 50, 50) == []
    assert [str(problem) for problem in check_document(html, 50, 50, check_order=True)] == [
        "line 2: element 1 ('first') would be read as number 0"
    ]
