"""What counts as a right answer, and how sure a mean is."""

import numpy as np
import pytest
from PIL import Image

from examples.handwriting.conversations import chat, two_pictures
from examples.handwriting.scenes import SIZE, Mark, Scene
from examples.handwriting.scoring import Score, is_right_box, is_right_reading, is_right_text, questions
from processing.coordinates import Box, Quad
from processing.grounding_text import ParsedAnswer
from trainers.evaluation import Answer

SCENE = Scene(np.full((SIZE, SIZE, 3), 255, dtype=np.uint8), (Mark(3, "red", 0, (0, 0, 10, 10)),))


def _answer(text, true_text, shapes=(), true_shapes=()):
    example = chat(SCENE, np.random.default_rng(0), ["caption"])
    parsed = ParsedAnswer(tuple(shapes), (), text)
    return Answer(example, (Image.new("RGB", (SIZE, SIZE)),), text, parsed, (true_text,), tuple(true_shapes))


@pytest.mark.parametrize(
    ("text", "is_right"), [("red three", True), (" red three ", True), ("red", False), ("red three red", False)]
)
def test_a_text_is_right_if_it_is_the_whole_truth(text, is_right):
    assert is_right_text(_answer(text, "red three")) == is_right


def test_the_right_words_with_a_box_nobody_asked_for_are_wrong():
    assert not is_right_text(_answer("red three", "red three", shapes=[Box(0, 0, 1, 1)]))


@pytest.mark.parametrize(
    ("boxes", "is_right"),
    [
        ([Box(0, 0, 10, 5)], True),  # half of it: IoU 0.5
        ([Box(0, 0, 10, 4.9)], False),
        ([Box(0, 0, 10, 10), Box(0, 0, 10, 10)], False),
        ([], False),
    ],
)
def test_a_box_is_right_if_it_is_the_only_one_and_its_iou_is_at_least_a_half(boxes, is_right):
    assert is_right_box(_answer("", "", boxes, [Box(0, 0, 10, 10)])) == is_right


def _quad(label, x):
    return Quad(x, 0, x + 10, 0, x + 10, 10, x, 10, label=label)


@pytest.mark.parametrize(
    ("found", "is_right"),
    [
        ([_quad("3", 0), _quad("7", 20)], True),
        ([_quad("3", 3), _quad("7", 20)], True),  # IoU 7/13
        ([_quad("3", 4), _quad("7", 20)], False),  # IoU 6/14
        ([_quad("3", 0), _quad("1", 20)], False),
        ([_quad("7", 20), _quad("3", 0)], False),  # not in reading order
        ([_quad("3", 0)], False),
    ],
)
def test_a_reading_is_right_if_every_digit_stands_where_it_should_in_order(found, is_right):
    assert is_right_reading(_answer("", "", found, [_quad("3", 0), _quad("7", 20)])) == is_right


def test_a_score_of_eight_in_ten_is_known_within_wilsons_interval():
    score = Score(8, 10)  # (0.8 + z2/20 +- z sqrt(0.016 + z2/400)) / (1 + z2/10) with z = 1.96
    assert score.mean == 0.8
    assert score.interval == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_questions_are_one_per_scene_and_the_same_for_blank_pictures():
    scenes = [
        SCENE,
        Scene(SCENE.pixels, (Mark(5, "blue", 1, (20, 20, 30, 32)), Mark(8, "black", 2, (0, 0, 9, 11)))),
    ] * 5
    for task, style in (("reading", "plain"), ("seeing", "chat"), ("two pictures", "chat")):
        seen, blind = (questions(some, task, style, seed=3) for some in (scenes, [s.blanked() for s in scenes]))
        texts = [
            [[part.get("text") for part in m["content"]] for e in some for m in e.messages] for some in (seen, blind)
        ]
        assert len(seen) == len(scenes)
        assert texts[0] == texts[1]


def test_a_question_about_two_pictures_has_two():
    assert two_pictures(SCENE, SCENE, np.random.default_rng(0)).num_pictures == 2
