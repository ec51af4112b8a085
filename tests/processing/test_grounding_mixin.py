"""Conversations with box parts -> conversations of text, and the refusals on the way."""

import copy
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from processing.coordinates import CONVENTIONS, Box
from processing.grounding_mixin import GroundingMixin, mark_texts
from processing.pictures import PictureLimits


class Recorder:
    """Stands for transformers' ProcessorMixin: shows what the mixin passes on."""

    def apply_chat_template(self, conversation, **kwargs):
        return conversation, kwargs


class Halved(GroundingMixin, Recorder):
    """A model that sees every picture at half its size and counts its pixels."""

    convention = CONVENTIONS["qwen2_5_vl"]

    def model_size(self, height, width):
        if width > 5000:
            raise ValueError(f"{height}x{width} is too wide")
        return height // 2, width // 2


class Tagged(Halved):
    convention = CONVENTIONS["qwenvl"]


IMAGE = {"type": "image"}


def text(value):
    return {"type": "text", "text": value}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def box(*numbers, **keys):
    return {"type": "box", "bbox": list(numbers), **keys}


def render(*messages, sizes=((100, 200),), cls=Halved, **kwargs):
    return cls().render_conversation(list(messages), list(sizes), **kwargs)


def test_every_kind_of_part_becomes_text_in_its_place():
    quad = {"type": "quad", "quad": [2, 4, 6, 4, 6, 8, 2, 8], "label": "Exit"}
    point = {"type": "point", "point": [[2, 4], [20, 40]], "label": "tip"}
    message = user(
        IMAGE, text("See "), {"type": "ref", "text": "the cup"}, box(20, 40, 60, 80, label="cup"), quad, point
    )
    (rendered,) = render(message, cls=Tagged)
    assert rendered["content"] == [
        IMAGE,
        text("See "),
        text("<ref>the cup</ref>"),
        text(
            "<ref>cup</ref><box>(100,400),(300,800)</box>"
            "<ref>Exit</ref><quad>(10,40),(30,40),(30,80),(10,80)</quad>"
            "<ref>tip</ref><box>(10,40)</box><box>(100,400)</box>"
        ),
    ]


def test_neighbouring_shapes_are_one_json_list_and_separated_ones_are_two():
    (message,) = render(user(IMAGE, box(2, 4, 6, 8), box(2, 4, 6, 8, label="a"), text(" and "), box(0, 0, 2, 2)))
    assert message["content"][1:] == [
        text('[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [1, 2, 3, 4], "label": "a"}]'),
        text(" and "),
        text('[{"bbox_2d": [0, 0, 1, 1]}]'),
    ]


@pytest.mark.parametrize(
    ("unit", "numbers"), [(None, (20, 10, 100, 50)), (1, (0.1, 0.1, 0.5, 0.5)), (1000, (100, 100, 500, 500))]
)
def test_normalized_boxes_say_so_and_mean_the_same_place(unit, numbers):
    keys = {} if unit is None else {"normalized": unit}
    (message,) = render(user(IMAGE, box(*numbers, **keys)))
    assert message["content"][1] == text('[{"bbox_2d": [10, 5, 50, 25]}]')


def test_a_shape_belongs_to_the_latest_picture_before_it_unless_it_names_one():
    messages = [user(IMAGE, box(10, 10, 20, 20)), user(IMAGE, box(10, 10, 20, 20), box(10, 10, 20, 20, image_index=0))]
    first, second = render(*messages, sizes=[(100, 1000), (100, 20)], cls=Tagged)
    assert first["content"][1] == text("<box>(10,100),(20,200)</box>")
    assert second["content"][1] == text("<box>(500,100),(999,200)</box><box>(10,100),(20,200)</box>")


def test_a_document_part_follows_the_picture_too():
    (message,) = render(user(IMAGE, {"type": "document", "html": '<p data-bbox="20 40 60 80">a</p>'}))
    assert message["content"][1] == text('<p data-bbox="10 20 30 40">a</p>')


def test_the_rows_own_conversation_is_not_changed():
    messages = [
        user(IMAGE, box(2, 4, 6, 8), {"type": "text", "text": "a", "image": None}),
        {"role": "assistant", "content": "b"},
    ]
    before = copy.deepcopy(messages)
    render(*messages)
    assert messages == before


def test_keys_that_arrow_filled_with_none_are_taken_out():
    arrow = {"type": "text", "text": "a", "image": None, "bbox": None, "label": None}
    (message,) = render(user({**arrow, "type": "image", "text": None}, arrow))
    assert message["content"] == [IMAGE, text("a")]


def test_message_keys_and_plain_contents_pass_through():
    messages = [{"role": "system", "content": "Be brief."}, {**user(IMAGE), "weight": 0.5, "train": True}]
    assert render(*messages) == messages


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([box(1, 2, 3, 4), IMAGE], "message 0 part 0 .*stands before any picture"),
        ([IMAGE, box(1, 2, 3, 4, image_index=1)], "message 0 part 1 .*image_index 1, but the conversation has 1 "),
        ([IMAGE, box(1, 2, 201, 4)], "message 0 part 1: box has x 201, but the picture is 100x200 pixels"),
        ([IMAGE, box(9, 2, 3, 4)], "message 0 part 1 .*xyxy is wanted"),
        ([IMAGE, box(1, 2, 3, 4, lable="cup")], "message 0 part 1 .*unknown key 'lable', did you mean 'label'"),
        ([IMAGE, {"type": "bbox", "bbox": [1, 2, 3, 4]}], "message 0 part 1 has type 'bbox'"),
        ([IMAGE, box(1, 2, 3, 4, label="<box>")], "message 0 .*holds '<box>', which would be read as a special token"),
        ([IMAGE, {"type": "ref", "text": "</ref>"}], "message 0 part 1: .*</ref>"),
        ([IMAGE, {"type": "ref"}], "message 0 part 1 .*needs 'text'"),
        ([IMAGE, {"type": "document", "html": '<p data-bbox="0 0 300 1">a</p>'}], "message 0 part 1: box has x 300"),
    ],
)  # fmt: skip
def test_a_malformed_part_is_refused_with_its_place(parts, message):
    with pytest.raises(ValueError, match=message):
        render(user(*parts), cls=Tagged)


def test_the_number_of_sizes_must_be_the_number_of_pictures():
    with pytest.raises(ValueError, match=r"the conversation has 2 picture.*but 1"):
        render(user(IMAGE, IMAGE))
    with pytest.raises(ValueError, match="give image_sizes"):
        Halved().render_conversation([user(IMAGE, box(1, 2, 3, 4))], None)
    assert Halved().render_conversation([user(IMAGE, text("a"))], None) == [user(IMAGE, text("a"))]


def test_a_picture_that_the_model_cannot_see_is_refused_by_its_number():
    with pytest.raises(ValueError, match="picture 1 of the conversation: 100x6000 is too wide"):
        render(user(IMAGE, IMAGE, box(1, 2, 3, 4)), sizes=[(100, 200), (100, 6000)])


def test_clipping_is_asked_for_and_counted():
    counts = Counter()
    (message,) = render(user(IMAGE, box(2, 4, 202, 40), box(2, 4, 6, 8)), outside="clip", counts=counts)
    assert message["content"][1]["text"].startswith('[{"bbox_2d": [1, 2, 100, 20]}')
    assert counts == {"shapes": 2, "clipped": 1}


def test_an_answer_is_read_in_original_pixels():
    answer = Halved().parse_answer('{"bbox_2d": [1, 2, 3, 4], "label": "cup"}', [(10, 20), (100, 200)])
    assert answer.shapes == (Box(2, 4, 6, 8, label="cup", image_index=1),)


def picture(height, width, orientation=1):
    tags = Image.Exif()
    tags[0x0112] = orientation
    stream = BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(stream, "JPEG", exif=tags)
    return stream.getvalue()


def test_pictures_are_loaded_once_and_upright_and_their_sizes_place_the_boxes():
    conversation = [user({"type": "image", "image": picture(100, 200, orientation=6)}, box(0, 0, 100, 200))]
    (message,), kwargs = Halved().apply_chat_template(conversation, tokenize=True, return_dict=True)
    image, boxes = message["content"]
    assert (image["image"].width, image["image"].height) == (100, 200)
    assert boxes == text('[{"bbox_2d": [0, 0, 50, 100]}]')
    assert (kwargs["tokenize"], kwargs["return_dict"]) == (True, True)


@pytest.mark.parametrize("key", ["image", "path", "url", "base64", "image_url"])
def test_every_key_that_transformers_reads_is_loaded_here(key, tmp_path):
    import base64

    (tmp_path / "a.jpg").write_bytes(picture(100, 200))
    value = {
        "base64": base64.b64encode(picture(100, 200)).decode(),
        "image_url": {"url": (tmp_path / "a.jpg").as_uri()},
    }.get(key, str(tmp_path / "a.jpg"))
    part = {"type": "image_url" if key == "image_url" else "image", key: value}
    for tokenize in (True, False):
        (message,), _ = Halved().apply_chat_template([user(part, box(0, 0, 200, 100))], tokenize=tokenize)
        assert message["content"][1] == text('[{"bbox_2d": [0, 0, 100, 50]}]')
        if tokenize:
            assert (set(message["content"][0]), message["content"][0]["image"].size) == ({"type", "image"}, (200, 100))


def test_without_shapes_no_picture_is_opened_to_render_a_text():
    conversation = [user({"type": "image", "image": "nowhere.png"}, text("a"))]
    (message,), _ = Halved().apply_chat_template(conversation)
    assert message == conversation[0]


def test_pictures_given_beside_the_conversation_need_their_sizes():
    conversation = [user(IMAGE, box(2, 4, 6, 8))]
    with pytest.raises(ValueError, match="picture 0 is not in the conversation"):
        Halved().apply_chat_template(conversation)
    (message,), _ = Halved().apply_chat_template(conversation, image_sizes=[(100, 200)], tokenize=True)
    assert message["content"] == [IMAGE, text('[{"bbox_2d": [1, 2, 3, 4]}]')]


def test_a_batch_is_rendered_conversation_by_conversation():
    batch = [[user(IMAGE, box(2, 4, 6, 8))], [user(text("no picture"))]]
    rendered, _ = Halved().apply_chat_template(batch, image_sizes=[[(100, 200)], []])
    assert [len(conversation) for conversation in rendered] == [1, 1]
    assert rendered[0][0]["content"][1] == text('[{"bbox_2d": [1, 2, 3, 4]}]')
    with pytest.raises(ValueError, match=r"2 conversation.*image_sizes for 1"):
        Halved().apply_chat_template(batch, image_sizes=[[(100, 200)]])


def test_the_limits_on_pictures_are_obeyed(tmp_path):
    conversation = [user({"type": "image", "url": "http://127.0.0.1:9/a.png"}, box(1, 2, 3, 4))]
    for tokenize in (True, False):
        with pytest.raises(ValueError, match="network, which is switched off"):
            Halved().apply_chat_template(
                conversation, tokenize=tokenize, picture_limits=PictureLimits(allow_network=False)
            )


def test_a_picture_given_twice_in_one_part_is_refused():
    with pytest.raises(ValueError, match="an image part holds image and path"):
        Halved().apply_chat_template([user({"type": "image", "image": "a", "path": "b"})], tokenize=True)


def test_marks_are_set_in_texts_and_labels_only():
    messages = [
        user({"type": "image", "image": "<a>.png"}, text("x<a>y"), box(1, 2, 3, 4, label="<a>")),
        {"role": "user", "content": "<a>"},
    ]
    marked = mark_texts(messages, ["<a>"])
    changed = [marked[0]["content"][1]["text"], marked[0]["content"][2]["label"], marked[1]["content"]]
    assert [len(value) for value in changed] == [len("x<a>y") + 2, len("<a>") + 2, len("<a>") + 2]
    assert marked[0]["content"][0] == messages[0]["content"][0]
    assert mark_texts(messages, []) == messages
