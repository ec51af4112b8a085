"""Preference methods on the handwriting scenes: rows, intervals, the table, and each method once."""

import json

import numpy as np
import pytest

from examples.handwriting import preference, preference_scores
from examples.handwriting.digits import TRAIN_FORMS, digits_of
from examples.handwriting.model import make_model, make_processor
from examples.handwriting.scenes import make_scenes
from examples.handwriting.training import texts_of_all_tasks
from processing.metrics import iou
from trainers.evaluation import Answer
from trainers.reward_solution import read_solution


@pytest.fixture(scope="module")
def scenes():
    return make_scenes(digits_of(TRAIN_FORMS), 20, seed=3)


@pytest.fixture(scope="module")
def model_dir(scenes, tmp_path_factory):
    processor = make_processor(texts_of_all_tasks(scenes))
    folder = tmp_path_factory.mktemp("model")
    make_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_half_of_the_rows_ask_for_a_box_and_half_for_a_word(scenes):
    rows = [preference.as_reward_row(example) for example in preference.rows(scenes, seed=0)]
    boxes = [row for row in rows if read_solution(row.solution).boxes]
    assert len(rows) == 40
    assert len(boxes) == 20
    assert all(row.messages[-1]["role"] == "user" for row in rows)


def test_a_rejected_answer_is_another_box_inside_the_picture_or_another_digit(scenes):
    rng = np.random.default_rng(0)
    for example in preference.rows(scenes, seed=0):
        pair = preference.as_preference_row(example, rng)
        (chosen,), (rejected,) = pair.chosen[0]["content"], pair.rejected[0]["content"]
        assert chosen["type"] == rejected["type"]
        if chosen["type"] == "text":
            assert rejected["text"] in preference.NUMERALS
            assert rejected["text"] != chosen["text"]
        else:
            assert rejected["bbox"] != chosen["bbox"]
            assert min(rejected["bbox"]) >= 0
            assert max(rejected["bbox"]) <= 40
            assert rejected["label"] == chosen["label"]


def test_intervals_and_gains_are_over_the_same_questions():
    assert preference_scores.interval([0.25] * 7) == (0.25, 0.25)
    low, high = preference_scores.interval([0.0, 1.0] * 50)
    assert (low, high) == (pytest.approx(0.4, abs=0.03), pytest.approx(0.6, abs=0.03))
    # Each question gains 0.1, however different the questions are.
    assert preference_scores.difference([0.0, 0.5, 0.9], [0.1, 0.6, 1.0]) == pytest.approx((0.1, 0.1, 0.1))


def test_an_answer_with_two_boxes_scores_nothing():
    from processing.coordinates import Box
    from processing.grounding_text import ParsedAnswer

    true = Box(0, 0, 10, 10)

    def answered(*boxes):
        return Answer(None, (), "", ParsedAnswer(boxes, (), ""), (), (true,))

    assert preference_scores._iou(answered(Box(0, 0, 10, 5))) == iou(Box(0, 0, 10, 5), true) == 0.5
    assert preference_scores._iou(answered(true, true)) == 0
    assert preference_scores._iou(answered()) == 0


def test_the_table_averages_runs_and_shows_gains():
    def record(method, seed, after):
        before = {"box_iou": [0.2, 0.4], "box_right": [0.0, 0.0], "reading": [1.0, 0.0]}
        before |= {"sampled_iou": [0.1, 0.3], "sampled_reading": [0.5, 0.0]}
        return {"method": method, "seed": seed, "steps": 10 * seed, "before": before, "after": {**before, **after}}

    records = [
        record("sft", 1, {}),
        record("grpo", 1, {"box_iou": [0.4, 0.6]}),
        record("grpo", 3, {"box_iou": [0.6, 0.8]}),
    ]
    lines = preference_scores.table(records).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["start", "sft", "grpo"]
    cells = [cell.strip() for cell in lines[4].split("|")[1:-1]]
    assert cells[:3] == ["grpo", "2", "20"]
    shown = dict(zip(preference_scores.TITLES, cells[3:], strict=True))
    # Means of 0.5 and 0.7, after 0.3; the reward takes the words in, which gained nothing.
    assert shown["box_iou"] == "0.600 (+0.300; +0.300 to +0.300)"
    assert shown["reward"].startswith("0.550 (+0.150; ")
    assert shown["sampled_reward"] == "0.225 (+0.000; +0.000 to +0.000)"


@pytest.mark.slow
@pytest.mark.parametrize("method", list(preference.Method))
def test_each_method_runs_and_leaves_scores(model_dir, tmp_path, monkeypatch, method):
    for name, value in {"SCENES": 24, "HELD_OUT": 4, "GROUP": 2, "PROMPTS": 2, "LONGEST": 6}.items():
        monkeypatch.setattr(preference, name, value)
    monkeypatch.setattr(preference_scores, "LONGEST", 6)
    preference.run(model_dir, method, seed=1, minutes=0.001, rate=1e-4, output=tmp_path)
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert record["method"] == method
    assert record["steps"] >= 1
    assert len(record["before"]["box_iou"]) == len(record["after"]["sampled_reading"]) == 4
    preference.print_table(tmp_path)
    shown = (tmp_path / "report.html").read_text()
    assert shown.count("<svg") == 2
    assert f"<td>{method}</td>" in shown
