"""Recipes of the stage dpo: from YAML to trained weights, and what they refuse."""

import json

import pytest
import torch
from PIL import Image

from processing.rows import RowError
from trainers.dpo import QwenVLDPOTrainer
from trainers.estimate import estimate
from trainers.families import unwrap
from trainers.recipe_dpo import dpo_arguments
from trainers.recipe_reading import dump_recipe, load_recipe
from trainers.train import build_trainer, train

SMALL = [
    "model.quantization=none",
    "model.dtype=float32",
    "hardware.precision=float32",
    "hardware.memory_gib=1.0",
    "optimizer.global_batch_size=2",
    "optimizer.epochs=null",
    "optimizer.max_steps=2",
    "optimizer.warmup_steps=0.0",
    "data.picture_side=8",
    "data.max_length=200",
    "data.workers=0",
    "run.log_every=1",
    "run.save_every=1",
]


@pytest.fixture
def preference_file(tmp_path):
    """A .jsonl of 4 rows with a picture, a right and a wrong answer."""
    lines = []
    for number in range(4):
        Image.new("RGB", (8, 8), (60 * number,) * 3).save(tmp_path / f"{number}.png")
        row = {"images": [f"{number}.png"], "prompt": "How bright?", "chosen": f"{60 * number}", "rejected": "green"}
        lines.append(json.dumps(row))
    path = tmp_path / "preferences.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def settings(model_folder, preference_file, tmp_path):
    def _settings(*more, family="qwen2_5_vl"):
        data = f"data.train=[{{path: {preference_file}}}]"
        return [*SMALL, f"model.path={model_folder(family)}", data, f"run.output_dir={tmp_path / 'run'}", *more]

    return _settings


# TRL switches checkpointing off and on around the reference by its old name.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*able:FutureWarning")
@pytest.mark.parametrize(
    "family", ["qwen_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2_5_vl", "clip_qwen2"))]
)
def test_a_recipe_trains_lora_by_dpo_resumes_and_keeps_what_it_was(settings, family, tmp_path):
    recipe = load_recipe("qlora_dpo_24gb", settings(family=family))
    final = train(recipe)
    assert (final / "adapter_model.safetensors").is_file()
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe
    assert "losses:\n  - sigmoid" in dump_recipe(recipe)
    longer = load_recipe("qlora_dpo_24gb", settings("optimizer.max_steps=3", family=family))
    train(longer, resume=True)
    log = json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "rewards/margins" in entry] == [1, 2, 3]


def test_the_section_reaches_the_trainer(settings):
    more = [
        "preference.losses=[sigmoid, bco_pair, sft]",
        "preference.loss_weights=[0.8, 0.2, 1.0]",
        "preference.beta=0.2",
        "preference.layout=rows",
        "preference.ld_alpha=0.5",
        "preference.reference=adapter_copy",
        "parts.adapter={train: full, learning_rate: 1e-3}",
    ]
    trainer = build_trainer(load_recipe("qlora_dpo_24gb", settings(*more)))
    assert isinstance(trainer, QwenVLDPOTrainer)
    assert trainer.loss_types == ["sigmoid", "bco_pair", "sft"]
    assert trainer.loss_weights == [0.8, 0.2, 1.0]
    assert (trainer.beta, trainer.ld_alpha, trainer.reference) == (0.2, 0.5, "adapter_copy")
    assert trainer.args.completion_layout == "rows"
    rates = {group["lr"] for group in trainer.create_optimizer().param_groups}
    assert rates == {5e-6, 1e-3}
    assert {p.dtype for p in unwrap(trainer.model).parameters()} == {torch.float32}


def test_checkpointing_is_of_the_parts_that_ask_for_it():
    assert not dpo_arguments(
        load_recipe("qlora_dpo_24gb", ["hardware.precision=float32", "model.dtype=float32"])
    ).activation_checkpointing


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["preference=null"], "stage dpo and preference null"),
        (["stage=sft"], "stage sft and preference given"),
        (["lora.dropout=0.05"], "set lora.dropout to 0.0"),
        (["optimizer.label_smoothing=0.1"], "belong to next-token losses"),
        (["data.packing=true"], "no data.packing"),
        (["run.feature_cache_dir=x"], "not for stage dpo"),
        (["run.answers=3", "run.evaluate_every=1", "data.validation=[{path: x.jsonl}]"], "rows of stage dpo have not"),
        (["model.attention=flash_attention_2"], "needs a dense mask"),
        (["preference.losses=[dpo]"], "preference.losses.0 is 'dpo'"),
        (["preference.bta=0.1"], "Nearest: preference.beta"),
        (["preference.losses=[sigmoid, sft]"], "give one each"),
        (["preference.label_smoothing=0.1"], "is read by aot"),
        (["preference.losses=[exo_pair]"], "needs preference.label_smoothing above 0"),
        (["preference.divergence=forward_kl", "preference.losses=[bco_pair]"], "forward_kl goes with"),
        (["preference.alpha=0.5"], "give both or neither"),
        (["preference.weighted=true", "preference.losses=[aot]"], "which sort the pairs"),
        (["preference.reference=cache"], "reference_cache_dir go together"),
        (["preference.losses=[]"], "twice or none"),
    ],
)
def test_what_no_run_could_keep_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("qlora_dpo_24gb", overrides)


def test_rows_of_another_kind_are_refused_by_file_and_line(settings, tmp_path, rows_file):
    with pytest.raises(RowError, match=r"rows.jsonl:1: preference training needs rows with chosen and rejected"):
        build_trainer(load_recipe("qlora_dpo_24gb", settings(f"data.train=[{{path: {rows_file}}}]")))


def test_too_long_pairs_are_left_out_or_refused(settings, preference_file, caplog):
    row = json.loads(preference_file.read_text().splitlines()[0]) | {"chosen": "long " * 60}
    with preference_file.open("a") as file:
        file.write(json.dumps(row) + "\n")
    trainer = build_trainer(load_recipe("qlora_dpo_24gb", settings("data.too_long=drop")))
    assert len(trainer.train_dataset) == 4
    assert "1 of 5 rows are too long" in caplog.text
    trainer = build_trainer(load_recipe("qlora_dpo_24gb", settings()))
    with pytest.raises(RowError, match=r"preferences.jsonl:5.*max_length is 200"):
        trainer.data_collator([{"row": 4}])


def test_the_estimate_says_that_it_has_none_for_dpo():
    with pytest.raises(ValueError, match="no estimate for the stage dpo"):
        estimate(load_recipe("qlora_dpo_24gb"))
