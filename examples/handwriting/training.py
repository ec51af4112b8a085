"""The stages: conversations about the scenes, in trees, encoded once; and the package's trainers with our numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path

import numpy as np
from transformers import PrinterCallback

from examples.handwriting.conversations import ASK, chat, plain, two_pictures
from examples.handwriting.progress import StageProgress, Watch
from examples.handwriting.recipe import SEVEN_TASKS, StageRecipe
from examples.handwriting.scenes import Scene
from examples.handwriting.trees import Tree, TreeCollator
from modeling_qwenvl import QwenVLForConditionalGeneration
from processing import QwenVLProcessor
from processing.example import Example
from processing.special_tokens import IMG_END
from trainers.arguments import StageArguments
from trainers.evaluation import GenerationEvaluation
from trainers.freezing import TrainedParts
from trainers.stage_trainer import StageTrainer

# Most conversations have one turn, as most questions of the tests; the others show that a second one may follow.
TURNS = {1: 4 / 6, 2: 1 / 6, 3: 1 / 6}  # number: share of the conversations

EVALUATIONS = 5  # inside a stage


def trees(
    scenes: Sequence[Scene],
    mixture: dict[str, float],
    count: int,
    branches: int,
    seed: int,
    asked: dict[str, float] | None = None,
) -> Iterator[list[Example]]:
    """`count` trees, each of `branches` conversations about the next scene (or two), of tasks drawn by their shares.

    A task is one of `conversations.plain`; or, drawn for the whole tree, "conversation" or "two pictures". What the
    turns of a conversation ask is drawn by the shares in `asked`; evenly without it.
    """
    rng = np.random.default_rng(seed)
    names, shares = list(mixture), np.array(list(mixture.values()))
    of_turns = np.array([asked[task] if asked else 1.0 for task in ASK])
    of_turns = of_turns / of_turns.sum()
    for number in range(count):
        scene, other = scenes[number % len(scenes)], scenes[int(rng.integers(len(scenes)))]
        drawn = rng.choice(names, size=branches, p=shares / shares.sum())
        turns = rng.choice(list(TURNS), size=branches, p=list(TURNS.values()))
        if drawn[0] == "two pictures":
            yield [two_pictures(scene, other, rng, of_one) for of_one in turns]
        elif drawn[0] == "conversation":
            yield [chat(scene, rng, list(rng.choice(list(ASK), size=of_one, p=of_turns))) for of_one in turns]
        else:
            yield [plain(scene, rng, name) for name in drawn]


def texts_of_all_tasks(scenes: Sequence[Scene]) -> Iterator[str]:
    """What the tokenizer learns from: all texts of all tasks about these scenes, and what the templates add."""
    rng = np.random.default_rng(0)
    for scene in scenes:
        examples = [plain(scene, rng, name) for name in SEVEN_TASKS]
        examples += [chat(scene, rng, list(ASK)), two_pictures(scene, scenes[0], rng)]
        for message in (message for example in examples for message in example.messages):
            for part in message["content"]:
                yield from (part[key] for key in ("text", "label") if part.get(key))
        yield from ("system\nYou are a helpful assistant.", "user\n", "assistant\n", "Picture 1: ", "(123,456),(7,8)")


def without_picture(example: Example, processor: QwenVLProcessor) -> Example:
    """The same texts, but the picture is missing: what can be said, not what is seen.

    Places are written out, so that `Supervision` must be told to read the grounding tokens in the texts.
    """
    sizes = [(picture.height, picture.width) for picture in example.pictures]
    messages = [
        {**message, "content": [part for part in message["content"] if part["type"] == "text"]}
        for message in processor.render_conversation(example.messages, sizes)
    ]
    return replace(example, messages=messages)


def in_order(encoded: Sequence[Tree], count: int, seed: int) -> list[Tree]:
    """`count` trees: all of them at random, then all again, until there are enough."""
    rng = np.random.default_rng(seed)
    order: list[int] = []
    while len(order) < count:
        order += rng.permutation(len(encoded)).tolist()
    return [encoded[index] for index in order[:count]]


def run_stage(
    trainer_class: type[StageTrainer],
    model: QwenVLForConditionalGeneration,
    processor: QwenVLProcessor,
    encoded: Sequence[Tree],
    recipe: StageRecipe,
    seed: int,
    output: Path,
    watch: Watch,
    trained: TrainedParts | None = None,
    held_out: Sequence[Tree] = (),
    generation: GenerationEvaluation | None = None,
) -> None:
    """Trains `model` in place.

    Args:
        output: for what TensorBoard shows, and the answers given inside training.
        trained: overrides what the stage trains.
        held_out, generation: whose loss is measured, and what is asked, at each of `EVALUATIONS` moments.
    """
    picture_end = processor.tokenizer.convert_tokens_to_ids(IMG_END)
    collate = TreeCollator(picture_end, processor.tokenizer.pad_token_id)
    ordered = in_order(encoded, recipe.steps * recipe.batch_size, seed)
    num_tokens = np.array([collate.num_tokens(tree) for tree in ordered]).reshape(recipe.steps, -1).sum(axis=1)
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
        eval_strategy="steps" if held_out else "no",
        eval_steps=ceil(recipe.steps / EVALUATIONS),
        report_to="tensorboard",
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=ordered,
        eval_dataset=list(held_out) or None,
        data_collator=collate,
        processing_class=processor,
        callbacks=[StageProgress(watch, num_tokens.tolist())],
        trained=trained,
        generation=generation,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
