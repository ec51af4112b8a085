"""A RunRecord -> the model card: what the model is, how it was made and measured, and code that runs."""

from collections.abc import Sequence
from typing import Literal

from huggingface_hub import ModelCard, ModelCardData

from processing.coordinates import Convention
from trainers.publish_record import DataSource, RunRecord

Kind = Literal["model", "adapter", "processor"]
# Licences that the Hub knows by a short name; any other is declared as "other" with its name.
HUB_LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "openrail")
MARK = "<!-- Written by qwenvl from the training run. Delete this line to keep your own edits on the next upload. -->"

_PROCESSOR_SAMPLE = """\
from PIL import Image
{imports}
name = "{name}"
processor = AutoProcessor.from_pretrained(name{trust})
"""
_LOADING = {
    "processor": "",
    "model": "model = AutoModelForImageTextToText.from_pretrained(name{trust})\n",
    "adapter": 'base = "{base}"\n'
    "model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), name)\n",
}
_ENCODING = """\
content = [{{"type": "image", "image": Image.open("picture.png")}}, {{"type": "text", "text": "{question}"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],{template}
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
"""
_ANSWERING = """\
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])[0])
"""


def code_sample(
    kind: Kind, name: str, base: str | None, is_native: bool, has_code: bool, is_plain: bool, question: str
) -> str:
    """Python that loads `name` and asks it about picture.png.

    is_native: of this package's own family, whose classes transformers does not have. has_code: they lie in the
    repository. is_plain: the model learned prompts and answers one after the other, without roles.
    """
    classes = ["AutoProcessor"] if kind == "processor" else ["AutoModelForImageTextToText", "AutoProcessor"]
    imports = f"from transformers import {', '.join(classes)}\n"
    if kind == "adapter":
        imports = "from peft import PeftModel\n" + imports
    if is_native and not has_code:
        imports += "\nimport modeling_qwenvl, processing  # of the package qwenvl: makes transformers know Qwen-VL\n"
    trust = ", trust_remote_code=True" if has_code else ""
    template = '\n    chat_template="plain",' if is_plain and is_native else ""
    text = _PROCESSOR_SAMPLE + _LOADING[kind] + "\n" + _ENCODING + ("" if kind == "processor" else _ANSWERING)
    if kind == "processor":
        text += "print({{key: value.shape for key, value in inputs.items()}})\n"
    return text.format(imports=imports, name=name, base=base, trust=trust, template=template, question=question)


def box_convention(convention: Convention) -> str:
    """How the model writes places, in words."""
    how = {
        "tags": "`<ref>the dog</ref><box>(x1,y1),(x2,y2)</box>`",
        "special_tokens": "`<|object_ref_start|>the dog<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>`",
        "json": '`[{"bbox_2d": [x1, y1, x2, y2], "label": "the dog"}]`',
    }[convention.text]
    if convention.is_normalized:
        numbers = (
            f"whole numbers from 0 to {convention.last}: a side of the picture is {convention.steps} units long, "
            "whatever its size in pixels"
        )
    else:
        numbers = "pixels of the picture as the model sees it, after resizing"
    return (
        f"Convention `{convention.name}`: {how}; {numbers}. x runs to the right, y downwards, the first point is the "
        "upper left corner."
    )


def model_card(record: RunRecord, name: str, kind: Kind, convention: Convention, sample: str) -> ModelCard:
    """The card of `name` on the Hub; `sample` is what `code_sample` gave, or code of your own."""
    is_known = record.base_license.lower() in HUB_LICENSES
    data = ModelCardData(
        license=record.base_license.lower() if is_known else "other",
        license_name=None if is_known else record.base_license.lower().replace(" ", "-"),
        base_model=record.base_model,
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["qwen-vl", "vision-language", "grounding", *(["lora"] if kind == "adapter" else [])],
    )
    link = f"[{record.base_model}](https://huggingface.co/{record.base_model})"
    start = "from nothing" if record.base_model is None else f"from {link}"
    parts = "; ".join(f"{part.replace('_', ' ')}: {how}" for part, how in record.trained.items())
    owner = "This model's" if record.base_model is None else f"The base model's ({record.base_model})"
    sections = [
        f"# {name.rsplit('/', 1)[-1]}",
        f"{_WHAT[kind]} Trained {start}, stage `{record.stage}`.\n\n{record.text}".strip(),
        "## Use\n\n```python\n" + sample + "```",
        "## Boxes\n\n" + box_convention(convention),
        "## Training\n\n"
        + f"What learned: {parts}.\n\n"
        + _table(("setting", "value"), [(key, value) for key, value in record.settings.items()])
        + "\n\nData:\n\n"
        + _table(("training data", "rows", ""), [_data_row(source) for source in record.train_data]),
        "## Measured\n\n" + _measured(record),
        f"## Licence\n\n{owner} licence: {record.base_license}. What is derived from it is bound by it.",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{MARK}\n\n" + "\n\n".join(sections) + "\n")


_WHAT = {
    "model": "A vision-language model of the Qwen-VL family: pictures and text in, text and boxes out.",
    "adapter": "A LoRA adapter for a vision-language model of the Qwen-VL family; it needs its base model.",
    "processor": "A processor of the Qwen-VL family: pictures and conversations in, tensors out.",
}


def _measured(record: RunRecord) -> str:
    if not record.metrics:
        return "Nothing was measured on held-out data."
    rows = [(metric.name, f"{metric.value:.4g}", metric.conditions) for metric in record.metrics]
    text = _table(("metric", "value", "conditions"), rows)
    if record.validation_data:
        held_out = [_data_row(source) for source in record.validation_data]
        text += "\n\n" + _table(("held-out data", "rows", ""), held_out)
    return text


def _data_row(source: DataSource) -> tuple[str, ...]:
    return (source.name, f"{source.num_rows:,}", source.note)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
