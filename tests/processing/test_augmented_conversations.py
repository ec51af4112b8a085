"""Conversations whose picture changes: everything follows, or nothing happens."""

import copy

import numpy as np
import pytest
from PIL import Image

from processing.augmentation import crop, flip, pad, resize
from processing.augmented_conversations import RandomAugmentation, augment
from processing.direction_words import CannotAugment

WHITE_BOX = [10, 5, 30, 25]


def picture():
    pixels = np.zeros((50, 100, 3), np.uint8)
    pixels[5:25, 10:30] = 255
    return Image.fromarray(pixels)


def conversation(*parts, answer="The left cup."):
    image = {"type": "image", "image": picture(), "numbered": False}
    return [{"role": "user", "content": [image, *parts]}, {"role": "assistant", "content": answer, "weight": 0.5}]


def mirrored(sample):
    return flip(sample, "horizontal")


def test_picture_boxes_labels_and_words_change_together():
    box = {"type": "box", "bbox": WHITE_BOX, "label": "left cup", "image_index": 0}
    point = {"type": "point", "point": [[0.2, 0.3], [1, 1]], "normalized": 1, "label": None}
    messages = conversation({"type": "text", "text": "On the LEFT?"}, {"type": "ref", "text": "left"}, box, point)
    before = copy.deepcopy(messages[0]["content"][1:])
    user, assistant = augment(messages, mirrored)
    image, *rest = user["content"]
    assert np.asarray(image["image"])[10, 75].tolist() == [255, 255, 255]
    assert image["numbered"] is False
    assert rest == [
        {"type": "text", "text": "On the RIGHT?"},
        {"type": "ref", "text": "right"},
        {"type": "box", "bbox": [[70, 5, 90, 25]], "label": "right cup", "image_index": 0},
        {"type": "point", "point": [[80, 15], [0, 50]]},
    ]
    assert assistant == {"role": "assistant", "content": "The right cup.", "weight": 0.5}
    assert messages[0]["content"][1:] == before


def test_boxes_inside_a_document_move_but_its_picture_is_not_flipped():
    page = {"type": "document", "html": '<p data-bbox="10 5 30 25">left</p>'}
    user, _ = augment(conversation(page), lambda sample: pad(sample, 3, 4, 0, 0))
    assert user["content"][1]["html"] == '<p data-bbox="13 9 33 29">left</p>'
    with pytest.raises(CannotAugment, match="unreadable"):
        augment(conversation(page), mirrored)


@pytest.mark.parametrize(
    ("messages", "operation", "message"),
    [
        ([{"role": "user", "content": "left"}], mirrored, "has 0 pictures"),
        (conversation({"type": "image", "image": "b.png"}), mirrored, "has 2 pictures"),
        (conversation(answer="<box>(1,2),(3,4)</box>"), mirrored, "the text holds coordinates"),
        (conversation({"type": "video", "video": "a.mp4"}), mirrored, "type 'video' cannot be augmented"),
        (
            conversation({"type": "box", "bbox": [WHITE_BOX, [80, 0, 90, 9]]}),
            lambda sample: crop(sample, 0, 0, 40, 50),
            "1 of 2 shapes were cut away",
        ),
    ],
)
def test_what_would_not_follow_is_refused(messages, operation, message):
    with pytest.raises(CannotAugment, match=message):
        augment(messages, operation)


def test_a_broken_picture_is_not_a_refusal_to_augment():
    messages = [{"role": "user", "content": [{"type": "image", "image": b"broken"}]}]
    for run in (lambda: augment(messages, mirrored), lambda: RandomAugmentation(seed=1)(messages, 0)):
        with pytest.raises(ValueError, match="picture 6 bytes cannot be read") as caught:
            run()
        assert not isinstance(caught.value, CannotAugment)


def boxed(**keys):
    return conversation({"type": "box", "bbox": WHITE_BOX}, **keys)


def result(messages):
    return np.asarray(messages[0]["content"][0]["image"]), messages[0]["content"][1]["bbox"][0], messages[1]["content"]


def test_random_augmentation_depends_on_seed_and_number_only():
    first, second = RandomAugmentation(seed=5), RandomAugmentation(seed=5)
    forward = [result(first(boxed(), number)) for number in range(6)]
    backward = [result(second(boxed(), number)) for number in reversed(range(6))][::-1]
    for (pixels, box, text), (same_pixels, same_box, same_text) in zip(forward, backward, strict=True):
        np.testing.assert_array_equal(pixels, same_pixels)
        assert (box, text) == (same_box, same_text)
    assert len({pixels.shape for pixels, _, _ in forward}) > 1
    assert (
        len({pixels.shape for pixels, _, _ in [result(RandomAugmentation(seed=6)(boxed(), n)) for n in range(6)]}) > 1
    )
    assert first.counts == second.counts


def test_random_augmentation_keeps_the_box_on_its_object_and_the_word_true():
    augmentation = RandomAugmentation(seed=11)
    for number in range(40):
        pixels, box, answer = result(augmentation(boxed(), number))
        ys, xs = np.nonzero(pixels[..., 0] > 127)
        np.testing.assert_allclose(box, [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], atol=1.5)
        scale = pixels.shape[0] / 50
        assert 0.8 * 0.8 - 0.02 <= scale <= 1.25 + 0.02
        assert answer in ("The left cup.", "The right cup.")
    counts = augmentation.counts
    assert counts["cropped"] == counts["resized"] == 40
    assert 10 < counts["flipped"] < 30


def test_what_random_augmentation_refuses_is_counted_and_left_alone():
    augmentation = RandomAugmentation(seed=2, flip=1, crop=1, scale=(1, 1))
    unclear = boxed(answer="That's right.")
    assert augmentation(unclear, 0)[1]["content"] == "That's right."
    written = boxed(answer="(1,2)")
    assert augmentation(written, 1) == written
    assert augmentation(boxed(), 2)[1]["content"] == "The right cup."
    assert augmentation.counts == {"flip refused": 1, "refused": 1, "flipped": 1}


def test_nothing_is_cropped_where_no_shape_says_what_matters():
    augmentation = RandomAugmentation(seed=2, flip=0, scale=(1, 1))
    pixels = np.asarray(augmentation(conversation(), 0)[0]["content"][0]["image"])
    assert pixels.shape == (50, 100, 3)
    assert augmentation.counts == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"flip": 1.5}, "flip is 1.5"), ({"crop": 0}, "crop is 0"), ({"scale": (2, 1)}, r"scale is \(2, 1\)")],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RandomAugmentation(seed=1, **settings)


def test_operations_can_be_chained():
    user, _ = augment(boxed(), lambda s: resize(pad(s, 0, 0, 0, 50), 200, 200))
    assert user["content"][1]["bbox"] == [[20, 10, 60, 50]]
