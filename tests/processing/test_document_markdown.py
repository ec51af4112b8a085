"""A page as Markdown reads as one expects, and with its boxes it comes back whole."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processing.coordinates import Box
from processing.document_markdown import from_markdown, to_markdown
from processing.documents import KINDS, Document, Element, element
from processing.markdown_tables import pipe_table

ROWS = "<tr><th>a</th><th>b</th></tr><tr><td>2</td><td>3</td></tr>"


def page(*items):
    return Document(tuple(Element(kind, None, content) for kind, content in items))


def test_each_kind_is_written_as_markdown_writes_it():
    document = page(
        ("h2", "Cats &amp; dogs"),
        ("paragraph", "H<sub>2</sub>O<br>and more"),
        ("table", ROWS),
        ("unordered_list", "<li>x</li><li>y</li>"),
        ("ordered_list", "<li>x</li><li>y</li>"),
        ("formula", "a &lt; b"),
        ("image_caption", "a cat"),
        ("image", ""),
        ("code", "if a &lt; b:\n    c"),
        ("footer", "page 7"),
    )
    assert to_markdown(document).split("\n\n") == [
        "## Cats & dogs",
        "H2O\nand more",
        "| a | b |\n| --- | --- |\n| 2 | 3 |",
        "- x\n- y",
        "1. x\n2. y",
        "$$\na < b\n$$",
        "![a cat]()",
        "![]()",
        "```\nif a < b:\n    c\n```",
        "page 7",
    ]


def test_boxes_stand_in_comments_as_qwen3_vl_writes_them():
    document = Document((Element("image", Box(115, 270, 475, 495.5)), Element("image_ocr", Box(1, 2, 3, 5), "STOP")))
    assert to_markdown(document, boxes=True) == (
        "<!-- Image (115, 270, 475, 495.5) -->\n![]()\n\n<!-- Image ocr (1, 2, 3, 5) -->\n![STOP]()"
    )
    assert from_markdown(to_markdown(document, boxes=True)) == document
    with pytest.raises(ValueError, match=r"element 0 \(h1\) has no box to write"):
        to_markdown(page(("h1", "a")), boxes=True)


words = st.text(st.sampled_from("ab1.-#|$`<>!&*+\\[]() 犬"), max_size=12).map(lambda text: " ".join(text.split()))
CONTENT = {
    "unordered_list": "<li>x &lt; y</li><li>2. z</li>",
    "ordered_list": "<li>- x</li>",
    "table": ROWS,
    "chart": '<tr><td colspan="2">a</td></tr>',
    "formula": "\\frac{a}{b} &lt; 2",
    "code": "a\n\n```\n# b\n````",
    "image": "",
}


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(KINDS)), words)))
def test_with_boxes_a_page_comes_back_whole(rows):
    elements = []
    for kind, text in rows:
        content = CONTENT[kind] if kind in CONTENT else element(kind, [0, 0, 1, 1], text).content
        elements.append(Element(kind, Box(1, 2, 3, 5), content))
    document = Document(tuple(elements))
    assert from_markdown(to_markdown(document, boxes=True)) == document


def test_lines_of_a_paragraph_come_back_as_lines():
    document = Document((Element("paragraph", Box(1, 2, 3, 5), "a<br># b<br>&lt;!-- Table (1, 2, 3, 5) --&gt;"),))
    assert from_markdown(to_markdown(document, boxes=True)) == document


def test_markdown_of_others_is_read_by_its_look():
    document = from_markdown(
        "# Title\n\nfirst line\nsecond line\n\n* x\n+ y\n\n3) z\n\n$$a<b$$\n\n```python\nx = 1\n```\n"
    )
    assert [(item.kind, item.text) for item in document.elements] == [
        ("h1", "Title"),
        ("paragraph", "first line\nsecond line"),
        ("unordered_list", "xy"),
        ("ordered_list", "z"),
        ("formula", "a<b"),
        ("code", "x = 1"),
    ]
    assert all(item.box is None for item in document.elements)


def test_a_table_that_markdown_cannot_say_stays_html():
    assert pipe_table('<tr><td rowspan="2">a</td></tr>') is None
    assert pipe_table("<tr><td>a</td></tr><tr><td>b</td><td>c</td></tr>") is None
    assert to_markdown(page(("table", "<tr><td>a</td></tr>\n<tr><td>b</td><td>c</td></tr>"))) == (
        "<table><tr><td>a</td></tr> <tr><td>b</td><td>c</td></tr></table>"
    )
    assert pipe_table('<tr><td colspan="1">a</td></tr>') == "| a |\n| --- |"


def test_a_bar_inside_a_cell_is_no_border():
    table = page(("table", "<tr><th>a|b</th></tr><tr><td>c &amp; d<br>e</td></tr>"))
    assert to_markdown(table) == "| a\\|b |\n| --- |\n| c & d e |"
    assert (
        from_markdown(to_markdown(table)).elements[0].content == "<tr><th>a|b</th></tr><tr><td>c &amp; d e</td></tr>"
    )


@pytest.mark.parametrize(
    ("markdown", "reason"),
    [
        ("<!-- Tabel (1, 2, 3, 5) -->\na", "names no kind of element"),
        ("<!-- Table (1, 2, 3) -->\na", r"needs four numbers \(x1, y1, x2, y2\)"),
        ("<!-- Table (7, 2, 3, 5) -->\na", "x1 7 > x2 3"),
        ("```\na", "``` is not closed: '```'"),
        ("$$\na", r"\$\$ is not closed"),
    ],
)
def test_malformed_markdown_is_refused(markdown, reason):
    with pytest.raises(ValueError, match=reason):
        from_markdown(markdown)


def test_a_comment_that_is_no_box_is_text():
    assert from_markdown("<!-- to do -->").elements[0].text == "<!-- to do -->"
