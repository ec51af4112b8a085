"""What the README says can be done."""

import re
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from modeling_qwenvl import QwenVLConfig, QwenVLForConditionalGeneration
from processing import QwenVLImageProcessorPil, QwenVLProcessor, train_qwenvl_tokenizer
from trainers.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip() for _, block in BLOCKS for line in block.splitlines() if line.startswith("qwenvl")
]


def test_every_link_leads_to_a_file():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"`?\bmake (\w[\w-]*)", README)
    assert {"demo", "test"} <= set(targets)
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_exists(command):
    words = command.split()[1:]
    options = [word for word in words if word.startswith("--")]
    names = []
    for word in words:
        if not re.fullmatch(r"[a-z]+", word):
            break
        names.append(word)
    result = CliRunner().invoke(app, [*names, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    assert [option for option in options if option not in result.output] == []


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A saved random Qwen-VL with its processor."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_qwenvl_tokenizer(["Where is the traffic light?"], vocab_size=480)
    start, end, pad = tokenizer.convert_tokens_to_ids(["<img>", "</img>", "<imgpad>"])
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = QwenVLConfig(
        vision_config={"model_type": "qwen_vl_vision", "image_size": 28, **vision},
        text_config={"model_type": "qwen_vl_text", "vocab_size": len(tokenizer), **text},
        num_queries=4, adapter_num_heads=2,
        image_token_id=pad, image_start_token_id=start, image_end_token_id=end,
    )  # fmt: skip
    QwenVLForConditionalGeneration(config).save_pretrained(folder)
    pictures = QwenVLImageProcessorPil(size={"height": 28, "width": 28})
    QwenVLProcessor(pictures, tokenizer, num_image_tokens=4).save_pretrained(folder)
    return folder


def test_the_code_under_use_runs(tiny_folder, tmp_path, monkeypatch, capsys):
    [code] = [block for language, block in BLOCKS if language == "python"]
    Image.new("RGB", (1280, 720)).save(tmp_path / "street.jpg")
    monkeypatch.chdir(tmp_path)
    assert code.count("Qwen/Qwen-VL-Chat") == 2
    exec(compile(code.replace("Qwen/Qwen-VL-Chat", str(tiny_folder)), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip().endswith(")")  # a tuple of shapes, empty for a random model
