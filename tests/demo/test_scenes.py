"""Scenes: boxes, places, kept-apart sources."""

import numpy as np
import pytest

from examples.handwriting.digits import TEST_FORMS, TRAIN_FORMS, digits_of
from examples.handwriting.scenes import COLOURS, PLACES, SIZE, Mark, make_scenes, tight_box


@pytest.fixture(scope="module")
def scenes():
    return make_scenes(digits_of(TRAIN_FORMS), 61, seed=5)


def _ink(pixels):
    return (255 - pixels.astype(int)).max(-1) / (255 - min(min(colour) for colour in COLOURS.values()))


def test_a_box_holds_all_dark_pixels_of_its_digit_and_each_of_its_sides_touches_one(scenes):
    for scene in scenes:
        dark = _ink(scene.pixels) > 0.3
        outside = dark.copy()
        for x1, y1, x2, y2 in (mark.box for mark in scene.marks):
            outside[y1:y2, x1:x2] = False
            edge = _ink(scene.pixels)[y1:y2, x1:x2] > 0.15
            assert all(side.any() for side in (edge[0], edge[-1], edge[:, 0], edge[:, -1]))
        assert not outside.any()


def test_tight_box_counts_its_last_row_and_column_as_outside():
    ink = np.zeros((15, 15))
    ink[2:5, 7] = 1.0
    assert tight_box(ink, left=10, top=20) == (17, 22, 18, 25)


def test_boxes_lie_in_the_picture_and_do_not_overlap(scenes):
    for scene in scenes:
        covered = np.zeros((SIZE, SIZE), dtype=int)
        for x1, y1, x2, y2 in (mark.box for mark in scene.marks):
            assert 0 <= x1 < x2 <= SIZE
            assert 0 <= y1 < y2 <= SIZE
            covered[y1:y2, x1:x2] += 1
        assert covered.max() == 1


def test_digits_and_colours_of_a_scene_differ_so_that_a_phrase_means_one_of_them(scenes):
    for scene in scenes:
        assert (
            len({mark.value for mark in scene.marks}) == len({mark.colour for mark in scene.marks}) == len(scene.marks)
        )
    assert {len(scene.marks) for scene in scenes} == {1, 2, 3}


def test_a_digit_has_the_colour_that_its_mark_says(scenes):
    for scene in scenes:
        for mark in scene.marks:
            x1, y1, x2, y2 = mark.box
            patch = scene.pixels[y1:y2, x1:x2].reshape(-1, 3).astype(int)
            darkest = patch[patch.sum(-1).argmin()]
            distances = {name: np.abs(darkest - colour).sum() for name, colour in COLOURS.items()}
            assert min(distances, key=distances.get) == mark.colour


@pytest.mark.parametrize(
    ("box", "place"),
    [
        ((0, 0, 12, 15), "top left"),
        ((14, 13, 26, 27), "centre"),
        ((27, 28, 39, 40), "bottom right"),
        ((14, 0, 26, 15), "top"),
    ],
)
def test_a_place_is_the_third_in_which_the_middle_of_the_box_lies(box, place):
    assert Mark(3, "red", 0, box).place == place


def test_marks_stand_in_reading_order(scenes):
    order = [place for row in PLACES for place in row]
    for scene in scenes:
        ranks = [order.index(mark.place) for mark in scene.marks]
        assert ranks == sorted(ranks)


def test_the_same_seed_gives_the_same_scenes_and_another_seed_others():
    digits = digits_of(TRAIN_FORMS)
    first, again, other = (make_scenes(digits, 7, seed=seed) for seed in (3, 3, 4))
    assert all((a.pixels == b.pixels).all() and a.marks == b.marks for a, b in zip(first, again, strict=True))
    assert any((a.pixels != b.pixels).any() for a, b in zip(first, other, strict=True))


def test_scenes_of_test_forms_show_no_digit_of_the_training_forms(scenes):
    held_out = make_scenes(digits_of(TEST_FORMS), 61, seed=5)
    sources = [{mark.source for scene in some for mark in scene.marks} for some in (scenes, held_out)]
    assert not sources[0] & sources[1]


def test_a_blanked_scene_keeps_its_truth_and_loses_its_ink(scenes):
    blank = scenes[0].blanked()
    assert blank.marks == scenes[0].marks
    assert (blank.pixels == 255).all()
