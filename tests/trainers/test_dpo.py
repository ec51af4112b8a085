"""DPO with shared pictures and prompts, against TRL's own DPOTrainer on the same pairs with everything repeated."""

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText
from trl import DPOConfig, DPOTrainer

from processing.example import Example
from processing.processing_families import load_processor
from trainers.dpo import PreferenceCollator, QwenVLDPOTrainer
from trainers.dpo_arguments import DPOArguments
from trainers.families import find_parts
from trainers.freezing import TrainedParts
from trainers.preference_pairs import PreferencePairs

ALL_PARTS = TrainedParts(("tower", "adapter", "language_model", "embeddings"))
PICTURES = (1, 0, 2, 1)  # of each row; the second row is text only
SETTINGS = {
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "bf16": False,
    "use_cpu": True,
    "activation_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "beta": 0.3,
    "train_sampling_strategy": "sequential",
    "dataloader_pin_memory": False,
    # Adam divides by gradients that are zero but for rounding; this keeps them zero.
    "adam_epsilon": 1e-4,
}


@pytest.fixture
def examples():
    """Four preference rows; answers of different lengths."""
    rows = []
    for number, pictures in enumerate(PICTURES):
        content = [
            {"type": "image", "image": Image.new("RGB", (8, 8), (50 * number + 20 * p,) * 3)} for p in range(pictures)
        ]
        content.append({"type": "text", "text": "How bright?" + "?" * number})
        rows.append(
            Example(
                [{"role": "user", "content": content}],
                kind="preference",
                chosen=[{"role": "assistant", "content": f"{number} of 255"}],
                rejected=[{"role": "assistant", "content": "dark" * (number % 2 + 1)}],
            )
        )
    return rows


@pytest.fixture
def load(model_folder):
    def _load(family, noise=0.0):
        model = AutoModelForImageTextToText.from_pretrained(model_folder(family), dtype=torch.float32)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=noise)
        return model, load_processor(str(model_folder(family)))

    return _load


def repeated(collator, family, image_token_id):
    """TRL's batch of the same pairs: every picture once for chosen and once for rejected."""

    def collate(rows):
        batch = collator([{"row": row["images"]} for row in rows])
        del batch["group_of_row"], batch["num_pictures"]
        for key in ("pixel_values", "image_grid_thw"):
            if key in batch:
                batch[key] = torch.cat([batch[key]] * 2)
        if family != "qwen_vl":
            batch["mm_token_type_ids"] = (batch["input_ids"] == image_token_id).int()
        return batch

    return collate


def stock(model, reference, processor, examples, family, folder, **settings):
    collator = PreferenceCollator(PreferencePairs(processor))
    collator.number(examples)
    return DPOTrainer(
        model,
        reference,
        DPOConfig(str(folder), remove_unused_columns=False, **SETTINGS | settings),
        repeated(collator, family, model.config.image_token_id),
        Dataset.from_dict({"images": list(range(len(examples)))}),
        processing_class=processor,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_weights(model, other, atol=1e-5):
    wanted = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], atol=atol, rtol=0, msg=name)


LOSSES = {
    "sigmoid": {},
    "ipo with ld_alpha": {"loss_type": ["ipo"], "ld_alpha": 0.5},
    "MPO": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
}


@pytest.mark.parametrize("layout", ["tree", "rows"])
@pytest.mark.parametrize("settings", LOSSES.values(), ids=list(LOSSES))
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen_vl"])
def test_losses_and_final_weights_equal_trls(load, examples, tmp_path, family, settings, layout):
    model, processor = load(family)
    arguments = DPOArguments(str(tmp_path), completion_layout=layout, **SETTINGS | settings)
    ours = QwenVLDPOTrainer(model, arguments, examples, processing_class=processor, trained=ALL_PARTS)
    ours.train()
    other, _ = load(family)
    theirs = stock(other, load(family)[0], processor, examples, family, tmp_path, **settings)
    theirs.train()
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)
    assert len(set(losses(ours))) == 3
    assert_same_weights(model, other)
