"""`qwenvl inspect`: what it prints, the page it writes, and how it ends."""

import json

import pytest
from typer.testing import CliRunner

from trainers.cli import app


def inspect(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "160", "NO_COLOR": "1"})


@pytest.mark.parametrize("family", ["qwen_vl", "qwen2_5_vl"])
def test_rows_are_shown_with_their_tokens_and_numbers(family, model_folder, rows_file, tmp_path):
    result = inspect(rows_file, "--model", model_folder(family), "--rows", 3, "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert result.output.count("How bright?") == 3
    assert "rows.jsonl:3" in result.output
    assert "rows.jsonl:4" not in result.output
    assert "Picture 1: 8 x 8 (original 8 x 8), 4 tokens" in result.output
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<article>") == page.count("data:image/png;base64,") == 3
    assert "3 rows as Qwen" in page


def test_it_shows_what_would_be_cut(model_folder, rows_file, tmp_path):
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    follow_up = [{"role": "user", "content": "Really?"}, {"role": "assistant", "content": "Yes, " * 30}]
    rows[1]["messages"] += follow_up
    rows_file.write_text("\n".join(map(json.dumps, rows)))
    result = inspect(rows_file, "--model", model_folder("qwen2_5_vl"), "--rows", 2, "--max-length", 70)
    assert result.exit_code == 0, result.output
    outcomes = [line.split("│")[-2].strip() for line in result.output.splitlines() if "4 tokens) │" in line]
    assert outcomes == ["kept", "trim"]
    dropped = inspect(
        rows_file, "--model", model_folder("qwen2_5_vl"), "--rows", 2, "--max-length", 70, "--steps", "drop"
    )
    assert "drop: 0 of" in dropped.output


def test_bad_rows_and_refused_ones_end_with_1(model_folder, rows_file):
    rows_file.write_text('{"messages": "?"}\n' + rows_file.read_text())
    result = inspect(rows_file, "--model", model_folder("qwen2_5_vl"), "--rows", 2)
    assert result.exit_code == 1
    assert "refused:" in result.output
    assert "rows.jsonl:1" in result.output
    rows_file.with_name("1.png").unlink()
    result = inspect(rows_file, "--model", model_folder("qwen2_5_vl"), "--rows", 3)
    assert "1.png does not exist" in result.output.replace("\n", "")


def test_what_cannot_be_inspected_ends_with_2(model_folder, rows_file, tmp_path):
    folder = model_folder("qwen2_5_vl")
    for arguments, reason in [
        ((tmp_path / "absent.jsonl", "--model", folder), "absent.jsonl"),
        ((rows_file, "--model", tmp_path), "no processor of the Qwen-VL family"),
        ((rows_file, "--model", folder, "--max-length", 9, "--steps", "cut"), "Unknown step 'cut'"),
        ((rows_file, "--model", folder, "--train-on", "nobody"), "train_on is 'nobody'"),
    ]:
        result = inspect(*arguments)
        assert (result.exit_code, reason in result.output.replace("\n", " ")) == (2, True), result.output


def test_a_file_of_rewards_has_nothing_to_inspect(model_folder, tmp_path):
    path = tmp_path / "rewards.jsonl"
    path.write_text(json.dumps({"problem": "1+1?", "solution": "2"}))
    result = inspect(path, "--model", model_folder("qwen2_5_vl"))
    assert result.exit_code == 2
    assert "no row with an answer to train on" in result.output
