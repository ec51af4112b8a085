"""The whole demonstration with a handful of steps: nothing is learned, everything happens."""

import json
import re
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForImageTextToText, AutoProcessor

from examples.handwriting.demo import run_demo
from examples.handwriting.digits import TEST_FORMS, digits_of
from examples.handwriting.publishing import publish_demo
from examples.handwriting.recipe import SHORT, StageRecipe
from examples.handwriting.report import report
from examples.handwriting.results import BLIND, MOMENTS
from examples.handwriting.scoring import INSIDE_TRAINING, TASKS
from processing.coordinates import Box
from trainers.publish_record import read_record

pytestmark = pytest.mark.slow
SCENES, HELD_OUT, STEPS = 23, 5, 2


def _few(stage: StageRecipe) -> StageRecipe:
    return replace(stage, steps=STEPS, trees=7, batch_size=3)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    recipe = replace(
        SHORT,
        scenes=SCENES,
        held_out=HELD_OUT,
        tower_steps=STEPS,
        text=_few(SHORT.text),
        pretrain=_few(SHORT.pretrain),
        multitask=_few(SHORT.multitask),
        sft=_few(SHORT.sft),
    )
    folder = tmp_path_factory.mktemp("demo")
    (taught,) = run_demo(folder, recipe)
    torch.set_num_threads(threads)
    return folder, taught


def test_every_task_has_a_score_of_all_held_out_scenes_before_and_after_each_stage_and_blind(done):
    _, taught = done
    assert set(taught.run.scores) == {*MOMENTS, BLIND}
    for scores in taught.run.scores.values():
        assert {task: score.total for task, score in scores.items()} == dict.fromkeys(TASKS, HELD_OUT)


def test_held_out_scenes_are_made_of_digits_that_no_training_scene_shows(done):
    _, taught = done
    training, held_out = (
        {mark.source for scene in scenes for mark in scene.marks}
        for scenes in (taught.training_scenes, taught.held_out)
    )
    assert len(taught.training_scenes) == 2 * SCENES  # of the tower and of the stages
    assert held_out <= set(digits_of(TEST_FORMS).indices.tolist())
    assert not training & held_out


@pytest.mark.parametrize(
    ("name", "unchanged"),
    [
        ("stage 0, text", ("tower", "adapter")),
        ("stage 1", ("language_model", "embeddings")),
        ("stage 2", ()),
        ("stage 3", ("tower",)),
    ],
)
def test_a_stage_leaves_what_it_freezes_bit_for_bit_and_moves_the_rest(done, name, unchanged):
    _, taught = done
    (stage,) = [stage for stage in taught.run.stages if stage.name == name]
    assert stage.unchanged == unchanged
    assert stage.steps == STEPS


def test_the_saved_model_stops_at_the_end_of_a_chat_message_and_of_a_document(done):
    folder, _ = done
    model = AutoModelForImageTextToText.from_pretrained(folder / "model")
    processor = AutoProcessor.from_pretrained(folder / "model")
    stops = processor.tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id)
    assert {"<|endoftext|>", "<|im_end|>"} <= set(stops)


def test_inside_stages_two_and_three_held_out_scenes_are_asked_and_tensorboard_shows_it(done):
    folder, taught = done
    assert [[step for step, _ in stage.asked] for stage in taught.run.stages] == [[], [], [], [1, 2], [1, 2]]
    for stage in taught.run.stages[3:]:
        board = EventAccumulator(str(next((folder / "logs" / stage.name / "runs").iterdir())))
        board.Reload()
        for task, score in INSIDE_TRAINING.items():
            shown = [(event.step, event.value) for event in board.Scalars(f"eval/{task}/{score}")]
            assert shown == [(step, logged[f"eval_{task}/{score}"]) for step, logged in stage.asked]
        assert len(board.Tags()["images"]) == 4
        lines = (folder / "logs" / stage.name / "answers" / "step-000002.jsonl").read_text().splitlines()
        assert len(lines) == HELD_OUT * len(INSIDE_TRAINING)


def test_the_report_needs_no_other_file_and_shows_scores_curve_and_pictures(done):
    folder, taught = done
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:|//|file:)[^"')]*""", page)
    assert "<script" not in page
    assert page.count("data:image/png") == sum(len(a.pictures) for given in taught.answers.values() for a in given)
    assert all(name.replace(">", "&gt;") in page for name in TASKS.values())
    score = taught.run.scores["stage 3"]["seeing"]
    assert f"<b>{score.mean:.2f}</b><small>{score.interval[0]:.2f} – {score.interval[1]:.2f}</small>" in page


def test_of_several_seeds_the_report_shows_mean_lowest_and_highest_of_every_task_at_every_moment(done):
    _, taught = done
    better = {
        moment: {task: replace(score, right=score.right + 2) for task, score in scores.items()}
        for moment, scores in taught.run.scores.items()
    }
    page = report(
        [taught.run, replace(taught.run, seed=1, scores=better)], taught.answers, {"processors": "x"}, "r", []
    )
    before = taught.run.scores["stage 1"]["seeing"].right
    low, mean, high = (before / HELD_OUT, (before + 1) / HELD_OUT, (before + 2) / HELD_OUT)
    assert "<h2>2 seeds</h2>" in page
    assert f"<td><b>{mean:.2f}</b><small>{low:.2f} – {high:.2f}</small></td>" in page


def test_results_are_kept_as_numbers_with_their_intervals(done):
    folder, taught = done
    (run,) = json.loads((folder / "results.json").read_text(encoding="utf-8"))["runs"]
    kept = run["scores"]["stage 1"]["caption"]
    assert (kept["right"], kept["total"]) == (taught.run.scores["stage 1"]["caption"].right, HELD_OUT)
    assert kept["interval_95"][0] <= kept["mean"] <= kept["interval_95"][1]


def test_sample_pictures_are_saved_with_what_is_on_them(done):
    folder, taught = done
    truth = json.loads((folder / "samples" / "truth.json").read_text(encoding="utf-8"))
    assert sorted(truth) == sorted(path.name for path in (folder / "samples").glob("*.png"))
    assert truth["0.png"]["digits"][0]["box"] == list(taught.held_out[0].marks[0].box)


def test_true_boxes_of_answers_are_those_of_the_scenes_in_pixels(done):
    _, taught = done
    for answer, scene in zip(taught.answers["ocr"], taught.held_out, strict=True):
        assert [Box(*mark.box, label=str(mark.value)) for mark in scene.marks] == answer.true_boxes


def test_on_a_machine_ten_times_as_slow_steps_are_left_out_to_keep_the_time(done, tmp_path):
    from rich.progress import Progress

    from examples.handwriting.lesson import Lesson

    recipe = replace(SHORT, scenes=5, held_out=2)
    lesson = Lesson(recipe, 0, tmp_path, Progress(), deadline=0.0, clock=lambda: -100.0)
    lesson.slowness = 10.0
    seconds = [stage.seconds for stage in (SHORT.multitask, SHORT.sft)]
    assert lesson.in_time(SHORT.multitask).steps == round(SHORT.multitask.steps * 100 / (10 * sum(seconds)))
    lesson.slowness = 100 / sum(seconds)
    assert lesson.in_time(SHORT.multitask).steps == SHORT.multitask.steps


@pytest.mark.slow
def test_the_taught_model_ends_as_a_dry_run_of_publishing_with_a_card_of_what_was_measured(done, capsys):
    folder, taught = done
    found = publish_demo(folder, SHORT, taught.run, taught.model_dir)
    assert found.comparison.largest_difference == 0.0
    assert {"README.md", "model.safetensors", "modeling_qwenvl.py"} <= set(found.plan.files)
    card = (folder / "published" / "README.md").read_text()
    score = taught.run.scores["stage 3"]["grounding"]
    assert f"| {score.mean:.4g} | {score.right} of {HELD_OUT} held-out pictures right" in card
    assert "from 0 to 999" in card
    assert read_record(folder).metrics[0].value == taught.run.scores["stage 3"]["caption"].mean
    assert "To send it: qwenvl upload" in capsys.readouterr().out
