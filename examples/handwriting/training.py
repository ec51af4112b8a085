"""The stages: rows of the scenes, encoded once, and the package's stage trainers with the demo's numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import PrinterCallback

from examples.handwriting.conversations import ASK, WEIGHTS, chat, plain, two_pictures
from examples.handwriting.progress import CountingCollator, StageProgress, Watch
from examples.handwriting.recipe import StageRecipe
from examples.handwriting.scenes import Scene
from modeling_qwenvl import QwenVLForConditionalGeneration
from processing import QwenVLProcessor
from processing.collators import PaddedCollator
from processing.encoded_example import EncodedExample
from processing.example import Example
from processing.sampling import LengthBatchSampler
from trainers.arguments import StageArguments
from trainers.freezing import TrainedParts
from trainers.stage_trainer import StageTrainer

TURNS = 3  # of a conversation about one picture


def rows(scenes: Sequence[Scene], mixture: dict[str, float], count: int, seed: int) -> Iterator[Example]:
    """`count` rows, each about the next scene (or two), of tasks drawn by their shares.

    A task is one of `conversations.plain`, "conversation" or "two pictures".
    """
    rng = np.random.default_rng(seed)
    names, shares = list(mixture), np.array(list(mixture.values()))
    for number, name in enumerate(rng.choice(names, size=count, p=shares / shares.sum())):
        scene = scenes[number % len(scenes)]
        if name == "two pictures":
            yield two_pictures(scene, scenes[rng.integers(len(scenes))], rng, turns=TURNS)
        elif name == "conversation":
            yield chat(scene, rng, list(rng.choice(list(ASK), size=TURNS)))
        else:
            yield plain(scene, rng, name)


def texts_of_all_tasks(scenes: Sequence[Scene]) -> Iterator[str]:
    """What the tokenizer learns from: all texts of all tasks about these scenes, and what the templates add."""
    rng = np.random.default_rng(0)
    for scene in scenes:
        examples = [plain(scene, rng, name) for name in WEIGHTS if name != "two pictures"]
        examples += [chat(scene, rng, list(ASK)), two_pictures(scene, scenes[0], rng)]
        for message in (message for example in examples for message in example.messages):
            for part in message["content"]:
                yield from (part[key] for key in ("text", "label") if part.get(key))
        yield from ("system\nYou are a helpful assistant.", "user\n", "assistant\n", "Picture 1: ", "(123,456),(7,8)")


def rows_without_pictures(
    scenes: Sequence[Scene], mixture: dict[str, float], count: int, seed: int, processor: QwenVLProcessor
) -> Iterator[Example]:
    """As `rows`, of tasks about one picture, but the picture is missing: what can be said, not what is seen.

    Places are written out, so that `Supervision` must be told to read the grounding tokens in the texts.
    """
    for example in rows(scenes, mixture, count, seed):
        sizes = [(picture.height, picture.width) for picture in example.pictures]
        messages = [
            {**message, "content": [part for part in message["content"] if part["type"] == "text"]}
            for message in processor.render_conversation(example.messages, sizes)
        ]
        yield replace(example, messages=messages)


def in_order(encoded: Sequence[EncodedExample], batch_size: int, steps: int, seed: int) -> list[EncodedExample]:
    """The rows of `steps` batches, one batch after the other, each of rows of similar length: little is padding.

    Rows differ in length by a factor of five, so that in random batches more than half would be padding.
    """
    if len(encoded) < batch_size:
        raise ValueError(
            f"{len(encoded)} rows do not fill a batch of {batch_size}: make more rows or smaller batches."
        )
    sampler = LengthBatchSampler([example.length for example in encoded], batch_size, seed=seed)
    batches: list[list[int]] = []
    while len(batches) < steps:
        sampler.set_epoch(sampler.epoch + 1)
        batches += [batch for batch in sampler if len(batch) == batch_size]
    return [encoded[index] for batch in batches[:steps] for index in batch]


def run_stage(
    trainer_class: type[StageTrainer],
    model: QwenVLForConditionalGeneration,
    processor: QwenVLProcessor,
    encoded: Sequence[EncodedExample],
    recipe: StageRecipe,
    seed: int,
    output: Path,
    watch: Watch,
    trained: TrainedParts | None = None,
) -> None:
    """Trains `model` in place. `trained` overrides what the stage trains."""
    arguments = StageArguments(
        output_dir=str(output),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.rate,
        adapter_learning_rate=recipe.adapter_rate,
        tower_learning_rate=recipe.tower_rate,
        tower_layer_decay=1.0,  # four blocks have no deep layers that know more than the first
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        weight_decay=0.05,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.02},
        warmup_steps=min(30, recipe.steps // 2),
        train_sampling_strategy="sequential",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=in_order(encoded, recipe.batch_size, recipe.steps, seed),
        data_collator=CountingCollator(PaddedCollator(processor.tokenizer.pad_token_id), watch),
        processing_class=processor,
        callbacks=[StageProgress(watch)],
        trained=trained,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
