"""Recipes of the stages grpo, rloo and ppo: what they say reaches the trainers, what cannot be is refused."""

import json

import pytest
from PIL import Image

from trainers.recipe_reading import dump_recipe, load_recipe
from trainers.recipe_rollouts import rollout_arguments
from trainers.train import build_trainer, train

SECTION = """
  rewards:
    - {name: box_iou}
    - {name: overlong, weight: 0.5, final_weight: 0.0, settings: {longest: 6, soft: 3}}
  group: 2
  longest: 5
"""


@pytest.fixture
def recipe_file(tmp_path, model_folder):
    lines = []
    for number in range(4):
        Image.new("RGB", (8, 8), (60 * number,) * 3).save(tmp_path / f"{number}.png")
        row = {"image": f"{number}.png", "problem": "Where?", "solution": [1, 1, 5, 7]}
        lines.append(json.dumps(row))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")

    def _write(stage, more=""):
        path = tmp_path / f"{stage}.yaml"
        path.write_text(
            f"name: {stage}\nstage: {stage}\n"
            f"model: {{path: {model_folder('qwen_vl')}, dtype: float32}}\n"
            "parts: {language_model: {train: full}}\n"
            f"sampling:{SECTION}{more}"
            "optimizer: {learning_rate: 1e-3, max_steps: 2, global_batch_size: 4, weight_decay: 0.0}\n"
            f"data: {{train: [{{path: {tmp_path}/rows.jsonl}}], picture_side: 8, max_length: 128, workers: 0}}\n"
            "hardware: {per_device_batch_size: 2, precision: float32}\n"
            f"run: {{output_dir: {tmp_path}/run_{stage}, log_every: 1}}\n"
        )
        return path

    return _write


@pytest.mark.parametrize("stage", ["grpo", "rloo", "ppo"])
def test_a_recipe_trains_saves_and_shows_completions(recipe_file, tmp_path, stage):
    recipe = load_recipe(recipe_file(stage))
    final = train(recipe)
    run = tmp_path / f"run_{stage}"
    assert (final / "model.safetensors").is_file()
    assert (final / "processor_config.json").is_file()
    assert (run / "completions" / "step-000002.html").is_file()
    assert load_recipe(run / "recipe.yaml") == recipe


def test_what_the_section_says_reaches_the_trainer(recipe_file):
    more = "  temperature: 0.7\n  top_p: 0.9\n  top_k: 7\n  beta: 0.2\n  clip: 0.3\n  passes: 2\n  show: false\n"
    more += "  values: {gamma: 0.9, lam: 0.8, coefficient: 0.3, kl_target: 5.0}\n"
    trainer = build_trainer(load_recipe(recipe_file("ppo", more)))
    args = trainer.args
    assert (args.num_generations, args.max_completion_length, args.temperature, args.top_p) == (2, 5, 0.7, 0.9)
    assert (args.top_k, args.beta, args.epsilon, args.num_iterations, args.log_completions) == (7, 0.2, 0.3, 2, False)
    assert (args.gamma, args.lam, args.value_coefficient, args.kl_target) == (0.9, 0.8, 0.3, 5.0)
    assert trainer.max_length == 128
    assert [(term.name, term.weight, term.final_weight) for term in trainer.reward_terms] == [
        ("box_iou", 1.0, None),
        ("overlong", 0.5, 0.0),
    ]
    assert trainer.reward_terms[1].settings == {"longest": 6, "soft": 3}


def test_the_loss_of_grpo_is_chosen_by_name(recipe_file):
    assert rollout_arguments(load_recipe(recipe_file("grpo", "  loss: dr_grpo\n"))).loss_type == "dr_grpo"


def test_a_prompt_without_room_for_its_completion_is_refused_by_its_line(recipe_file):
    trainer = build_trainer(load_recipe(recipe_file("grpo"), ["data.max_length=20"]))
    with pytest.raises(ValueError, match=r"rows\.jsonl:\d: \d+ tokens of prompt and 5 of a completion are more than"):
        trainer.train()


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("grpo", "sampling.rewards=[{name: box_uio}]", "unknown reward 'box_uio': did you mean 'box_iou'"),
        ("grpo", "sampling.rewards=[{name: overlong, settings: {longst: 3}}]", "did you mean 'longest'"),
        ("grpo", "sampling.rewards=[{name: exact}, {name: exact}]", "names a reward twice"),
        ("grpo", "sampling=null", "sampling null: the section belongs to"),
        ("grpo", "stage=sft", "sampling given: the section belongs to"),
        ("grpo", "sampling.group=3", "do not hold whole groups of 3"),
        ("rloo", "sampling.loss=grpo", "belongs to stage grpo"),
        ("grpo", "sampling.values={}", "belongs to stage ppo"),
        ("grpo", "model.attention=flash_attention_2", "tree needs a dense mask"),
        ("grpo", "data.packing=true", "stage grpo has no data.packing"),
        ("grpo", "optimizer.z_loss=0.1", "belong to next-token losses"),
        ("grpo", "data.too_long=drop", "set it to raise"),
        ("grpo", "sampling.temprature=1.0", "temperature"),
    ],
)
def test_what_contradicts_itself_is_refused(recipe_file, stage, override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe_file(stage), [override])


def test_the_recipe_for_24_gb_is_sound_and_reads_back(tmp_path):
    recipe = load_recipe("qlora_grpo_24gb")
    assert recipe.sampling.group == 8
    path = tmp_path / "again.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe
