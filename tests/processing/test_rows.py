"""Files and datasets are read row by row, and every row keeps the place where it starts."""

import csv
import io
import json
import tracemalloc

import pytest
from PIL import Image

from processing.rows import read_rows

GOOD = {"image": "a.png", "prefix": "Read.", "suffix": "STOP"}
BAD = {"image": "a.png", "prefix": "Read.", "suffix": None}


def read(path, **options):
    reader = read_rows(path, on_error="collect", **options)
    examples = list(reader)
    return [example.source.line for example in examples], [problem.source.line for problem in reader.problems], reader


def test_jsonl_keeps_line_numbers_over_blank_broken_and_foreign_lines(tmp_path):
    path = tmp_path / "t.jsonl"
    lines = [json.dumps(GOOD), "", json.dumps(BAD), "{broken", json.dumps({**GOOD, "id": "x"}), "[1]"]
    path.write_bytes("\n".join(lines).encode() + b'\n{"image": "\xff"}\n')
    good, bad, reader = read(path)
    assert (good, bad) == ([1, 5], [3, 4, 6, 7])
    reasons = [str(problem) for problem in reader.problems]
    assert reasons[0].startswith(f"{path}:3: ")
    assert "not JSON: Expecting property name enclosed in double quotes at column 2" in reasons[1]
    assert "a row must be a dictionary" in reasons[2]
    assert "not UTF-8" in reasons[3]


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    for name, text in (
        ("t.jsonl", json.dumps(GOOD)),
        ("t.json", json.dumps([GOOD])),
        ("t.csv", "prefix,suffix\na,b\n"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert len(list(read_rows(tmp_path / name))) == 1


def test_raise_stops_at_the_first_bad_row_and_names_it(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps({**BAD, 'id': 'vg_2'})}\n")
    reader = iter(read_rows(path, format="prefix_suffix"))
    next(reader)
    with pytest.raises(ValueError, match=r"t\.jsonl:2 \(id=vg_2\): format 'prefix_suffix' needs suffix"):
        next(reader)


def test_a_json_list_keeps_the_line_where_each_row_starts(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps([GOOD, BAD, GOOD], indent=1))  # 5 lines a row, the first starts on line 2
    assert read(path)[:2] == ([2, 12], [7])


def test_a_json_list_that_breaks_off_gives_the_rows_before_and_one_problem(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(f'[{json.dumps(GOOD)},\n{json.dumps(GOOD)},\n{{"image": ')
    good, bad, reader = read(path)
    assert (good, bad) == ([1, 2], [3])
    assert "nothing after it was read" in reader.problems[0].reason
    path.write_text(f"[{json.dumps(GOOD)},\n{json.dumps(GOOD)}")
    good, _, reader = read(path)
    assert good == [1, 2]
    assert "the list has no closing bracket" in reader.problems[0].reason


def test_jsonl_that_is_called_json_is_read_all_the_same(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(GOOD)}\n")
    assert read(path)[:2] == ([1, 3], [])


def test_a_coco_file_is_read_by_picture(tmp_path):
    path = tmp_path / "instances.json"
    image = {"file_name": "a.png", "width": 101, "height": 53}
    document = {
        "images": [{**image, "id": 5}, {**image, "id": 7, "width": None}],
        "annotations": [{"id": 1, "image_id": 5, "category_id": 2, "bbox": [2, 3, 5, 7]}],
        "categories": [{"id": 2, "name": "cat"}],
    }
    path.write_text(json.dumps(document))
    reader = read_rows(path, on_error="collect")
    (example,) = reader
    assert (example.source.where, example.task) == (f"{path} (id=5)", "detection")
    assert example.pictures == [str(tmp_path / "a.png")]
    assert "(id=7): the picture needs width and height > 0, they are None and 53" in str(reader.problems[0])
    path.write_text(json.dumps({**document, "annotations": [{"image_id": 11}]}))
    (problem,) = read(path)[2].problems
    assert "1 of 1 annotations name an image_id" in str(problem)


def test_csv_counts_the_lines_inside_quoted_cells(tmp_path):
    path = tmp_path / "t.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [["image", "prefix", "suffix"], ["a.png", "Two\nlines", "x" * 200_000], ["b.png", "Read.", ""]]
        )
        writer.writerows([["c.png", "Read."], ["d.png", "Read.", "STOP"]])
    good, bad, reader = read(path, format="prefix_suffix")
    assert (good, bad) == ([2, 6], [4, 5])
    assert "needs suffix" in reader.problems[0].reason
    assert "2 cell(s) but the header has 3" in reader.problems[1].reason


def test_bytes_that_are_not_utf8_make_a_bad_row_of_csv_and_a_bad_file_of_json(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"prefix,suffix\na,\xff\nb,c\n")
    good, bad, reader = read(path)
    assert (good, bad, reader.problems[0].reason) == ([3], [2], "not UTF-8")
    path = tmp_path / "t.json"
    path.write_bytes(b'[{"prefix": "\xff", "suffix": "a"}]')
    good, _, reader = read(path)
    assert good == []
    assert "the file is not UTF-8" in str(reader.problems[0])


def test_csv_cells_hold_lists_as_json(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('image,bbox,sent,weight\na.png,"[2, 3, 5, 7]",dog,0.5\na.png,"[2, 3",dog,1\n')
    reader = read_rows(path, on_error="collect")
    (example,) = reader
    assert (example.messages[1]["content"][0]["bbox"], example.weight) == ([2, 3, 5, 7], 0.5)
    assert "a cell that must hold JSON does not" in reader.problems[0].reason


def png(size):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    return buffer.getvalue()


def test_parquet_and_datasets_bring_their_pictures_undecoded(tmp_path):
    from datasets import Dataset, Features, IterableDataset, Value
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "prefix": Value("string"), "suffix": Value("string")})
    rows = [
        {**GOOD, "image": {"bytes": png((5, 7)), "path": None}},
        {**BAD, "image": {"bytes": b"broken", "path": None}},
    ]
    dataset = Dataset.from_list(rows, features=features)
    dataset.to_parquet(tmp_path / "t.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    stream = IterableDataset.from_generator(lambda: iter(rows), features=features)
    for place in (tmp_path / "t.parquet", tmp_path / "saved", dataset, stream):
        reader = read_rows(place, format="prefix_suffix", on_error="collect")
        (example,) = reader
        assert Image.open(io.BytesIO(example.pictures[0])).size == (5, 7)
        assert (example.source.line, [problem.source.line for problem in reader.problems]) == (1, [2])


def test_an_iterable_dataset_that_does_not_name_its_features_is_taken_as_it_comes():
    from datasets import IterableDataset

    picture = Image.new("RGB", (5, 7))
    stream = IterableDataset.from_generator(lambda: iter([{**GOOD, "image": picture}]))
    (example,) = read_rows(stream)
    assert example.pictures[0].size == (5, 7)


def test_a_dataset_dict_answers_a_wrong_split_with_those_it_has():
    from datasets import Dataset, DatasetDict

    splits = DatasetDict({"validation": Dataset.from_list([GOOD])})
    assert len(list(read_rows(splits, split="validation"))) == 1
    with pytest.raises(ValueError, match="has no split 'train'; it has validation"):
        list(read_rows(splits))


def test_a_name_that_is_no_file_goes_to_the_hub_lazily(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        return datasets.Dataset.from_list([GOOD])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    reader = read_rows("someone/pages", split="test")
    assert asked == []
    (example,) = reader
    assert asked == [("someone/pages", {"split": "test", "streaming": True})]
    assert (example.source.where, example.pictures) == ("someone/pages:1", ["a.png"])


def test_files_that_are_not_there_or_of_no_known_type_are_refused_before_reading(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file data/t\.jsonl"):
        read_rows("data/t.jsonl")
    (tmp_path / "t.txt").write_text("")
    with pytest.raises(
        ValueError, match=r"t\.txt is of no known type: a file must end in \.jsonl, \.json, \.csv, \.parq"
    ):
        read_rows(tmp_path / "t.txt")
    with pytest.raises(ValueError, match="unknown row format 'coca', did you mean 'coco'"):
        read_rows([], format="coca")
    with pytest.raises(ValueError, match="on_error is 'ignore'"):
        read_rows([], on_error="ignore")
    with pytest.raises(ValueError, match="this is a int"):
        list(read_rows(7))


def test_relative_paths_start_at_the_file_unless_a_root_is_named(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({**GOOD, "image": ["a.png", "/x/b.png", "https://x.org/c.png"]}) + "\n")
    (here,), (there,) = read_rows(path), read_rows(path, root="/data")
    assert here.pictures == [str(tmp_path / "a.png"), "/x/b.png", "https://x.org/c.png"]
    assert there.pictures == ["/data/a.png", "/x/b.png", "https://x.org/c.png"]
    (unmoved,) = read_rows([GOOD])
    assert unmoved.pictures == ["a.png"]


def test_reading_again_starts_again_and_forgets_old_problems(tmp_path):
    reader = read_rows([GOOD, BAD], format="prefix_suffix", on_error="collect")
    assert len(list(reader)) == len(list(reader)) == len(reader.problems) == 1


def test_jsonl_takes_no_more_memory_for_more_rows(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text((json.dumps({**GOOD, "suffix": "x" * 5_000}) + "\n") * 300)
    tracemalloc.start()
    num_rows = sum(1 for _ in read_rows(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (num_rows, peak < 300_000) == (300, True)  # the file has one and a half million bytes


def test_jsonl_is_read_line_by_line_and_not_ahead(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text((json.dumps(GOOD) + "\n") * 3 + "{broken\n")
    reader = iter(read_rows(path))
    assert [next(reader).source.line for _ in range(3)] == [1, 2, 3]
    with pytest.raises(ValueError, match=r":4: not JSON"):
        next(reader)
