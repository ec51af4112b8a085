"""The command `qwenvl data check`: what it prints, what it writes, how it exits."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from trainers.cli import app


@pytest.fixture
def data(tmp_path):
    Image.new("RGB", (40, 24)).save(tmp_path / "a.png")
    path = tmp_path / "rows.jsonl"
    good = {"image": "a.png", "prefix": "Read.", "suffix": "STOP", "task": "ocr"}
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, "image": "b.png", "id": "vg_7"}) + "\n")
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["data", "check", *map(str, arguments)])


def test_a_bad_row_is_printed_with_its_reason_and_makes_the_exit_code_1(data):
    result = run(data)
    assert result.exit_code == 1
    assert "2 rows: 1 good (1 prefix_suffix), 1 bad" in result.output
    assert f"{data}:2 (id=vg_7): picture {data.parent / 'b.png'} does not exist" in result.output
    assert "picture width in pixels: min 40, median 40, max 40" in result.output
    assert "tokens" not in result.output


def test_a_good_file_makes_it_0(data):
    assert run(data, "--no-pictures").exit_code == 0
    Image.new("RGB", (7, 5)).save(data.parent / "b.png")
    result = run(data)
    assert (result.exit_code, "2 rows: 2 good" in result.output) == (0, True)


def test_a_file_that_cannot_be_checked_makes_it_2(tmp_path):
    result = run(tmp_path / "none.jsonl")
    assert (result.exit_code, "there is no file" in result.output) == (2, True)


@pytest.mark.parametrize("option", [("--format", "lava"), ("--model", "/nowhere"), ("--root",)])
def test_wrong_options_are_refused(data, option):
    assert run(data, *option).exit_code == 2


def test_write_clean_separates_and_says_where(data, tmp_path):
    result = run(data, "--write-clean", tmp_path / "out")
    assert result.exit_code == 1
    assert f"good rows: {tmp_path / 'out' / 'rows.good.jsonl'}" in result.output
    assert f"relative picture paths in them start at {data.parent}" in result.output
    assert (tmp_path / "out" / "rows.good.jsonl").read_text() == data.read_text().splitlines(keepends=True)[0]
    assert run(tmp_path / "out" / "rows.good.jsonl", "--root", data.parent).exit_code == 0
    assert run(data, "--write-clean", tmp_path / "out").exit_code == 2


def test_with_a_model_lengths_are_counted_by_task(data, model_folder):
    Image.new("RGB", (7, 5)).save(data.parent / "b.png")
    result = run(data, "--model", model_folder("qwen_vl"))
    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if " ocr " in line)
    # A letter is a token here, and a picture is 4.
    system = 1 + len("system\nYou are a helpful assistant.") + 1 + 1
    user = 1 + len("user\nPicture 1: ") + 1 + 4 + 1 + len("\nRead.") + 1 + 1
    assistant = 1 + len("assistant\nSTOP") + 1 + 1
    assert [cell.strip() for cell in line.split("│")[1:-1]] == ["ocr", "2", "2", *[f"{system + user + assistant}"] * 3]
