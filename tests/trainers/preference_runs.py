"""Preference rows, and DPO on them by TRL's trainer and ours: for the tests of DPO."""

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from processing.example import Example
from trainers.dpo import PreferenceCollator, QwenVLDPOTrainer
from trainers.dpo_arguments import DPOArguments
from trainers.freezing import TrainedParts
from trainers.preference_pairs import PreferencePairs

ALL_PARTS = TrainedParts(("tower", "adapter", "language_model", "embeddings"))
FAMILIES = ["qwen_vl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "clip_qwen2", "siglip_llama"]
PICTURES = (1, 0, 2, 1)  # of each row; the second row is text only
M_ROPE = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}
VISION = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
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


def preference_rows():
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


def repeated(collator, family, config):
    """TRL's batch of the same pairs: every picture once for chosen and once for rejected."""

    def collate(rows):
        batch = collator([{"row": row["images"]} for row in rows])
        for key in ("group_of_row", "num_pictures", "num_videos"):
            batch.pop(key, None)
        for key in VISION:
            if key in batch:
                batch[key] = torch.cat([batch[key]] * 2)
        if family in M_ROPE:
            is_video = batch["input_ids"] == config.video_token_id
            batch["mm_token_type_ids"] = (batch["input_ids"] == config.image_token_id).int() + 2 * is_video.int()
        return batch

    return collate


def stock(model, reference, processor, examples, family, folder, **settings):
    collator = PreferenceCollator(PreferencePairs(processor))
    collator.number(examples)
    return DPOTrainer(
        model,
        reference,
        DPOConfig(str(folder), remove_unused_columns=False, **SETTINGS | settings),
        repeated(collator, family, model.config),
        Dataset.from_dict({"images": list(range(len(examples)))}),
        processing_class=processor,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_weights(model, other, atol=1e-5):
    wanted = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], atol=atol, rtol=0, msg=name)


def trained(model, processor, examples, folder, callbacks=None, trained=None, resume=None, **settings):
    arguments = DPOArguments(str(folder), **SETTINGS | settings)
    trainer = QwenVLDPOTrainer(
        model, arguments, examples, processing_class=processor, trained=trained, callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def with_lora(model, fresh=True):
    set_seed(7)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=r"model\.language_model\..*\.(q|v)_proj"))
    if not fresh:
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.1)
    return wrapped
