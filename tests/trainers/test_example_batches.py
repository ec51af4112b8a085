"""Examples become batches in the stage's style and at its resolution."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from processing.example import Example, RowError, Source
from processing.processing_families import load_processor
from processing.rows import read_rows
from trainers.arguments import StageArguments
from trainers.example_batches import ExampleCollator, at_stage_resolution
from trainers.multitask import QwenVLMultiTaskTrainer
from trainers.pretrain import QwenVLPretrainTrainer
from trainers.sft import QwenVLSFTTrainer
from trainers.stages import MULTITASK, PRETRAIN, SFT


@pytest.fixture
def loaded(model_folder):
    """loaded("qwen_vl") -> (tiny model, its processor)."""

    def load(family):
        folder = model_folder(family)
        return AutoModelForImageTextToText.from_pretrained(folder), load_processor(folder)

    return load


def supervised_text(batch, processor) -> str:
    return processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])


def example(*texts, style="chat") -> Example:
    content = [{"type": "image", "image": Image.new("RGB", (40, 20), "red")}, {"type": "text", "text": texts[0]}]
    turns = [content, *texts[1:]]
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    return Example(messages, style=style, source=Source("rows.jsonl", 3))


@pytest.mark.parametrize("style", ["chat", "plain"])
def test_the_stage_decides_the_label_style(loaded, style):
    _, processor = loaded("qwen_vl")
    row = example("What? ", "A.", style=style)
    for stage in (PRETRAIN, MULTITASK):
        assert supervised_text(ExampleCollator(processor, stage)([row]), processor) == "A.<|endoftext|>"
    assert "A.<|im_end|>" in supervised_text(ExampleCollator(processor, SFT)([row]), processor)


def test_a_conversation_of_several_turns_fits_no_plain_stage(loaded):
    _, processor = loaded("qwen_vl")
    with pytest.raises(RowError, match=r"rows.jsonl:3: style 'plain' is one user turn .* \(stage pretrain\)"):
        ExampleCollator(processor, PRETRAIN)([example("1?", "a", "2?", "b")])


def test_rows_that_are_no_examples_are_refused(loaded):
    _, processor = loaded("qwen_vl")
    with pytest.raises(ValueError, match="The dataset holds a dict: without a data_collator it must hold Examples"):
        ExampleCollator(processor, SFT)([{"messages": []}])


def test_a_row_that_is_too_long_is_refused_by_name(loaded):
    _, processor = loaded("qwen_vl")
    with pytest.raises(RowError, match=r"rows.jsonl:3: .*max_length"):
        ExampleCollator(processor, SFT, max_length=7)([example("What?", "A.")])


@pytest.mark.parametrize(
    ("configured", "stage", "asked", "expected"),
    [
        (448, PRETRAIN, None, 224),
        (448, MULTITASK, None, 448),
        (448, SFT, None, 448),
        (56, SFT, None, 56),  # never more than the model is configured for
        (448, SFT, 112, 112),
    ],
)
def test_qwen_vl_sees_squares_of_the_stages_side(loaded, configured, stage, asked, expected):
    model, processor = loaded("qwen_vl")
    model.config.vision_config.image_size = configured
    resized = at_stage_resolution(processor, model.config, stage, asked)
    batch = ExampleCollator(resized, stage)([example("What?", "A.")])
    assert batch["pixel_values"].shape == (1, 3, expected, expected)
    assert processor.image_processor.size["height"] == 8  # the caller's is left alone


def test_a_foreign_tower_keeps_the_size_of_its_processor(loaded):
    model, processor = loaded("qwen_vl")
    model.config.vision_config.model_type = "clip_vision_model"
    assert at_stage_resolution(processor, model.config, PRETRAIN, None) is processor


def test_dynamic_resolution_takes_the_square_as_the_largest_area(loaded):
    model, processor = loaded("qwen2_5_vl")
    assert at_stage_resolution(processor, model.config, PRETRAIN, None) is processor
    limited = at_stage_resolution(processor, model.config, PRETRAIN, 12)
    batch = ExampleCollator(limited, PRETRAIN)([example("What?", "A.")])
    # 40 x 20 pixels shrink to at most 144: 16 x 8 in patches of 2 x 2.
    assert batch["image_grid_thw"].tolist() == [[1, 4, 8]]


def test_a_processor_of_one_fixed_size_refuses_a_resolution(loaded):
    model, processor = loaded("qwen2_5_vl")
    processor.image_processor.size = type(processor.image_processor.size)(height=8, width=8)
    with pytest.raises(ValueError, match=r"resolution=12, but .* makes pictures of one fixed size"):
        at_stage_resolution(processor, model.config, SFT, 12)


@pytest.mark.parametrize("family", ["qwen_vl", "qwen2_5_vl"])
def test_the_three_stages_one_after_the_other_on_examples(family, loaded, rows_file, tmp_path):
    model, processor = loaded(family)
    losses = []
    for trainer_class in (QwenVLPretrainTrainer, QwenVLMultiTaskTrainer, QwenVLSFTTrainer):
        args = StageArguments(
            str(tmp_path / trainer_class.stage.name),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            save_steps=2,
        )
        rows = list(read_rows(rows_file))
        trainer = trainer_class(model, args, train_dataset=rows, eval_dataset=rows[:4], processing_class=processor)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        losses.append(before - trainer.evaluate()["eval_loss"])
    assert all(gain > 0 for gain in losses[:2])
    saved = load_processor(tmp_path / "sft" / "checkpoint-2")
    torch.testing.assert_close(
        ExampleCollator(saved, SFT)(rows[:1])["pixel_values"], trainer.data_collator(rows[:1])["pixel_values"]
    )


def test_examples_without_a_processor_are_refused(build, tmp_path):
    with pytest.raises(ValueError, match="Give processing_class"):
        QwenVLSFTTrainer(build("qwen_vl"), StageArguments(str(tmp_path), use_cpu=True), train_dataset=[])


def test_a_resolution_beside_a_data_collator_is_refused(build, collate, tmp_path):
    args = StageArguments(str(tmp_path), use_cpu=True, resolution=224)
    with pytest.raises(ValueError, match="resolution=224, max_length=None and packing=False say how"):
        QwenVLSFTTrainer(build("qwen_vl"), args, train_dataset=[], data_collator=collate)
