"""What the inspection says equals what training gets, and a page or a terminal shows it without running the data."""

import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from processing.chat_spans import IGNORE
from processing.example import Example, Source
from processing.inspection import inspect_example, pictures_from_pixels
from processing.inspection_page import inspection_page
from processing.inspection_terminal import legend, row_panel, rows_table
from processing.length import LengthPolicy
from processing.processing_families import Qwen2_5_VLProcessor
from processing.supervision import Supervision


def picture(width, height):
    ramp = Image.linear_gradient("L").resize((width, height))
    return Image.merge(
        "RGB", (ramp, ramp.transpose(Image.Transpose.FLIP_TOP_BOTTOM), ramp.rotate(90).resize((width, height)))
    )


@pytest.fixture
def processor(byte_processor):
    return byte_processor("qwen2_5_vl", cls=Qwen2_5_VLProcessor)


@pytest.fixture
def grounded():
    """Two pictures, a box in each, a weight, and letters of several bytes."""
    box = {"type": "box", "bbox": [16, 0, 32, 8], "label": "right <b>half</b>"}
    return Example(
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": picture(32, 16)}, {"type": "text", "text": "Où? 你😀"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "é "}, box], "weight": 0.5},
            {"role": "user", "content": [{"type": "image", "image": picture(64, 64)}]},
            {"role": "assistant", "content": [{"type": "point", "point": [8, 48]}, {**box, "image_index": 0}]},
        ],
        source=Source("rows.jsonl", 3, "x"),
        task="grounding",
    )


def test_the_tokens_shown_are_the_tokens_trained(grounded, processor):
    supervise = Supervision(processor)
    seen, encoded = inspect_example(grounded, supervise), supervise(grounded)
    assert (seen.outcome, seen.problem) == ("kept", None)
    assert sum(token.number for token in seen.tokens) == seen.length == seen.whole_length == encoded.length
    supervised = sum(token.number for token in seen.tokens if token.kind == "supervised")
    assert supervised == seen.num_supervised == encoded.num_supervised
    text = "".join(token.text * (token.number if token.is_special else 1) for token in seen.tokens)
    assert text == processor.tokenizer.decode(encoded.input_ids)
    trained = "".join(token.text for token in seen.tokens if token.kind == "supervised")
    assert trained == processor.tokenizer.decode(encoded.input_ids[encoded.labels != IGNORE])
    assert {token.weight for token in seen.tokens if token.kind == "supervised"} == {0.5, 1.0}


def test_letters_of_several_bytes_are_whole_and_placeholders_one_run(grounded, processor):
    seen = inspect_example(grounded, Supervision(processor))
    letters = {token.text: token.number for token in seen.tokens}
    assert (letters["ù"], letters["你"], letters["😀"]) == (2, 3, 4)
    runs = [token.number for token in seen.tokens if token.kind == "picture"]
    assert runs == [p.num_tokens for p in seen.pictures] == [32, 64]
    assert seen.num_picture_tokens == 96


@pytest.mark.parametrize("size", [(32, 16), (24, 40)])
def test_pictures_come_back_from_the_pixels_as_resized(size, processor):
    """The sizes are multiples of 4 within the limits, so the processor leaves them as they are."""
    original = picture(*size)
    vision = processor.image_processor([picture(8, 8), original], return_tensors="pt")
    assert np.array_equal(np.asarray(pictures_from_pixels(vision, processor.image_processor)[1]), np.asarray(original))


def test_pictures_of_qwen_vl_come_back_too():
    from processing.image_processing_pil_qwenvl import QwenVLImageProcessorPil

    image_processor = QwenVLImageProcessorPil(size={"height": 28, "width": 28})
    vision = image_processor([picture(28, 28)], return_tensors="pt")
    assert vision["pixel_values"].shape == (1, 3, 28, 28)
    (back,) = pictures_from_pixels(vision, image_processor)
    assert np.array_equal(np.asarray(back), np.asarray(picture(28, 28)))


def test_shapes_stand_where_the_model_reads_them(grounded, processor):
    first, second = inspect_example(grounded, Supervision(processor)).pictures
    assert [(shape.kind, shape.corners) for shape in first.shapes] == [("box", ((16, 0), (32, 8)))] * 2
    assert second.picture.size == (32, 32)  # of 64 x 64: at most 64 tokens of 4 x 4 pixels
    assert [(shape.kind, shape.corners) for shape in second.shapes] == [("point", ((4, 24),))]


def test_shapes_follow_width_and_height_on_their_own(processor):
    """64 x 32 becomes 44 x 20."""
    box = {"type": "box", "bbox": [32, 8, 64, 16]}
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture(64, 32)}]},
        {"role": "assistant", "content": [box]},
    ]
    (seen,) = inspect_example(Example(messages), Supervision(processor)).pictures
    assert seen.picture.size == (44, 20)
    assert seen.shapes[0].corners == ((22, 5), (44, 10))


def test_boxes_of_a_document_are_shown_too(processor):
    html = '<body><p data-bbox="8 8 56 24">a</p><p data-bbox="8 32 56 48">b</p></body>'
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture(64, 64)}]},
        {"role": "assistant", "content": [{"type": "document", "html": html}]},
    ]
    (seen,) = inspect_example(Example(messages), Supervision(processor)).pictures
    assert [shape.corners for shape in seen.shapes] == [((4, 4), (28, 12)), ((4, 16), (28, 24))]


def test_what_the_length_policy_leaves_out_is_shown_once(grounded, processor):
    whole = inspect_example(grounded, Supervision(processor))
    supervise = Supervision(processor, length=LengthPolicy(whole.length - 1, ("trim", "drop")))
    seen = inspect_example(grounded, supervise)
    assert seen.outcome == "trim"
    assert (seen.whole_length, seen.length) == (whole.length, supervise(grounded).length)
    assert sum(token.number for token in seen.tokens if token.kind != "left_out") == seen.length
    assert sum(token.number for token in seen.tokens) == whole.length
    assert "".join(token.text for token in seen.tokens) == "".join(token.text for token in whole.tokens)
    assert len(seen.pictures) == 1


def test_dropped_and_refused_rows_say_why(grounded, processor):
    dropped = inspect_example(grounded, Supervision(processor, length=LengthPolicy(50, ("drop",))))
    assert (dropped.outcome, dropped.length, dropped.num_supervised) == ("drop", 0, 0)
    assert dropped.problem == f"{dropped.whole_length} tokens are more than 50"
    assert {token.kind for token in dropped.tokens} == {"left_out"}
    too_long = inspect_example(grounded, Supervision(processor, length=LengthPolicy(50)))
    assert too_long.outcome == "refused"
    assert "max_length is 50" in too_long.problem
    missing = Example([
        {"role": "user", "content": [{"type": "image", "path": "/nowhere.png"}]}, {"role": "assistant", "content": "a"}
    ])  # fmt: skip
    seen = inspect_example(missing, Supervision(processor))
    assert (seen.outcome, seen.tokens) == ("refused", ())
    assert "/nowhere.png does not exist" in seen.problem


class Tags(HTMLParser):
    """Every tag and attribute name of a page, and that tags are closed in their order."""

    def __init__(self, page):
        super().__init__()
        self.names, self.attributes, self.open = set(), set(), []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.names.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.names.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_shows_text_of_the_data_and_never_runs_it(processor):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;</pre>"
    box = {"type": "box", "bbox": [0, 0, 8, 8], "label": evil}
    example = Example(
        [
            {"role": "user", "content": [{"type": "image", "image": picture(16, 16)}, {"type": "text", "text": evil}]},
            {"role": "assistant", "content": [box]},
        ],
        source=Source(evil, 1, evil),
        task=evil,
    )
    seen = inspect_example(example, Supervision(processor))
    page = inspection_page([seen, inspect_example(Example(example.messages), Supervision(processor))], evil, evil, 999)
    tags = Tags(page)
    assert tags.names.isdisjoint({"script", "img", "iframe", "object", "link"})
    assert not any(name.startswith("on") for name in tags.attributes)
    assert page.count("alert(1)") == page.count("&lt;script&gt;alert(1)") > 0
    assert "default-src 'none'" in page
    assert not re.search(r"(?:href|src)=\"(?!data:image/)", page)


def test_the_page_marks_weights_blanks_boxes_and_outcomes(grounded, processor):
    seen = [
        inspect_example(grounded, Supervision(processor, length=LengthPolicy(n, ("trim", "drop")))) for n in (999, 150)
    ]
    page = inspection_page(seen, "rows.jsonl", "two", max_length=150)
    Tags(page)
    assert page.count('<b class="weight">×0.5</b>') == 2  # at the first token of the answer, in both rows
    assert '<rect x="16.00" y="0.00" width="16.00" height="8.00" fill="none"' in page
    assert '<circle cx="4.00" cy="24.00"' in page
    assert "32 × &lt;|image_pad|&gt;" in page
    assert 'class="badge kept">fit as they are' in page
    assert 'class="badge trim">fit without their last turns' in page
    assert "max_length 150" in page


def test_the_terminal_shows_the_same(grounded, processor):
    seen = [inspect_example(grounded, Supervision(processor, length=LengthPolicy(n, ("drop",)))) for n in (999, 50)]
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="truecolor")
    console.print(row_panel(seen[0]), rows_table(seen, 50), legend())
    shown = console.file.getvalue()
    assert "\x1b[1;94mé" in shown  # supervised: bold and blue
    assert "<32 x <|image_pad|>>" in shown
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert "right <b>half</b>: (16.0, 0.0) (32.0, 8.0)" in plain
    assert "drop" in plain
    assert "rows.jsonl:3 (id=x)" in plain
    dropped = Console(file=io.StringIO(), width=200)
    dropped.print(row_panel(seen[1]))
    assert "tokens are more than 50" in dropped.file.getvalue()


def test_markup_of_rich_in_the_data_stays_text(processor):
    example = Example([{"role": "user", "content": "[red]a[/red]"}, {"role": "assistant", "content": "[bold]b"}],
                      source=Source("[link=x]f[/link]"))  # fmt: skip
    seen = inspect_example(example, Supervision(processor))
    console = Console(file=io.StringIO(), width=200)
    console.print(row_panel(seen), rows_table([seen]))
    shown = console.file.getvalue()
    assert "[red]a[/red]" in shown
    assert "[bold]b" in shown
    assert shown.count("[link=x]f[/link]") == 2  # in the panel and in the table


def test_inspecting_does_not_disturb_training(grounded, processor):
    supervise = Supervision(processor, length=LengthPolicy(999))
    before = supervise(grounded)
    inspect_example(grounded, supervise)
    after = supervise(grounded)
    assert torch.equal(before.input_ids, after.input_ids)
    assert torch.equal(before.vision["pixel_values"], after.vision["pixel_values"])
    assert supervise.counts == {"kept": 2}
