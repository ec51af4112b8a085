"""The code on docs/training.md runs as it stands there, with a tiny model in the place of the real one."""

import re
from io import StringIO
from pathlib import Path

from rich.console import Console

from trainers.arguments import StageArguments
from trainers.freezing import TrainedParts, freeze
from trainers.stage_trainer import StageTrainer
from trainers.stages import SFT

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()


def test_the_code_blocks_run_one_after_the_other(model_folder, rows_file, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 4
    code = "\n".join(blocks).replace("Qwen/Qwen-VL", str(model_folder("qwen_vl")))
    code = code.replace("max_steps=8000", "max_steps=2, use_cpu=True")
    monkeypatch.chdir(rows_file.parent)
    names = {}
    exec(code, names)
    assert (tmp_path / "runs/sft/final/processor_config.json").exists()
    printed = capsys.readouterr().out
    assert names["args"].packing
    assert len(names["trainer"].train_dataset) < len(names["rows"])
    assert "supervised tokens, loss" in printed
    assert "all/unparsable" in printed


def test_the_table_of_parts_is_that_of_the_tiny_model(build):
    console = Console(file=StringIO(), width=60)
    console.print(freeze(build("qwen_vl"), TrainedParts(SFT.parts)).table("stage sft: what trains"))
    printed = [line.strip() for line in console.file.getvalue().splitlines()]
    shown = [line.strip() for line in PAGE.split("stage sft: what trains")[1].splitlines()[1:11]]
    assert shown == printed[1:]


def test_the_table_of_settings_names_each_setting_once_and_its_default():
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", PAGE.split("## Settings")[1].split("## ")[0], re.MULTILINE)
    named = [name for cell, _ in rows for name in re.findall(r"`(\w+)`", cell)]
    own = set(StageArguments.__annotations__) - {
        "remove_unused_columns",
        "ddp_find_unused_parameters",
        "accelerator_config",
    }
    assert sorted(named) == sorted(own)
    defaults = dict(rows)
    fields = StageArguments.__dataclass_fields__
    assert defaults["`tower_layer_decay`"] == str(fields["tower_layer_decay"].default)
    assert defaults["`z_loss`"] == str(fields["z_loss"].default)


def test_the_stages_on_the_page_are_the_ones_in_the_code():
    header = PAGE.split("## Settings")[0]
    for trainer_class in StageTrainer.__subclasses__():
        if trainer_class.__module__.startswith("trainers."):
            assert trainer_class.__name__ in header
