"""Detection and referring rows: xywh becomes xyxy, and whatever is left out is counted."""

import pytest

from processing.example import RowError, Source
from processing.row_formats import examples_from_row
from processing.row_formats_detection import rows_of_coco, xyxy_of_xywh

CATEGORIES = [{"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}]


def coco(*annotations, **more):
    image = {"id": 5, "file_name": "a.png", "width": 101, "height": 53}
    return {"image": image, "annotations": list(annotations), "categories": CATEGORIES, **more}


def box(category, *numbers, **more):
    return {"category_id": category, "bbox": list(numbers), **more}


def answer(row):
    (example,) = examples_from_row(row)
    return example.messages[1]["content"], dict(example.left_out)


def reason_of(row):
    with pytest.raises(RowError) as error:
        examples_from_row(row, source=Source("c.json"))
    return str(error.value)


def test_corner_and_size_become_two_corners():
    assert xyxy_of_xywh([2, 3, 5, 7]) == [2, 3, 7, 10]


def test_boxes_are_listed_by_category_in_the_order_of_the_file():
    parts, left_out = answer(coco(box(3, 2, 3, 5, 7), box(2, 11, 13, 17, 19), box(3, 0, 0, 101, 53)))
    assert parts == [
        {"type": "box", "bbox": [[11, 13, 28, 32]], "label": "cat"},
        {"type": "box", "bbox": [[2, 3, 7, 10], [0, 0, 101, 53]], "label": "dog"},
    ]
    assert left_out == {}


def test_crowds_and_boxes_without_area_are_left_out_and_counted_and_overhanging_ones_cut():
    parts, left_out = answer(
        coco(
            box(2, 1, 1, 9, 9, iscrowd=1),
            box(2, 10, 10, 0, 5),
            box(2, 200, 10, 5, 5),
            box(2, 97, 47, 7, 11),
            box(2, -2, 3, 5, 7),
        )
    )
    assert parts == [{"type": "box", "bbox": [[97, 47, 101, 53], [0, 3, 3, 10]], "label": "cat"}]
    assert left_out == {"crowd annotation": 1, "box without area in the picture": 2, "box cut at the border": 2}


def test_a_picture_with_nothing_in_it_is_answered_in_words():
    assert answer(coco()) == ([{"type": "text", "text": "None of them is in the picture."}], {})


def test_the_question_names_all_classes_unless_the_row_brings_its_own():
    (example,) = examples_from_row(coco())
    assert (
        example.messages[0]["content"][1]["text"] == "Locate every object of these classes in the picture: cat, dog."
    )
    (example,) = examples_from_row(coco(question="Cats?"))
    assert example.messages[0]["content"][1]["text"] == "Cats?"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (coco(box(7, 1, 1, 2, 2)), "an annotation has no known category_id"),
        (coco(box(2, 1, 1, 2)), "bbox must be four finite numbers"),
        (coco(box(2, 1, 1, -2, 2)), "negative width or height"),
        ({**coco(), "image": {"file_name": "a.png", "width": 0, "height": 5}}, "they are 0 and 5"),
        ({**coco(), "image": "a.png"}, "image must be a dictionary with file_name"),
        ({**coco(), "categories": ["cat"]}, "categories must be a list of dictionaries, it is ['cat']"),
        ({**coco(), "categories": [{"id": 2}]}, "a category must have id and name, this is {'id': 2}"),
        ({**coco(), "categories": [{"id": [], "name": "cat"}]}, "a category must have id and name"),
        ({**coco(), "annotations": 7}, "annotations must be a list of dictionaries, it is 7"),
        (coco(box([], 1, 1, 2, 2)), "an annotation has no known category_id"),
    ],
)
def test_malformed_detection_rows_are_refused(row, reason):
    assert reason in reason_of(row)


def test_a_coco_file_becomes_one_row_per_picture_and_annotations_without_a_picture_are_refused_with_both_numbers():
    document = {
        "images": [{"id": 5}, {"id": 7}],
        "annotations": [{"id": 1, "image_id": 7}, {"id": 2, "image_id": 5}, {"id": 3, "image_id": 7}],
        "categories": CATEGORIES,
    }
    rows = list(rows_of_coco(document))
    assert [(row["id"], [item["id"] for item in row["annotations"]]) for row in rows] == [(5, [2]), (7, [1, 3])]
    with pytest.raises(ValueError, match=r"an image has no id: \{\}"):
        list(rows_of_coco({**document, "images": [{}]}))
    document["annotations"].append({"id": 4, "image_id": 11})
    with pytest.raises(
        ValueError, match="1 of 4 annotations name an image_id that 'images' does not have, the first has"
    ):
        list(rows_of_coco(document))
    with pytest.raises(ValueError, match="categories must be a list of dictionaries, it is None"):
        list(rows_of_coco({**document, "categories": None}))


def test_referring_rows_give_one_example_per_sentence():
    row = {"image": "a.png", "bbox": [2, 3, 5, 7], "sentences": ["the left dog", {"sent": "brown dog "}]}
    first, second = examples_from_row(row)
    assert first.messages[0]["content"] == [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "Locate "},
        {"type": "ref", "text": "the left dog"},
        {"type": "text", "text": " in the picture."},
    ]
    assert second.messages[1]["content"] == [{"type": "box", "bbox": [2, 3, 5, 7], "label": "brown dog"}]


def test_a_referring_row_says_when_its_box_is_corner_and_size():
    row = {"image": "a.png", "bbox": [2, 3, 5, 7], "sent": "dog", "bbox_format": "xywh"}
    assert answer(row)[0][0]["bbox"] == [2, 3, 7, 10]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"sent": "dog", "bbox": [2, 3, 5]}, "bbox must be four finite numbers, it is [2, 3, 5]"),
        ({"sent": "dog", "bbox": [50, 3, 40, 7]}, "xyxy is wanted, not xywh"),
        ({"sent": "dog", "bbox": [2, 3, 5, 7], "bbox_format": "xyhw"}, "bbox_format is 'xyhw'"),
        (
            {"sent": "dog", "bbox": [2, 3, 50, 70], "width": 31, "height": 71},
            "ends at (50, 70), outside the picture of 31",
        ),
        ({"sent": " ", "bbox": [2, 3, 5, 7]}, "must be a phrase"),
        ({"sentences": [], "bbox": [2, 3, 5, 7]}, "sentences must be a list of phrases, it is []"),
        ({"sent": "dog", "bbox": [2, 3, 5, 7], "question": "Where?"}, "has no {phrase}"),
    ],
)
def test_malformed_referring_rows_are_refused(row, reason):
    assert reason in reason_of({"image": "a.png", **row})
