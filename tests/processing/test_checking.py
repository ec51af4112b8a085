"""A file is checked as training reads it; every row is counted once, and separating rows loses none of them."""

import csv
import json

import pytest
from PIL import Image

from processing.checking import BOX_IN_TEXT, check_rows, conversations_of
from processing.clean_rows import CleanWriter
from processing.pictures import PictureLimits
from processing.processing_families import Qwen2_5_VLProcessor
from processing.rows import read_rows
from processing.supervision import encode

BOX = {"type": "box", "bbox": [2, 3, 40, 24], "label": "cup"}


@pytest.fixture
def folder(tmp_path):
    """A folder with a picture of 40 x 24 pixels, which the byte processors show as it is: 15 tokens."""
    Image.new("RGB", (40, 24)).save(tmp_path / "a.png")
    return tmp_path


def question(answer, image="a.png", **more):
    return {
        "messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": answer}],
        "image": image,
    } | more


ROWS = [
    question([BOX], id="good"),
    question([{**BOX, "bbox": [2, 3, 41, 24]}], id="outside"),
    question("Here.", image="missing.png", id="no picture"),
    {"prefix": "1+1?", "suffix": "2", "task": "sums"},
    question('[{"bbox_2d": [1, 2, 3, 4]}]', id="as text"),
    {"image": "a.png", "prefix": "Read.", "suffix": '<p data-bbox="1 2 3 25">a</p>', "id": "page"},
    {"image": "a.png", "prompt": "Who?", "chosen": "Ada.", "rejected": "Nobody."},
    {"image": "a.png", "problem": "Who?", "solution": "Ada."},
]


def write(folder, rows=ROWS, name="t.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_counts_sizes_and_bad_rows(folder):
    report = check_rows(read_rows(write(folder)))
    assert (report.num_rows, dict(report.formats)) == (
        8,
        {"messages": 2, "prefix_suffix": 1, "preference": 1, "reward": 1},
    )
    assert {task: (counts.num_examples, counts.num_pictures) for task, counts in report.tasks.items()} == {
        "sft": (2, 2),
        "sums": (1, 0),
        "preference": (1, 1),
        "reward": (1, 1),
    }
    assert (list(report.widths), list(report.heights)) == ([40] * 4, [24] * 4)
    assert report.notes == {BOX_IN_TEXT: 1}
    assert [problem.source.id for problem in report.problems] == ["outside", "no picture", "page"]
    reasons = [problem.reason for problem in report.problems]
    assert "box 'cup' has x 41, but the picture is 24x40 pixels" in reasons[0]
    assert "missing.png does not exist" in reasons[1]
    assert "box has y 25, but the picture is 24x40 pixels" in reasons[2]


def test_without_opening_pictures_only_the_rows_themselves_are_checked(folder):
    report = check_rows(read_rows(write(folder)), open_pictures=False)
    assert (report.problems, list(report.widths)) == ([], [])
    with pytest.raises(ValueError, match="lengths in tokens need the sizes of the pictures"):
        check_rows(read_rows([]), open_pictures=False, processor=object())


def test_lengths_are_those_that_training_will_see(folder, byte_processor):
    processor = byte_processor("qwen2_5_vl", Qwen2_5_VLProcessor)
    reader = read_rows(write(folder))
    report = check_rows(reader, processor=processor)
    good = {"good", "as text"}
    examples = [e for e in read_rows(write(folder), on_error="collect") if e.source.id in good]
    assert list(report.tasks["sft"].lengths) == [len(encode(example, processor).input_ids) for example in examples]
    # The longer answer of a pair; a prompt with no answer yet.
    pair, prompt = report.tasks["preference"].lengths[0], report.tasks["reward"].lengths[0]
    assert pair - prompt == len("Nobody.")


def test_a_preference_pair_is_two_conversations_and_a_reward_example_one_with_an_empty_answer():
    (pair,) = read_rows([ROWS[6]])
    assert [conversation.messages[-1]["content"] for conversation in conversations_of(pair)] == ["Ada.", "Nobody."]
    (prompt,) = read_rows([ROWS[7]])
    assert [conversation.messages[-1]["content"] for conversation in conversations_of(prompt)] == [""]


def test_a_row_of_several_sentences_is_one_row_and_several_examples(folder):
    row = {"image": "a.png", "bbox": [2, 3, 5, 7], "sentences": ["dog", "the dog"]}
    report = check_rows(read_rows(write(folder, [row])))
    assert (report.num_rows, report.tasks["referring_grounding"].num_examples) == (1, 2)


def test_what_the_reader_leaves_out_is_counted(folder):
    row = {
        "image": {"file_name": "a.png", "width": 40, "height": 24},
        "annotations": [{"category_id": 2, "bbox": [1, 1, 3, 5], "iscrowd": n % 2} for n in range(5)],
        "categories": [{"id": 2, "name": "cat"}],
    }
    assert check_rows(read_rows(write(folder, [row]))).notes == {"left out: crowd annotation": 2}


def test_pictures_from_the_network_can_be_forbidden(folder):
    rows = [question("a", image="https://example.org/a.png")]
    report = check_rows(read_rows(write(folder, rows)), limits=PictureLimits(allow_network=False))
    assert "would be fetched from the network" in str(report.problems[0])


def separate(path, out):
    with CleanWriter(path, out) as writer:
        check_rows(read_rows(path), on_row=writer.add)
    return writer


def test_separated_lines_of_jsonl_are_all_lines_byte_for_byte(folder):
    path = write(folder)
    lines = [
        *path.read_bytes().splitlines(),
        b'{"prefix":  "odd   spacing", "suffix": "\xe7\x8b\x97"}',
        b'{"a": "\xff"}',
        b"{",
    ]
    path.write_bytes(b"\n".join(lines))
    writer = separate(path, folder / "out")
    good = writer.good_path.read_bytes().splitlines()
    bad = [json.loads(line) for line in writer.bad_path.read_text().splitlines()]
    assert good == [lines[i] for i in (0, 3, 4, 6, 7, 8)]
    assert [entry["line"] for entry in bad] == [2, 3, 6, 10, 11]
    assert [entry["row"] for entry in bad[:3]] == [ROWS[i] for i in (1, 2, 5)]
    assert [entry["text"].encode("utf-8", "surrogateescape") for entry in bad[3:]] == lines[9:]
    assert bad[0]["id"] == "outside"
    assert "box 'cup' has x 41" in bad[0]["reason"]
    assert len(list(read_rows(writer.good_path, root=folder))) == len(good)


@pytest.mark.parametrize("name", ["t.json", "t.csv"])
def test_rows_of_other_text_files_become_jsonl(folder, name):
    path = folder / name
    rows = [{"prefix": "a", "suffix": "b"}, {"prefix": "a", "suffix": ""}, {"prefix": "c", "suffix": "d"}]
    if name == "t.json":
        path.write_text(json.dumps([row if row["suffix"] else {"prefix": "a"} for row in rows]))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prefix", "suffix"])
            writer.writeheader()
            writer.writerows(rows)
    writer = separate(path, folder)
    assert [json.loads(line) for line in writer.good_path.read_text().splitlines()] == [rows[0], rows[2]]
    (bad,) = (json.loads(line) for line in writer.bad_path.read_text().splitlines())
    assert bad["row"]["prefix"] == "a"


def test_rows_of_coco_become_rows_by_picture_that_read_the_same(folder):
    image = {"file_name": "a.png", "width": 40, "height": 24}
    document = {
        "images": [{**image, "id": 2}, {**image, "id": 3, "width": 0}],
        "annotations": [{"id": 1, "image_id": 2, "category_id": 5, "bbox": [1, 2, 3, 5]}],
        "categories": [{"id": 5, "name": "cat"}],
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(document))
    writer = separate(path, folder)
    (before,), (after,) = read_rows(path, on_error="collect"), read_rows(writer.good_path)
    assert before.messages == after.messages
    assert json.loads(writer.bad_path.read_text())["id"] == "3"


def test_rows_of_parquet_stay_parquet_and_the_bad_ones_say_why(folder):
    from pyarrow import Table, parquet

    rows = [{"image": "a.png", "prefix": "a", "suffix": f"{n}" if n % 3 else None, "n": n} for n in range(200)]
    parquet.write_table(Table.from_pylist(rows), folder / "t.parquet")
    writer = separate(folder / "t.parquet", folder)
    good, bad = parquet.read_table(writer.good_path).to_pylist(), parquet.read_table(writer.bad_path).to_pylist()
    assert good == [row for row in rows if row["n"] % 3]
    assert [row["n"] for row in bad] == [row["bad_line"] - 1 for row in bad] == list(range(0, 200, 3))
    assert all("the row has the keys" in row["bad_reason"] for row in bad)


def test_an_output_that_is_there_already_is_not_overwritten(folder):
    path = write(folder)
    (folder / "t.bad.jsonl").write_text("precious")
    with pytest.raises(FileExistsError, match=r"t\.bad\.jsonl is there already"):
        CleanWriter(path, folder)
    with pytest.raises(ValueError, match="someone/pages is none"):
        CleanWriter("someone/pages", folder)
