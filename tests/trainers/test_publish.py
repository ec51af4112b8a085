"""From a run to a folder that strangers can load: built, described, tried, and refused where something is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from processing.coordinates import CONVENTIONS
from trainers import publish_folder
from trainers.cli import app
from trainers.publish import prepare
from trainers.publish_card import MARK, box_convention, code_sample, model_card
from trainers.publish_check import compare
from trainers.publish_files import plan_upload
from trainers.publish_record import DataSource, Metric, RunRecord, base_license, read_record, save_record
from trainers.recipe_reading import load_recipe
from trainers.train import train

RECORD = RunRecord(
    base_model="Qwen/Qwen2.5-VL-7B-Instruct",
    base_license="apache-2.0",
    stage="sft",
    trained={"tower": "frozen", "language_model": "lora"},
    train_data=(DataSource("rows.jsonl", 12, "grey squares"),),
    settings={"steps": "3 of 4 rows"},
    metrics=(Metric("loss", 1.25, "12 held-out rows, after step 3"),),
)


@pytest.fixture
def run(model_folder, rows_file, tmp_path):
    """run("qwen2_5_vl", ...) -> folder of a finished run of three steps, with a checkpoint and an evaluation."""

    def _run(family, *more):
        train(
            load_recipe(
                "cpu_demo",
                [
                    f"model.path={model_folder(family)}", f"data.train=[{{path: {rows_file}}}]",
                    f"data.validation=[{{path: {rows_file}}}]", "data.picture_side=8",
                    f"run.output_dir={tmp_path / 'run'}", "optimizer.max_steps=3", "optimizer.global_batch_size=4",
                    "hardware.per_device_batch_size=2", "run.evaluate_every=3", "run.answers=2", "run.save_every=3",
                    *more,
                ],
            )
        )  # fmt: skip
        return tmp_path / "run"

    return _run


# The record of a run


def test_a_run_leaves_what_a_card_needs(run, rows_file):
    record = read_record(run("qwen2_5_vl"), "Qwen/Qwen2.5-VL-7B-Instruct")
    assert record.base_license == "apache-2.0"
    assert record.train_data == record.validation_data == (DataSource("rows.jsonl", 12),)
    assert record.trained["language_model"] == "full"
    assert record.settings["steps"] == "3 of 4 rows"
    by_name = {metric.name: metric for metric in record.metrics}
    assert by_name["loss"].conditions == "12 held-out rows, after step 3"
    assert by_name["all/exact_match"].conditions == "2 held-out rows, greedy answers, after step 3"
    assert 0 < by_name["loss"].value < 20
    assert str(rows_file.parent) not in str(record)


def test_a_base_that_only_this_machine_has_and_a_licence_nobody_named_are_refused(run, tmp_path):
    folder = run("qwen2_5_vl")
    with pytest.raises(ValueError, match=r"which nobody else has: say what it is on the Hub with --base-model"):
        read_record(folder)
    with pytest.raises(ValueError, match=r"licence of me/base is not known here: name it with --license"):
        read_record(folder, "me/base")
    assert read_record(folder, "me/base", "mit").base_license == "mit"
    (folder / "data.json").unlink()
    with pytest.raises(ValueError, match=r"has no data\.json, which `qwenvl train` writes"):
        read_record(folder, "me/base")


def test_the_base_models_own_card_names_its_licence(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: tongyi-qianwen\n---\n# Base\n")
    assert base_license("me/base", str(tmp_path)) == "tongyi-qianwen"
    assert base_license("Qwen/Qwen-VL", "nowhere") == "Tongyi Qianwen LICENSE AGREEMENT"


def test_a_record_by_hand_comes_back_as_it_was(tmp_path):
    save_record(RECORD, tmp_path)
    assert read_record(tmp_path) == RECORD


# The card


def card_of(record=RECORD, kind="model", convention="qwen2_5_vl", **sample):
    settings = {"is_native": False, "has_code": False, "is_plain": False, "question": "What?"} | sample
    code = code_sample(kind, "me/mine", record.base_model, **settings)
    return model_card(record, "me/mine", kind, CONVENTIONS[convention], code)


def test_the_card_says_where_the_model_comes_from_and_what_was_measured_how():
    card = card_of()
    assert card.data.base_model == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    for piece in (
        "| rows.jsonl | 12 | grey squares |",
        "| loss | 1.25 | 12 held-out rows, after step 3 |",
        "tower: frozen; language model: lora",
        "| steps | 3 of 4 rows |",
        "The base model's (Qwen/Qwen2.5-VL-7B-Instruct) licence: apache-2.0.",
        "pixels of the picture as the model sees it",
        'name = "me/mine"',
    ):
        assert piece in card.text
    assert MARK in card.text
    card.data.to_dict()
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_a_licence_that_the_hub_does_not_list_is_named_in_full():
    record = RunRecord("Qwen/Qwen-VL", "Tongyi Qianwen LICENSE AGREEMENT", "sft", {}, ())
    card = card_of(record, convention="qwenvl", is_native=True)
    assert (card.data.license, card.data.license_name) == ("other", "tongyi-qianwen-license-agreement")
    assert "(Qwen/Qwen-VL) licence: Tongyi Qianwen LICENSE AGREEMENT" in card.text
    assert "Nothing was measured" in card.text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qwenvl", "<box>(x1,y1),(x2,y2)</box>`; whole numbers from 0 to 999: a side of the picture is 1000 units"),
        ("qwen2_vl", "<|box_start|>(x1,y1),(x2,y2)<|box_end|>`; whole numbers from 0 to 999"),
        ("qwen2_5_vl", "bbox_2d"),
        ("qwen3_vl", "whole numbers from 0 to 1000: a side of the picture is 1000 units"),
    ],
)
def test_the_convention_of_the_boxes_is_the_processors(name, words):
    assert words in box_convention(CONVENTIONS[name])


def test_the_code_imports_the_package_only_where_it_must():
    settings = {"base": None, "is_plain": False, "question": "?"}
    native = code_sample("model", "me/x", is_native=True, has_code=False, **settings)
    assert "import modeling_qwenvl, processing" in native
    assert "trust" not in native
    alone = code_sample("model", "me/x", is_native=True, has_code=True, **settings)
    assert "modeling_qwenvl" not in alone
    assert alone.count("trust_remote_code=True") == 2
    other = code_sample("model", "me/x", is_native=False, has_code=False, **settings)
    assert "modeling_qwenvl" not in other
    assert "trust" not in other
    for code in (native, alone, other):
        compile(code, "card", "exec")


# The comparison, on stand-ins that load fast


STAND_IN = """
import torch
class Model(torch.nn.Module):
    dtype = torch.{dtype}
    def forward(self, x):
        return type("Output", (), {{"logits": {factor} * x.float()}})
inputs, model, output = {{"x": torch.arange(4) + {shift}}}, Model(), torch.tensor([[{answer}]])
print({answer})
"""


def stand_in(factor=1.0, shift=0, answer=7, dtype="float32"):
    return STAND_IN.format(factor=factor, shift=shift, answer=answer, dtype=dtype)


@pytest.mark.slow
def test_only_a_folder_that_does_what_the_original_does_passes():
    found = compare(stand_in(), stand_in())
    assert (found.largest_difference, found.answer) == (0.0, "7")
    with pytest.raises(ValueError, match=r"makes other inputs than the original's: inputs/x\. Nothing was sent"):
        compare(stand_in(shift=1), stand_in())
    with pytest.raises(ValueError, match=r"logits differ by 1\.00e-03 of the largest, 1\.00e-06 is allowed"):
        compare(stand_in(1.001), stand_in())
    with pytest.raises(ValueError, match=r"answers '8', the original '7'"):
        compare(stand_in(answer=8), stand_in())


@pytest.mark.slow
def test_a_merged_model_may_differ_by_what_its_dtype_rounds():
    almost = compare(stand_in(1.01, dtype="bfloat16"), stand_in(dtype="bfloat16"), is_merged=True)
    assert almost.largest_difference == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(ValueError, match=r"7\.63e-06 is allowed"):
        compare(stand_in(1.01), stand_in(), is_merged=True)


@pytest.mark.slow
def test_code_that_does_not_run_is_shown_with_its_error():
    with pytest.raises(ValueError, match=r"(?s)code sample of the published model does not run.*ZeroDivisionError"):
        compare("1 / 0", stand_in())


@pytest.mark.slow
def test_without_the_package_its_modules_cannot_be_imported():
    with pytest.raises(ValueError, match="No module named 'processing'"):
        compare("import processing", stand_in(), without_package=True)


# Whole ways


@pytest.mark.slow
def test_people_without_this_package_load_a_qwen_vl_that_brings_its_code(run, tmp_path):
    folder = run("qwen_vl")
    record = read_record(folder, "Qwen/Qwen-VL")
    found = prepare(folder / "final", tmp_path / "published", "me/mine", record, has_code=True)
    assert found.kind == "model"
    assert found.comparison.largest_difference == 0.0
    assert {"modeling_qwenvl.py", "processing_qwenvl.py", "README.md"} <= set(found.plan.files)
    assert found.plan.refused == ()
    assert "training_args.bin" in found.left_behind
    saved = load_file(folder / "final" / "model.safetensors")
    assert all(
        torch.equal(saved[name], tensor)
        for name, tensor in load_file(tmp_path / "published" / "model.safetensors").items()
    )
    # This process' classes carry no code along.
    assert type(found).__module__ == "trainers.publish"
    assert publish_folder.AutoModelForImageTextToText.from_pretrained(folder / "final")._auto_class is None


@pytest.mark.slow
def test_an_adapter_is_published_beside_its_base_or_merged_into_it(run, tmp_path, model_folder):
    parts = "parts={adapter: {train: full}, language_model: {train: lora}, embeddings: {train: frozen}}"
    folder = run("qwen2_5_vl", parts, "lora={rank: 2}")
    record = read_record(folder, "Qwen/Qwen2.5-VL-7B-Instruct")
    found = prepare(folder / "final", tmp_path / "adapter", "me/mine", record)
    assert found.kind == "adapter"
    assert found.comparison.largest_difference == 0.0
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert str(model_folder("qwen2_5_vl")) not in "".join(
        (tmp_path / "adapter" / name).read_text() for name in found.plan.files if not name.endswith(".safetensors")
    )
    merged = prepare(folder / "final", tmp_path / "merged", "me/mine", record, merged=True)
    assert merged.kind == "model"
    assert 0 <= merged.comparison.largest_difference < 1e-5
    assert "model.safetensors" in merged.plan.files
    assert "adapter_config.json" not in merged.plan.files


@pytest.mark.slow
def test_a_checkpoint_is_published_under_the_names_that_others_look_for(run, tmp_path):
    folder = run("qwen2_5_vl")
    record = read_record(folder, "Qwen/Qwen2.5-VL-7B-Instruct")
    found = prepare(folder / "checkpoint-3", tmp_path / "published", "me/mine", record)
    ours, final = (
        load_file(tmp_path / "published" / "model.safetensors"),
        load_file(folder / "final" / "model.safetensors"),
    )
    assert ours.keys() == final.keys()
    assert all(torch.equal(ours[name], final[name]) for name in ours)
    assert {"optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"} <= set(found.left_behind)
    assert not [path for path in (tmp_path / "published").iterdir() if path.name in found.left_behind]


@pytest.mark.slow
def test_the_command_makes_a_dry_run_of_a_processor_and_shows_the_rest(run, tmp_path, model_folder):
    folder = run("qwen2_5_vl")
    processor = tmp_path / "processor"
    processor.mkdir()
    for path in model_folder("qwen2_5_vl").iterdir():
        if path.name not in ("config.json", "generation_config.json", "model.safetensors"):
            (processor / path.name).write_bytes(path.read_bytes())
    (processor / "hf_token.txt").write_text("x")
    command = [
        "upload",
        str(processor),
        "me/mine",
        "--run",
        str(folder),
        "--base-model",
        "Qwen/Qwen2.5-VL-7B-Instruct",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "same inputs from the published processor" in result.output
    assert "Dry run:" in result.output
    assert "hf_token.txt" in result.output
    assert not (tmp_path / "published" / "hf_token.txt").exists()


def test_an_adapter_leaves_its_trainers_card_behind_and_names_its_base_as_the_hub_does(tmp_path):
    source = tmp_path / "final"
    source.mkdir()
    settings = {"peft_type": "LORA", "r": 3, "base_model_name_or_path": "/home/me/base"}
    (source / "adapter_config.json").write_text(json.dumps(settings))
    (source / "README.md").write_text("a trainer's own card")
    (source / "optimizer.pt").write_bytes(b"states")
    save_file({"lora_A": torch.arange(3.0)}, source / "adapter_model.safetensors")
    assert publish_folder.build_folder(source, tmp_path / "hub", base_name="Qwen/Qwen2-VL-2B") == "adapter"
    names = {path.name for path in (tmp_path / "hub").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    published = json.loads((tmp_path / "hub" / "adapter_config.json").read_text())
    assert published == settings | {"base_model_name_or_path": "Qwen/Qwen2-VL-2B"}
    assert json.loads((source / "adapter_config.json").read_text()) == settings


def test_wishes_that_do_not_fit_are_refused(model_folder, tmp_path):
    source = model_folder("qwen2_5_vl")
    with pytest.raises(ValueError, match="there is nothing to merge"):
        prepare(source, tmp_path / "published", "me/mine", RECORD, merged=True)
    with pytest.raises(ValueError, match="needs no code of this package"):
        prepare(source, tmp_path / "published", "me/mine", RECORD, has_code=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is not empty and was not made by this command"):
        prepare(source, tmp_path / "full", "me/mine", RECORD)
    with pytest.raises(ValueError, match=r"it is no saved model, adapter or processor"):
        prepare(tmp_path / "full", tmp_path / "published", "me/mine", RECORD)


def test_a_checkpoint_that_is_not_whole_is_refused(model_folder, tmp_path):
    source = tmp_path / "checkpoint-3"
    source.mkdir()
    for path in model_folder("qwen2_5_vl").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "checkpoint_files.json").write_text('{"optimizer.pt": 3}')
    with pytest.raises(ValueError, match=r"is not a whole checkpoint: optimizer\.pt is missing"):
        prepare(source, tmp_path / "published", "me/mine", RECORD)


@pytest.mark.slow
def test_a_folder_whose_weights_changed_on_the_way_is_not_published(model_folder, tmp_path, monkeypatch):
    build = publish_folder.build_folder

    def damaged(source, folder, *args):
        kind = build(source, folder, *args)
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] *= 1.01
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return kind

    monkeypatch.setattr("trainers.publish.build_folder", damaged)
    with pytest.raises(ValueError, match="it is not the model that it was made from"):
        prepare(model_folder("qwen2_5_vl"), tmp_path / "published", "me/mine", RECORD)


@pytest.mark.slow
def test_the_script_of_the_checkout_is_the_command(tmp_path):
    script = Path(__file__).resolve().parents[2] / "hub_upload.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path), "me/x"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "which `qwenvl train` writes" in done.stderr


def test_a_plan_without_code_refuses_python(model_folder, tmp_path):
    for path in model_folder("qwen_vl").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "modeling_qwenvl.py").write_text("")
    assert plan_upload(tmp_path).refused == ("modeling_qwenvl.py",)
    assert "modeling_qwenvl.py" in plan_upload(tmp_path, has_code=True).files
