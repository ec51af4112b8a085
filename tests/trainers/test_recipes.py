"""Recipes: the paper's numbers, overrides from YAML, and refusals that name the key."""

from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from trainers.recipe_reading import dump_recipe, load_recipe, recipe_names
from trainers.recipes import OptimizerSection, PartsSection, Recipe, RunSection, TowerSection


@pytest.mark.parametrize(
    ("name", "peak", "lowest", "warmup", "steps", "batch", "side", "length", "decay", "trained"),
    [
        ("paper_pretrain", 2e-4, 1e-6, 500, 50_000, 30_720, 224, 512, 0.95, {"tower", "adapter"}),
        ("paper_multitask", 5e-5, 1e-5, 400, 19_000, 4_096, 448, 2048, 0.95, {"tower", "adapter", "language_model"}),
        ("paper_sft", 1e-5, 1e-6, 3_000, 8_000, 128, 448, 2048, 1.0, {"adapter", "language_model"}),
    ],
)
def test_the_paper_s_recipes_have_the_numbers_of_its_table_8(
    name, peak, lowest, warmup, steps, batch, side, length, decay, trained
):
    recipe = load_recipe(name)
    optimizer = recipe.optimizer
    assert (optimizer.learning_rate, optimizer.min_learning_rate, optimizer.schedule) == (peak, lowest, "cosine")
    assert (optimizer.warmup_steps, optimizer.max_steps, optimizer.global_batch_size) == (warmup, steps, batch)
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.98, 1e-6)
    assert (optimizer.weight_decay, optimizer.max_grad_norm) == (0.05, 1.0)
    assert (recipe.data.picture_side, recipe.data.max_length) == (side, length)
    assert recipe.parts.tower.layer_decay == decay
    assert set(recipe.trained_parts) - {"embeddings"} == trained
    assert recipe.hardware.precision == "bfloat16"
    assert recipe.lora is None


def test_every_recipe_of_the_package_is_read_and_written_back_equal(tmp_path):
    assert len(recipe_names()) == 10
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.name == name
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_recipe(recipe))
        assert load_recipe(path) == recipe


def test_a_file_overrides_its_base_leaf_by_leaf_and_set_overrides_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: paper_sft\noptimizer: {learning_rate: 3e-6, max_steps: 4000}\nrun: {seed: 7}\n")
    recipe = load_recipe(path, ["optimizer.max_steps=5000", "data.train=[{path: a.jsonl, weight: 2}]"])
    paper = load_recipe("paper_sft")
    assert recipe.name == "mine"
    assert (recipe.optimizer.learning_rate, recipe.optimizer.max_steps, recipe.run.seed) == (3e-6, 5000, 7)
    assert recipe.optimizer.warmup_steps == paper.optimizer.warmup_steps == 3000
    assert [(file.path, file.weight) for file in recipe.data.train] == [("a.jsonl", 2.0)]


def test_a_base_is_found_beside_the_file_that_names_it(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "first.yaml").write_text("base: cpu_demo\nrun: {seed: 11}\n")
    (tmp_path / "second.yaml").write_text("base: below/first.yaml\nrun: {log_every: 13}\n")
    recipe = load_recipe(tmp_path / "second.yaml")
    assert (recipe.run.seed, recipe.run.log_every) == (11, 13)


def test_recipes_that_name_each_other_as_base_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ValueError, match=r"a\.yaml is its own base: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        load_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "1E-5", ".00001", "0.00001"])
def test_a_number_may_be_written_in_every_usual_way(text):
    assert load_recipe("paper_sft", ["optimizer.min_learning_rate=1e-6", f"optimizer.learning_rate={text}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.learning_rte=1",
            r"optimizer\.learning_rte is not a key of a recipe\. Nearest: optimizer\.learn",
        ),
        ("optimiser.learning_rate=1", r"optimiser is not a key of a recipe\. Nearest: optimizer\."),
        ("data.train=[{path: a, wieght: 1}]", r"data\.train\.0\.wieght is not a key.*Nearest: data\.train\.weight"),
        (
            "parts.adapter.layer_decay=0.9",
            r"parts\.adapter\.layer_decay is not a key.*Nearest: parts\.tower\.layer",
        ),
        ("lora.alhpa=1", r"lora\.alhpa is not a key of a recipe\. Nearest: lora\.alpha"),
        ("zzz=1", r"zzz is not a key of a recipe\. Known: name, stage, model, model\.path"),
        ("optimizer.learning_rate=fast", r"optimizer\.learning_rate is 'fast': input should be a valid number"),
        ("optimizer.learning_rate='1e-5'", r"optimizer\.learning_rate is '1e-5': input should be a valid number"),
        ("optimizer.learning_rate=-1.0", r"optimizer\.learning_rate is -1\.0: input should be greater than 0"),
        ("optimizer.learning_rate=true", r"optimizer\.learning_rate is True: input should be a valid number"),
        ("run.seed=1.0", r"run\.seed is 1\.0: input should be a valid integer"),
        ("data.packing=1", r"data\.packing is 1: input should be a valid boolean"),
        ("lora.dropout=1.0", r"lora\.dropout is 1\.0: input should be less than 1"),
        ("model.quantization=int4", r"model\.quantization is 'int4': input should be 'none' or 'nf4'"),
        ("data=null", r"data is None: input should be an object"),
        ("optimizer.learning_rate", r"not of the form section\.key=value"),
        ("optimizer={a: 1, a: 2}", r"the key a is given twice"),
        ("optimizer={a: 1", r"--set .*not valid YAML"),
    ],
)
def test_a_key_or_value_that_does_not_fit_is_refused_by_name(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("qlora_24gb", [override])


def test_an_unknown_recipe_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"There is no recipe paper_stf.*Nearest: paper_sft"):
        load_recipe("paper_stf")


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ValueError, match=r"data\.packing is 1.*\n.*run\.sed is not a key") as caught:
        load_recipe("paper_sft", ["run.sed=1", "data.packing=1"])
    assert str(caught.value).count("paper_sft: ") == 2


@pytest.mark.parametrize(
    ("base", "overrides", "message"),
    [
        ("qlora_24gb", ["parts.language_model.train=full", "lora=null"], "4-bit weights cannot learn"),
        ("qlora_24gb", ["parts.language_model={train: frozen}", "lora=null"], "only trained beside LoRA"),
        ("qlora_24gb", ["lora=null"], "parts language_model train through LoRA, but lora is null"),
        ("paper_sft", ["lora={rank: 2}"], "lora is given, but no part says train: lora"),
        ("paper_sft", ["parts={adapter: {train: frozen}, language_model: {train: frozen}, "
                       "embeddings: {train: frozen}}"], "nothing learns"),
        ("paper_sft", ["parts.tower.learning_rate=1e-6"], "parts.tower is frozen, but has a learning_rate"),
        ("paper_sft", ["parts.tower.layer_decay=0.9"], "parts.tower is frozen, but has a learning_rate, a layer"),
        ("paper_sft", ["parts.tower.last_blocks=2"], "but has a learning_rate, a layer_decay or last_blocks"),
        ("qlora_24gb", ["parts.adapter.train=frozen"], "parts.adapter is frozen, but has a learning_rate"),
        ("cpu_demo", ["parts.embeddings.train=new_tokens", "model.new_tokens=[a]"], "new_tokens, which needs LoRA"),
        ("paper_sft", ["parts.tower.checkpointing=true"], "a frozen tower keeps nothing to recompute"),
        ("qlora_24gb", ["parts.embeddings.learning_rate=1e-5"], "parts.embeddings is frozen, but has a learning"),
        ("qlora_24gb", ["parts.embeddings.train=new_tokens"], "model.new_tokens is empty"),
        ("qlora_24gb", ["model.new_tokens=['<a>']"], "would stay at their random start"),
        ("qlora_24gb", ["parts.tower.train=full"], "tower cannot be trained whole next to LoRA"),
        ("qlora_24gb", ["parts={language_model: {train: full}, adapter: {train: lora}}", "model.quantization=none"],
         "language model cannot be trained whole next to LoRA"),
        ("paper_sft", ["optimizer.min_learning_rate=1e-4"], "0.0001 is above the learning_rate 1e-05"),
        ("paper_sft", ["optimizer.schedule=linear"], "belongs to the cosine, but the schedule is linear"),
        ("paper_sft", ["optimizer.epochs=1.0"], r"give one of optimizer.max_steps \(8000\) and .*epochs \(1.0"),
        ("paper_sft", ["optimizer.max_steps=null"], r"give one of optimizer.max_steps \(None\)"),
        ("paper_sft", ["optimizer.warmup_steps=8000"], "warmup_steps 8000 leaves nothing of max_steps 8000"),
        ("paper_sft", ["optimizer.warmup_steps=2.5"], "2.5 is neither a whole number nor a share"),
        ("paper_sft", ["hardware.devices=3"], r"128 is not a multiple of 3 device\(s\) x .*per_device_batch_size 1"),
        ("paper_sft", ["hardware.sharding=full"], "sharding over one device is nothing"),
        ("qlora_24gb", ["hardware={sharding: full, devices: 2}"], "4-bit weights are not sharded here"),
        ("qlora_24gb", ["hardware.precision=float32"], "make them equal, or set precision to bfloat16"),
        ("qlora_24gb", ["data.train=[{path: a, weight: 2}, {path: b}]"], "a mixture has no epochs"),
        ("paper_multitask", ["data.train=[{path: a, weight: 2}, {path: b}]"], "which data.packing does not know"),
        ("paper_sft", ["run.evaluate_every=5"], "data.validation is empty"),
        ("paper_sft", ["run.answers=5"], "run.evaluate_every is null"),
        ("paper_multitask", ["run.feature_cache_dir=features"], "parts.tower learns: freeze it"),
    ],
)  # fmt: skip
def test_values_that_contradict_each_other_are_refused(base, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(base, overrides)


def test_a_recipe_made_in_python_is_checked_like_one_from_a_file():
    recipe = load_recipe("paper_sft")
    with pytest.raises(ValueError, match="valid number"):
        replace(recipe.optimizer, learning_rate="1e-5")
    with pytest.raises(ValueError, match="nothing learns"):
        Recipe(name="x", stage="sft", optimizer=OptimizerSection(max_steps=1), parts=PartsSection())


def test_the_global_batch_is_devices_times_rows_times_accumulation():
    recipe = load_recipe("paper_multitask", ["hardware={devices: 16, per_device_batch_size: 32}"])
    assert recipe.accumulation_steps == 8  # as the paper's 4096


def test_lora_parts_are_those_that_say_lora():
    recipe = load_recipe("qlora_24gb", ["parts.tower={train: lora, learning_rate: 2e-5}"])
    assert recipe.lora_parts == ("tower", "language_model")
    assert recipe.parts.tower == TowerSection(train="lora", learning_rate=2e-5)


def test_a_run_reports_to_what_transformers_knows():
    names = set(get_args(get_type_hints(RunSection)["report_to"]))
    assert {"none", "tensorboard", "wandb", "mlflow"} <= names <= {"none", *INTEGRATION_TO_CALLBACK}
