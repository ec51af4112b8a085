"""Rows of object detection (COCO) and of referring expressions (RefCOCO), as a question and boxes to answer it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from .parts import Part, is_number, shorten
from .row_pictures import PictureRoot

Fields = dict[str, Any]
Row = Mapping[str, Any]

# Ours, as no paper of the family states one for chat; a row's "question" replaces it.
DETECTION_QUESTION = "Locate every object of these classes in the picture: {classes}."
NOTHING_FOUND = "None of them is in the picture."
REFERRING_QUESTION = "Locate {phrase} in the picture."


def rows_of_coco(document: Mapping[str, Any]) -> Iterator[Row]:
    """One row per picture of a COCO detection file: its picture, its annotations, and the categories of the file.

    Raises:
        ValueError: a table is missing, or annotations belong to pictures that the file does not list.
    """
    images, categories = _list_of_dicts(document, "images"), _list_of_dicts(document, "categories")
    if wrong := [image for image in images if not _is_id(image.get("id"))]:
        raise ValueError(f"an image has no id: {shorten(wrong[0])}")
    annotations: dict[Any, list[Mapping[str, Any]]] = {image["id"]: [] for image in images}
    found = _list_of_dicts(document, "annotations")
    lost = [
        item.get("id") for item in found if not _is_id(item.get("image_id")) or item["image_id"] not in annotations
    ]
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(found)} annotations name an image_id that 'images' does not have, the first has id "
            f"{lost[0]!r}"
        )
    for annotation in found:
        annotations[annotation["image_id"]].append(annotation)
    for image in images:
        yield {"id": image["id"], "image": image, "annotations": annotations[image["id"]], "categories": categories}


def read_coco(row: Row, root: PictureRoot) -> Fields:
    """{"image": {"file_name", "width", "height"}, "annotations": [{"bbox", "category_id"}], "categories": [...]}.

    Every category of the file is asked for and the answer lists the boxes of those that are there, by category. Crowd
    annotations mark a region rather than an object, and boxes of no area teach nothing: both are left out and counted
    in `left_out`. Boxes that reach over the border are cut at it, and counted too.
    """
    image = row["image"]
    if not isinstance(image, Mapping) or not image.get("file_name"):
        raise ValueError(f"image must be a dictionary with file_name, width and height, it is {shorten(image)}")
    width, height = _size(image)
    names = {}
    for category in _list_of_dicts(row, "categories"):
        if not _is_id(category.get("id")) or not isinstance(category.get("name"), str):
            raise ValueError(f"a category must have id and name, this is {shorten(category)}")
        names[category["id"]] = category["name"]
    left_out: Counter[str] = Counter()
    boxes: dict[str, list[list[float]]] = {name: [] for name in names.values()}
    for annotation in _list_of_dicts(row, "annotations"):
        if not _is_id(annotation.get("category_id")) or annotation["category_id"] not in names:
            raise ValueError(f"an annotation has no known category_id: {shorten(annotation)}")
        if annotation.get("iscrowd"):
            left_out["crowd annotation"] += 1
            continue
        box = xyxy_of_xywh(annotation.get("bbox"))
        inside = [min(max(box[0], 0), width), min(max(box[1], 0), height), min(box[2], width), min(box[3], height)]
        if inside[2] <= inside[0] or inside[3] <= inside[1]:
            left_out["box without area in the picture"] += 1
            continue
        left_out["box cut at the border"] += inside != box
        boxes[names[annotation["category_id"]]].append(inside)
    question = _question(row) or DETECTION_QUESTION.format(classes=", ".join(boxes))
    answer: list[Part] = [{"type": "box", "bbox": found, "label": name} for name, found in boxes.items() if found] or [
        {"type": "text", "text": NOTHING_FOUND}
    ]
    return {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": root(image["file_name"])}, _text(question)]},
            {"role": "assistant", "content": answer},
        ],
        "task": "detection",
        "left_out": {reason: count for reason, count in left_out.items() if count},
    }


def rows_of_refcoco(row: Row) -> list[Row]:
    """One row per sentence of a row whose "sentences" name the same box in several ways; other rows as they are."""
    if row.get("sentences") is None:
        return [row]
    sentences = row["sentences"]
    if not isinstance(sentences, list) or not sentences:
        raise ValueError(f"sentences must be a list of phrases, it is {shorten(sentences)}")
    rest = {key: value for key, value in row.items() if key != "sentences"}
    return [
        {**rest, "sentence": phrase.get("sent") if isinstance(phrase, Mapping) else phrase} for phrase in sentences
    ]


def read_refcoco(row: Row, root: PictureRoot) -> Fields:
    """{"image": "a.jpg", "bbox": [x1, y1, x2, y2], "sent": "the left dog"}; "bbox_format": "xywh" for COCO's boxes."""
    given = [key for key in ("sent", "sentence") if row.get(key) is not None]
    if len(given) != 1 or not isinstance(row[given[0]], str) or not row[given[0]].strip():
        raise ValueError(
            f"one of 'sent' and 'sentence' must be a phrase, the row has {shorten([row[k] for k in given])}"
        )
    phrase = row[given[0]].strip()
    bbox_format = row.get("bbox_format") or "xyxy"
    if bbox_format not in ("xyxy", "xywh"):
        raise ValueError(f"bbox_format is {bbox_format!r}, it must be xyxy or xywh")
    box = _four_numbers(row["bbox"]) if bbox_format == "xyxy" else xyxy_of_xywh(row["bbox"])
    if row.get("width") is not None or row.get("height") is not None:
        width, height = _size(row)
        if box[2] > width or box[3] > height:
            raise ValueError(
                f"bbox {row['bbox']} ({bbox_format}) ends at ({box[2]}, {box[3]}), outside the picture of "
                f"{width} x {height}"
            )
    question = _question(row) or REFERRING_QUESTION
    if "{phrase}" not in question:
        raise ValueError(f"question {shorten(question)} has no {{phrase}}, the place of the phrase")
    before, after = question.split("{phrase}", 1)
    asked = [_text(before), {"type": "ref", "text": phrase}, _text(after)]
    return {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": root(row["image"])},
                    *(part for part in asked if part["text"]),
                ],
            },
            {"role": "assistant", "content": [{"type": "box", "bbox": box, "label": phrase}]},
        ],
        "task": "referring_grounding",
    }


def xyxy_of_xywh(box: Any) -> list[float]:
    """[x, y, width, height] -> [x1, y1, x2, y2]; ValueError where it is not four finite numbers.

    Example:
        >>> xyxy_of_xywh([2, 3, 5, 7])
        [2, 3, 7, 10]
    """
    x, y, width, height = _four_numbers(box)
    if width < 0 or height < 0:
        raise ValueError(f"bbox {list(box)} has a negative width or height: [x, y, width, height] is wanted")
    return [x, y, x + width, y + height]


def _list_of_dicts(table: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    items = table.get(key)
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise ValueError(f"{key} must be a list of dictionaries, it is {shorten(items)}")
    return items


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str)


def _question(row: Row) -> str | None:
    question = row.get("question")
    if not isinstance(question, str | None):
        raise ValueError(f"question must be text, it is {shorten(question)}")
    return question


def _four_numbers(box: Any) -> list[float]:
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(is_number(value) for value in box):
        raise ValueError(f"bbox must be four finite numbers, it is {shorten(box)}")
    return list(box)


def _size(row: Mapping[str, Any]) -> tuple[float, float]:
    width, height = row.get("width"), row.get("height")
    if not is_number(width) or not is_number(height) or not (width > 0 and height > 0):  # type: ignore[operator]
        raise ValueError(f"the picture needs width and height > 0, they are {width!r} and {height!r}")
    return width, height  # type: ignore[return-value]


def _text(text: str) -> Part:
    return {"type": "text", "text": text}
