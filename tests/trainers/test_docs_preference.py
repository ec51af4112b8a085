"""What docs/preference.md says of DPO is so: its recipe, its code, its table of settings."""

import dataclasses
import json
import re
from pathlib import Path

import yaml
from PIL import Image

from processing.rows import read_rows
from trainers.recipe_preference import PreferenceSection
from trainers.recipe_reading import load_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "preference.md").read_text()
DPO = PAGE.split("## DPO")[1].split("\n## ")[0]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DPO, re.DOTALL)


def test_the_recipe_on_the_page_is_read(tmp_path):
    (recipe,) = blocks("yaml")
    path = tmp_path / "dpo.yaml"
    path.write_text(recipe)
    loaded = load_recipe(path, ["preference.beta=0.3"])
    assert loaded.stage == "dpo"
    assert loaded.preference.losses == ("sigmoid", "bco_pair", "sft")
    assert "qwenvl train dpo.yaml --set preference.beta=0.3 --resume" in blocks("bash")[0]


def test_the_table_of_settings_names_each_setting_once_and_its_default():
    table = DPO.split("| `preference.`")[1].split("\n\n")[0]
    shown = {}
    for names, defaults in re.findall(r"^\| (`\w.*?) \| (.*?) \|", table, re.MULTILINE):
        values = yaml.safe_load(f"[{defaults.replace('`', '')}]")
        shown |= dict(zip(re.findall(r"`(\w+)`", names), values, strict=True))
    defaults = {
        field.name: getattr(PreferenceSection(), field.name) for field in dataclasses.fields(PreferenceSection)
    }
    assert shown == {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}


def test_the_code_on_the_page_trains(model_folder, tmp_path, monkeypatch):
    row = json.loads(blocks("json")[0])
    Image.new("RGB", (8, 8)).save(tmp_path / row["images"][0])
    (tmp_path / "preferences.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    assert next(iter(read_rows(tmp_path / "preferences.jsonl"))).kind == "preference"
    (code,) = blocks("python")
    code = code.replace("Qwen/Qwen2.5-VL-3B-Instruct", str(model_folder("qwen2_5_vl")))
    small = "max_steps=2, per_device_train_batch_size=1, use_cpu=True, bf16=False, activation_checkpointing=False"
    assert "max_steps=100" in code
    monkeypatch.chdir(tmp_path)
    exec(code.replace("max_steps=100", small), {})
    assert (tmp_path / "runs/dpo/final/model.safetensors").is_file()
