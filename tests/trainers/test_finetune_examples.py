"""Every script and recipe of examples/finetune, from rows on disk to an answer of the model that was read again.

Tiny random models of the real classes; real pictures, and real videos that the test writes. What an untrained model
answers means nothing: that it is asked with the trained resolution, and that the right weights moved, does.
"""

import json
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, GenerationMixin

from processing.processing_families import load_processor
from trainers.families import find_parts
from trainers.recipe_reading import load_recipe

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "finetune"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
LATER = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
TINY = [
    "optimizer.epochs=null",
    "optimizer.max_steps=2",
    "optimizer.global_batch_size=2",
    "optimizer.learning_rate=1e-2",
    "hardware.per_device_batch_size=2",
    "data.picture_side=16",
    "data.max_length=700",
    "data.workers=0",
    # bfloat16 is slow on CPUs.
    "hardware.precision=float32",
    "model.dtype=float32",
]


@pytest.fixture
def rows(tmp_path, write_video):
    """Writes rows of each kind beside their pictures; rows("grounding") -> the path of the .jsonl."""

    def page(number):
        picture = Image.new("RGB", (40, 30), "white")
        box = [4 + number, 5, 20 + number, 17]
        ImageDraw.Draw(picture).rectangle(box, fill="red")
        picture.save(tmp_path / f"{number}.png")
        return f"{number}.png", box

    def of(kind, number):
        name, (x1, y1, x2, y2) = page(number)
        other, _ = page(number + 10)
        if kind == "grounding":
            return {"image": name, "bbox": [x1, y1, x2 - x1, y2 - y1], "sentence": "the red box"}
        if kind == "documents":
            html = f'<body><p data-bbox="{x1} {y1} {x2} {y2}">red</p></body>'
            return {"image": name, "prefix": "QwenVL HTML", "suffix": html}
        if kind == "several_pictures":
            return {"images": [name, other], "prefix": "What has changed?", "suffix": "The box moved right."}
        if kind == "video":
            video = write_video(tmp_path / f"{number}.mp4", num_frames=6 + number)
            return {"video": Path(video).name, "prefix": "What happens?", "suffix": "It brightens."}
        if kind == "text":
            return {"prefix": f"{number} + 1?", "suffix": str(number + 1)}
        return {"image": name, "prefix": "Where is the red box?", "suffix": "Here."}

    def write(kind):
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(of(kind, number)) + "\n" for number in range(4)))
        return str(path)

    return write


@pytest.fixture
def run(model_folder, tmp_path, monkeypatch):
    """run("lora", "qwen2_vl", rows, ...) -> what `main` of the script returns; the run is in tmp_path/run."""

    generate = GenerationMixin.generate

    def _run(script, family, *arguments, overrides=()):
        # Long answers of a random model are only slow.
        monkeypatch.setattr(GenerationMixin, "generate", lambda *a, **k: generate(*a, **k | {"max_new_tokens": 3}))
        settings = [f"model.path={model_folder(family)}", f"run.output_dir={tmp_path / 'run'}", *TINY, *overrides]
        if script != "full":
            settings.append("lora.rank=2")
        return runpy.run_path(str(FOLDER / f"{script}.py"))["main"](*arguments, *settings)

    return _run


def changed_parts(before, after):
    part_of = find_parts(before).part_of
    moved = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    return {part_of[name] for name in moved}


@pytest.mark.slow
@pytest.mark.parametrize("family", LATER)
@pytest.mark.parametrize("script", ["full", "lora", "qlora", "dora"])
def test_a_way_of_tuning_goes_from_rows_to_an_answer(run, rows, script, family, model_folder, tmp_path):
    overrides = ["optimizer.states=8bit"] if script == "qlora" else []  # paged states need a GPU
    answer = run(script, family, rows("plain"), str(tmp_path / "0.png"), "Where?", overrides=overrides)
    assert isinstance(answer, str)
    before = AutoModelForImageTextToText.from_pretrained(model_folder(family))
    if script in ("dora", "qlora", "full"):
        final = tmp_path / "run" / ("final" if script == "full" else "merged")
        after = AutoModelForImageTextToText.from_pretrained(final)
        trained = {"adapter", "language_model", *(["embeddings"] if script == "full" else [])}
        assert changed_parts(before, after) == trained
    assert load_processor(tmp_path / "run" / "final").pixel_limits["max_pixels"] == 16 * 16
    assert (tmp_path / "run" / "final" / "chat_template.jinja").is_file()
    if script != "full":
        settings = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
        assert settings["use_dora"] is (script == "dora")


@pytest.mark.slow
@pytest.mark.parametrize("family", LATER)
def test_grounding_goes_from_refcoco_rows_to_a_drawn_answer(run, rows, tmp_path, family):
    run("grounding", family, rows("grounding"), str(tmp_path / "0.png"), "the red box")
    with Image.open(tmp_path / "run" / "answer.png") as drawn:
        assert drawn.size >= (40, 30)


@pytest.mark.slow
def test_documents_go_from_prefix_suffix_rows_to_html(run, rows, tmp_path):
    run("documents", "qwen2_5_vl", rows("documents"), str(tmp_path / "0.png"))


@pytest.mark.slow
def test_several_pictures_go_from_rows_to_an_answer_about_two(run, rows, tmp_path):
    pictures = [str(tmp_path / name) for name in ("0.png", "10.png")]
    run("several_pictures", "qwen2_5_vl", rows("several_pictures"), *pictures)


@pytest.mark.slow
@pytest.mark.parametrize("family", LATER)
def test_videos_go_from_rows_to_an_answer_and_their_limits_are_saved(run, rows, tmp_path, family, write_video):
    clip = write_video(tmp_path / "new.mp4", num_frames=12)
    limits = ["data.video_side=8", "data.video_fps=3.0", "data.video_frames=6"]
    run("video", family, rows("video"), clip, "What happens?", overrides=limits)
    saved = load_processor(tmp_path / "run" / "merged").video_processor
    assert (saved.fps, saved.max_frames) == (3.0, 6)


@pytest.mark.slow
def test_text_is_mixed_with_pictures_and_answered_without_any(run, rows):
    run("with_text", "qwen2_5_vl", rows("plain"), rows("text"), "1 + 1?")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_has_at_most_forty_lines_and_a_recipe_of_its_name(script):
    assert len((FOLDER / f"{script}.py").read_text().splitlines()) <= 40
    recipe = load_recipe(FOLDER / f"{script}.yaml")
    assert recipe.run.output_dir == f"runs/{script}"


def test_every_script_is_run_by_a_test():
    assert set(SCRIPTS) == {"full", "lora", "qlora", "dora", "grounding", "documents", "several_pictures", "video",
                            "with_text"}  # fmt: skip
