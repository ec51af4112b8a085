"""What is saved here is an ordinary model: a fresh process that never imports this package gets the same numbers.

One process reads every folder (importing torch is what takes time): weights trained whole, an adapter alone put onto
its base by PEFT, and the merged model, of three families; with a picture, and with frames of a video.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from processing.example import Example
from processing.processing_families import load_processor
from processing.supervision import Supervision
from processing.videos import open_clip
from trainers.merge import merge
from trainers.recipe_reading import load_recipe
from trainers.train import train

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
KINDS = ("whole", "adapter", "merged")
QUESTION = "How bright?"

PLAIN = """
import json, sys
import numpy as np, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

task = json.load(open(sys.argv[1]))
for case in task["cases"]:
    processor = AutoProcessor.from_pretrained(case["processor"])
    model = AutoModelForImageTextToText.from_pretrained(case["base"], dtype=torch.float32)
    if case["adapter"]:
        model = PeftModel.from_pretrained(model, case["adapter"])
    model.eval()
    found = {}
    for name in ("picture", "video"):
        part = {"type": "image", "path": task["picture"]} if name == "picture" else {"type": "video"}
        content = [part, {"type": "text", "text": task["question"]}]
        messages = [{"role": "user", "content": content}]
        if name == "picture":
            inputs = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        else:
            inputs = processor(
                text=processor.apply_chat_template(messages, add_generation_prompt=True),
                videos=[torch.from_numpy(np.load(task["frames"]))],
                video_metadata=[case["metadata"]],
                do_sample_frames=False,
                return_tensors="pt",
            )
        with torch.no_grad():
            found[name + ".logits"] = model(**inputs).logits
        found[name + ".input_ids"] = inputs["input_ids"]
        key = "pixel_values" if name == "picture" else "pixel_values_videos"
        found[name + ".pixels"] = inputs[key]
        found[name + ".answer"] = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    save_file({key: value.contiguous() for key, value in found.items()}, case["output"])
ours = {"modeling_qwenvl", "processing", "trainers", "hub_upload"}
print(json.dumps(sorted(ours & {name.split(".")[0] for name in sys.modules})))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def picture(folder):
    path = folder / "picture.png"
    Image.linear_gradient("L").resize((30, 20)).convert("RGB").save(path)
    return str(path)


@pytest.fixture(scope="module")
def frames(folder):
    """Six frames of 12 x 16 pixels, (T, 3, H, W), as a file of numbers and as pictures."""
    values = np.random.default_rng(0).integers(0, 256, (6, 12, 16, 3), np.uint8)
    np.save(folder / "frames.npy", values.transpose(0, 3, 1, 2))
    return [Image.fromarray(value) for value in values]


@pytest.fixture(scope="module")
def saved(folder, model_folder, picture):
    """(family, kind) -> {"base", "adapter", "processor"}: folders that `train` and `merge` wrote."""
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"image": picture, "prefix": QUESTION, "suffix": "Grey."}) + "\n")
    cases = {}
    for family in FAMILIES:
        settings = [
            f"model.path={model_folder(family)}", f"data.train=[{{path: {rows}}}]", "data.picture_side=12",
            "data.video_side=8", "optimizer.max_steps=2", "optimizer.global_batch_size=1",
            "optimizer.learning_rate=1e-2", "hardware.per_device_batch_size=1",
        ]  # fmt: skip
        whole = train(load_recipe("cpu_demo", [*settings, f"run.output_dir={folder / family / 'whole'}"]))
        lora = ["parts={adapter: {train: full}, language_model: {train: lora}, embeddings: {train: frozen}}",
                "lora={rank: 2}", f"run.output_dir={folder / family / 'lora'}"]  # fmt: skip
        adapter = train(load_recipe("cpu_demo", [*settings, *lora]))
        merged = folder / family / "merged"
        merge(adapter, merged)
        base = str(model_folder(family))
        cases[family, "whole"] = {"base": str(whole), "adapter": None, "processor": str(whole)}
        cases[family, "adapter"] = {"base": base, "adapter": str(adapter), "processor": str(adapter)}
        cases[family, "merged"] = {"base": str(merged), "adapter": None, "processor": str(merged)}
    return cases


@pytest.fixture(scope="module")
def in_a_fresh_process(folder, saved, picture, frames):
    """(family, kind) -> the tensors that the plain process found."""
    cases = []
    for (family, kind), case in saved.items():
        processor = load_processor(case["processor"])
        metadata = open_clip({"type": "video", "video": frames}).metadata(processor.video_processor)
        cases.append({**case, "metadata": metadata, "output": str(folder / f"{family}-{kind}.safetensors")})
    task = {"cases": cases, "picture": picture, "question": QUESTION, "frames": str(folder / "frames.npy")}
    (folder / "task.json").write_text(json.dumps(task))
    (folder / "plain.py").write_text(PLAIN)
    done = subprocess.run(
        [sys.executable, "plain.py", "task.json"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [], "the plain process imported this package"
    return {key: load_file(case["output"]) for key, case in zip(saved, cases, strict=True)}


def load(case):
    model = AutoModelForImageTextToText.from_pretrained(case["base"], dtype=torch.float32)
    return (PeftModel.from_pretrained(model, case["adapter"]) if case["adapter"] else model).eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_process_gets_the_same_ids_pixels_logits_and_answer(
    saved, in_a_fresh_process, picture, frames, family, kind
):
    case, plain = saved[family, kind], in_a_fresh_process[family, kind]
    processor, model = load_processor(case["processor"]), load(case)
    parts = {"picture": {"type": "image", "image": picture}, "video": {"type": "video", "video": frames}}
    for name, part in parts.items():
        messages = [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True,
            processor_kwargs={"return_tensors": "pt"},
        )  # fmt: skip
        assert torch.equal(plain[f"{name}.input_ids"], inputs["input_ids"])
        pixels = inputs["pixel_values" if name == "picture" else "pixel_values_videos"]
        assert torch.equal(plain[f"{name}.pixels"], pixels)
        with torch.no_grad():
            logits = model(**inputs).logits
        torch.testing.assert_close(plain[f"{name}.logits"], logits, atol=1e-6, rtol=0)
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(plain[f"{name}.answer"], answer)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_resolution_of_training_is_the_one_that_the_plain_process_uses(saved, in_a_fresh_process, picture, family):
    """data.picture_side is 12, the picture 30 x 20: 8 x 12 pixels, 24 patches; the base's own limit is 8 x 8."""
    question = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]}
    example = Example([question, {"role": "assistant", "content": "Grey."}])
    trained_on = Supervision(load_processor(saved[family, "whole"]["processor"]))(example)
    assert trained_on.vision["image_grid_thw"].tolist() == [[1, 4, 6]]
    for kind in KINDS:
        assert torch.equal(in_a_fresh_process[family, kind]["picture.pixels"], trained_on.vision["pixel_values"])
    prompt = in_a_fresh_process[family, "whole"]["picture.input_ids"][0]
    assert trained_on.input_ids[: len(prompt)].tolist() == prompt.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_alone_and_merged_answer_alike_and_not_like_the_base(saved, in_a_fresh_process, family, model_folder):
    alone, merged = (in_a_fresh_process[family, kind]["picture.logits"] for kind in ("adapter", "merged"))
    torch.testing.assert_close(alone, merged, atol=2e-5, rtol=0)
    whole = in_a_fresh_process[family, "whole"]["picture.logits"]
    assert not torch.allclose(whole, merged, atol=1e-3)
    base = saved[family, "adapter"]["base"]
    configs = [
        AutoModelForImageTextToText.from_pretrained(path).generation_config.to_dict()
        for path in (base, saved[family, "merged"]["base"])
    ]
    assert configs[0] == configs[1]
