"""docs/finetune-qwen2_5-vl.md from top to bottom as it stands, with a tiny model in the place of the real one."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from transformers import GenerationMixin
from typer.testing import CliRunner

from processing.example import Example
from processing.processing_families import FAMILIES
from processing.rows import read_rows
from trainers.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "finetune-qwen2_5-vl.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
# What makes the run small; everything else is the page's.
TINY = [
    "data.picture_side=16",
    "data.workers=0",
    "lora.rank=2",
    "model.dtype=float32",
    "hardware.precision=float32",
    "hardware.per_device_batch_size=2",
    "optimizer.global_batch_size=4",
    "optimizer.epochs=1.0",
    "run.evaluate_every=2",
    "run.answers=1",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """pictures/000.png ... 010.png, each with one or two boxes, and boxes.csv; the working directory."""
    (tmp_path / "pictures").mkdir()
    lines = ["file,label,x1,y1,x2,y2"]
    for number in range(11):
        picture = Image.new("RGB", (60, 40), "white")
        for label, left in (("cup", 2 + number), ("plate", 30))[: 1 + number % 2]:
            corners = (left, 5, left + 16, 25)
            ImageDraw.Draw(picture).rectangle(corners, fill="red")
            lines.append(f"{number:03}.png,{label}," + ",".join(map(str, corners)))
        picture.save(tmp_path / "pictures" / f"{number:03}.png")
    (tmp_path / "boxes.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(line):
    words = shlex.split(line)
    assert words[0] == "qwenvl"
    extra = [word for setting in TINY for word in ("--set", setting)] if words[1] in ("train", "estimate") else []
    result = CliRunner().invoke(app, [*words[1:], *extra], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0, f"{line}\n{result.output}"
    return result.output


@pytest.mark.slow
def test_the_page_works_from_top_to_bottom(folder, model_folder, monkeypatch, capsys):
    generate = GenerationMixin.generate
    # Long answers of a random model are only slow.
    monkeypatch.setattr(GenerationMixin, "generate", lambda *a, **k: generate(*a, **k | {"max_new_tokens": 3}))
    names: dict = {}
    outputs = {}
    for language, block in BLOCKS:
        block = block.replace(MODEL, str(model_folder("qwen2_5_vl")))
        if language == "yaml":
            (folder / re.match(r"# (\S+\.yaml)\n", block)[1]).write_text(block)
        elif language == "python":
            exec(compile(block, "finetune-qwen2_5-vl.md", "exec"), names)
        else:
            assert language == "bash"
            for line in block.splitlines():
                outputs[line.split()[1]] = command(line)
    train, held_out = list(read_rows("rows.jsonl")), list(read_rows("held_out.jsonl"))
    assert (len(train), len(held_out)) == (9, 2)
    assert all(isinstance(example, Example) for example in train)
    assert "9" in outputs["data"]
    assert (folder / "look.html").stat().st_size > 1000
    assert "needed" in outputs["estimate"]
    assert re.search(r"\d+ merged", outputs["merge"])
    answers = sorted((folder / "runs/cups/answers").glob("*.jsonl"))
    assert json.loads(answers[0].read_text().splitlines()[0])["true_boxes"]
    assert names["picture"].size == (60, 40)
    assert "()" in capsys.readouterr().out  # a random model finds nothing


def test_every_command_of_the_package_on_the_page_is_in_a_block_that_the_test_runs():
    lines = {line for language, block in BLOCKS if language == "bash" for line in block.splitlines()}
    assert {line.split()[1] for line in lines} == {"data", "inspect", "estimate", "train", "merge", "chat"}
    assert {language for language, _ in BLOCKS} == {"bash", "python", "yaml"}


def test_links_lead_to_files():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", PAGE)
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_the_table_of_families_says_what_the_code_does():
    rows = {
        cells[0]: cells[1:] for cells in re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", PAGE, re.MULTILINE)
    }
    for cls, numbers, text in zip(FAMILIES, rows["numbers of a box"], rows["written as"], strict=True):
        convention = cls.convention
        assert numbers == (
            f"thousandths, 0 ... {convention.last}" if convention.is_normalized else "pixels of the resized picture"
        )
        assert text == {"special_tokens": "special tokens", "json": "JSON, `bbox_2d`"}[convention.text]
