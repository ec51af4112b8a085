"""Questions about a scene and their true answers."""

import numpy as np
import pytest

from examples.handwriting.conversations import ASK, caption_of, chat, plain, two_pictures
from examples.handwriting.scenes import SIZE, Mark, Scene
from examples.handwriting.scoring import TASKS

BLANK = np.full((SIZE, SIZE, 3), 255, dtype=np.uint8)
SCENE = Scene(BLANK, (Mark(3, "red", 0, (0, 0, 12, 15)), Mark(7, "blue", 1, (14, 13, 26, 27))))
OTHER = Scene(BLANK, (Mark(3, "black", 2, (27, 28, 39, 40)),))


def _words(message):
    return "".join(part.get("text", "") for part in message["content"])


def _pairs(make, count=61):
    rng = np.random.default_rng(0)
    return [tuple(map(_words, make(rng).messages[-2:])) for _ in range(count)]


def test_a_caption_names_colour_digit_and_place_in_reading_order():
    assert caption_of(SCENE) == "red three at the top left, blue seven at the centre"


def test_reading_questions_ask_by_colour_or_place_and_every_answer_is_right():
    assert set(_pairs(lambda rng: chat(SCENE, rng, ["reading"]))) == {
        ("Which digit is red?", "three"),
        ("Which digit is blue?", "seven"),
        ("Which digit is at the top left?", "three"),
        ("Which digit is at the centre?", "seven"),
    }


def test_a_place_with_two_digits_is_never_asked_about():
    crowded = Scene(BLANK, (Mark(3, "red", 0, (0, 0, 12, 8)), Mark(7, "blue", 1, (0, 8, 12, 16))))
    assert {mark.place for mark in crowded.marks} == {"top left"}
    assert not any("top left" in question for question, _ in _pairs(lambda rng: chat(crowded, rng, ["reading"])))


def test_other_questions_are_about_number_and_colour():
    assert set(_pairs(lambda rng: chat(SCENE, rng, ["seeing"]))) == {
        ("How many digits are there?", "two"),
        ("Which colour is the three?", "red"),
        ("Which colour is the seven?", "blue"),
    }


def test_a_place_is_answered_with_the_phrase_and_the_box_of_what_was_asked_for():
    boxes = {"three": [0, 0, 12, 15], "red": [0, 0, 12, 15], "seven": [14, 13, 26, 27], "blue": [14, 13, 26, 27]}
    rng = np.random.default_rng(0)
    for _ in range(31):
        question, answer = chat(SCENE, rng, ["grounding"]).messages
        phrase = _words(question).removeprefix("Where is ").removesuffix("?")
        (part,) = answer["content"]
        assert part["label"] == phrase
        assert [part["bbox"]] == [box for word, box in boxes.items() if word in phrase][:1]


def test_questions_about_two_pictures_are_answered_from_the_right_one():
    assert set(_pairs(lambda rng: two_pictures(SCENE, OTHER, rng))) == {
        ("Which picture shows a seven?", "Picture 1"),  # both show a three
        ("Which digit is red in Picture 1?", "three"),
        ("Which digit is blue in Picture 1?", "seven"),
        ("Which digit is black in Picture 2?", "three"),
    }


def test_ocr_gives_each_digit_a_quad_clockwise_from_its_top_left():
    (_, answer) = chat(SCENE, np.random.default_rng(0), ["ocr"]).messages
    assert answer["content"][0] == {
        "type": "quad",
        "quad": [0, 0, 12, 0, 12, 15, 0, 15],
        "label": "3",
    }


@pytest.mark.parametrize("task", [task for task in TASKS if task != "two pictures"])
def test_every_task_has_a_plain_form_and_a_conversation_about_one_picture(task):
    rng = np.random.default_rng(0)
    assert task in ASK
    assert plain(SCENE, rng, task).style == "plain"
    assert plain(SCENE, rng, task).num_pictures == chat(SCENE, rng, [task, task]).num_pictures == 1
