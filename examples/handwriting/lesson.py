"""One run from nothing: scenes, tokenizer, model, stage 0, the three stages, and the scores in between."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, set_seed

from examples.handwriting.digits import DEV_FORMS, TEST_FORMS, TRAIN_FORMS, digits_of
from examples.handwriting.model import make_model, make_processor
from examples.handwriting.progress import Watch, timed
from examples.handwriting.recipe import Recipe, StageRecipe
from examples.handwriting.results import BLIND, Run, StageRun
from examples.handwriting.scenes import Scene, make_scenes
from examples.handwriting.scoring import (
    TASKS,
    WATCHED,
    Score,
    ask,
    commonest_answer,
    inside_training,
    questions,
    score,
)
from examples.handwriting.stage0 import train_tower
from examples.handwriting.training import run_stage, texts_of_all_tasks, trees, without_picture
from modeling_qwenvl import parameter_counts
from processing.special_tokens import GROUNDING_TOKENS
from processing.supervision import Supervision
from trainers.evaluation import Answer
from trainers.families import PARTS, find_parts
from trainers.freezing import TrainedParts
from trainers.multitask import QwenVLMultiTaskTrainer
from trainers.pretrain import QwenVLPretrainTrainer
from trainers.sft import QwenVLSFTTrainer
from trainers.stage_trainer import StageTrainer

TOWER_DIGITS = 4  # per scene of the tower's stage 0: twice the lessons per picture
QUESTION_SEED = 7
TOWER_STAGE, TEXT_STAGE = "stage 0, tower", "stage 0, text"
"""Everything below depends on the seed but the held-out scenes and the questions about them."""


@dataclass
class Taught:
    """What a run leaves: measurements, the saved model, answers after stage 3, and the scenes of both sides."""

    run: Run
    model_dir: Path
    answers: dict[str, list[Answer]]
    training_scenes: list[Scene]
    held_out: list[Scene]


class Lesson:
    """Teaches one model; `teach` does it all.

    Args:
        train_forms, test_forms: whose digits are learned from and asked about.
        deadline: what `clock` says when the last step should be done, evaluations included: from stage 1 on, steps
            are left out where the machine is slower than the recipe's.
    """

    def __init__(
        self,
        recipe: Recipe,
        seed: int,
        output: Path,
        progress: Progress,
        deadline: float,
        train_forms: Sequence[int] = (*TRAIN_FORMS, *DEV_FORMS),
        test_forms: Sequence[int] = TEST_FORMS,
        clock: Callable[[], float] = perf_counter,
    ):
        self.recipe, self.seed, self.output, self.progress = recipe, seed, output, progress
        self.deadline, self.clock = deadline, clock
        self.seconds: dict[str, float] = {}
        self.stages: list[StageRun] = []
        self.scores: dict[str, dict[str, Score]] = {}
        self.slowness = 1.0
        shutil.rmtree(output / "logs", ignore_errors=True)
        set_seed(seed)
        with timed(self.seconds, "scenes and tokenizer"):
            digits = digits_of(tuple(train_forms))
            self.scenes = make_scenes(digits, recipe.scenes, seed=100 + seed)
            self.tower_scenes = make_scenes(digits, recipe.scenes, 200 + seed, TOWER_DIGITS, TOWER_DIGITS)
            self.held_out = make_scenes(digits_of(tuple(test_forms)), recipe.held_out, seed=300)
            self.processor = make_processor(texts_of_all_tasks(self.scenes[:300]))
        self.model = make_model(self.processor)

    def teach(self) -> Taught:
        self._stage0_tower()
        self._stage0_text()
        self._measure("stage 0", "plain")
        self._stage("stage 1", QwenVLPretrainTrainer, self.recipe.pretrain, "tower, adapter", "captions")
        self._measure("stage 1", "plain")
        self._stage(
            "stage 2",
            QwenVLMultiTaskTrainer,
            self.recipe.multitask,
            "everything",
            "the paper's seven tasks",
            style="plain",
        )
        self._measure("stage 2", "plain")
        self._stage(
            "stage 3",
            QwenVLSFTTrainer,
            self.recipe.sft,
            "adapter, language model",
            "ChatML conversations, also about two pictures",
            style="chat",
        )
        model_dir = self.output / "model"
        self.model.save_pretrained(model_dir)
        self.processor.save_pretrained(model_dir)
        # From here on only what is on the disk counts.
        self.model = AutoModelForImageTextToText.from_pretrained(model_dir)
        self.processor = AutoProcessor.from_pretrained(model_dir)
        answers = self._measure("stage 3", "chat")
        self._measure(BLIND, "chat", [scene.blanked() for scene in self.held_out])
        commonest = {
            task: commonest_answer(questions(self.held_out, task, "chat", QUESTION_SEED), self.processor)
            for task in TASKS
            if task not in ("grounding", "ocr")
        }
        counts = {name: total for name, (total, _) in parameter_counts(self.model).items()}
        run = Run(self.seed, counts, self.stages, self.scores, commonest, self.seconds)
        return Taught(run, model_dir, answers, self.scenes + self.tower_scenes, self.held_out)

    def _stage0_tower(self) -> None:
        recipe = self.recipe
        with timed(self.seconds, "pixels"):
            pictures = [scene.picture for scene in self.tower_scenes]
            pixels = self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        watch = Watch(self.progress, "stage 0, tower: digits and places", recipe.tower_steps)
        train_tower(
            self.model.model.visual,
            self.tower_scenes,
            pixels,
            recipe.tower_steps,
            recipe.tower_batch_size,
            recipe.tower_rate,
            watch.on_step,
        )
        self.slowness = watch.seconds / recipe.tower_seconds
        self.seconds[TOWER_STAGE] = watch.seconds
        self.stages.append(
            StageRun(
                name=TOWER_STAGE,
                trained="tower",
                unchanged=(),
                learned_from="digit, colour and box of every patch",
                planned=recipe.tower_steps,
                steps=recipe.tower_steps,
                batch_size=recipe.tower_batch_size,
                branches=1,
                trees=len(pictures),
                tokens=0,
                seconds=watch.seconds,
                losses=watch.losses,
            )
        )

    def _stage0_text(self) -> None:
        trained = TrainedParts(("language_model", "embeddings"))
        self._stage(
            TEXT_STAGE,
            QwenVLMultiTaskTrainer,
            self.recipe.text,
            "language model",
            "texts without pictures",
            trained,
        )

    def _stage(
        self,
        name: str,
        trainer_class: type[StageTrainer],
        planned: StageRecipe,
        trained_words: str,
        learned_from: str,
        trained: TrainedParts | None = None,
        style: str | None = None,
    ) -> None:
        """`style`: of the questions inside training; None: there are none."""
        with timed(self.seconds, "texts to ids"):
            seed = 1000 * self.seed + len(self.stages)
            made = trees(self.scenes, planned.mixture, planned.trees, planned.branches, seed, planned.asked)
            supervise = Supervision(self.processor)
            if name == TEXT_STAGE:
                made = ([without_picture(example, self.processor) for example in tree] for tree in made)
                supervise = Supervision(self.processor, special_in_text=GROUNDING_TOKENS)
            encoded = [list(supervise.stream(tree)) for tree in made]
            watched = self.held_out[:WATCHED] if style else []
            asked_trees = trees(watched, planned.mixture, len(watched), planned.branches, QUESTION_SEED, planned.asked)
            held_out = [list(supervise.stream(tree)) for tree in asked_trees]
        recipe = self.in_time(planned)
        watch = Watch(self.progress, f"{name}: {learned_from}", recipe.steps)
        before = _weights(self.model)
        learns = (trained or trainer_class.stage).parts
        self.progress.console.rule(name)
        run_stage(
            trainer_class,
            self.model,
            self.processor,
            encoded,
            recipe,
            self.seed,
            self.output / "logs" / name,
            watch,
            trained,
            held_out,
            inside_training(watched, style, QUESTION_SEED) if style else None,
        )
        self.seconds[name] = watch.seconds
        if name != TEXT_STAGE:  # its few seconds say little
            self.slowness = watch.seconds / (planned.seconds * recipe.steps / planned.steps)
        unchanged = _unchanged(before, _weights(self.model))
        assert set(unchanged) == set(PARTS) - set(learns), f"{name} trains {learns}, and left {unchanged} as they were"
        self.stages.append(
            StageRun(
                name=name,
                trained=trained_words,
                unchanged=unchanged,
                learned_from=learned_from,
                planned=planned.steps,
                steps=recipe.steps,
                batch_size=recipe.batch_size,
                branches=recipe.branches,
                trees=len(encoded),
                tokens=watch.num_tokens,
                seconds=watch.seconds,
                losses=watch.losses,
                asked=watch.asked,
            )
        )

    def in_time(self, planned: StageRecipe) -> StageRecipe:
        """`planned` with so many steps that this stage and those after it end before the deadline."""
        after = [self.recipe.text, self.recipe.pretrain, self.recipe.multitask, self.recipe.sft]
        needed = self.slowness * sum(stage.seconds for stage in after[after.index(planned) :])
        left = self.deadline - self.clock()
        share = min(1.0, max(left, 0.0) / needed)
        return replace(planned, steps=max(1, round(planned.steps * share)))

    def _measure(self, moment: str, style: str, scenes: Sequence[Scene] | None = None) -> dict[str, list[Answer]]:
        self.progress.console.print(f"{len(self.held_out)} held-out questions per task: {moment}")
        self.progress.stop()  # asking has a bar of its own, and a terminal has room for one display
        with timed(self.seconds, "scores"):
            answers = ask(self.model, self.processor, scenes or self.held_out, style, QUESTION_SEED)
        self.progress.start()
        self.scores[moment] = score(answers)
        return answers


def _weights(model: PreTrainedModel) -> dict[str, dict[str, Tensor]]:
    """Copies of the weights by part of the model (`trainers.families.PARTS`)."""
    parts = find_parts(model)
    return {part: {name: p.detach().clone() for name, p in parts.parameters(part)} for part in PARTS}


def _unchanged(before: dict[str, dict[str, Tensor]], after: dict[str, dict[str, Tensor]]) -> tuple[str, ...]:
    """The parts of which no bit changed."""
    return tuple(
        part for part in before if all(torch.equal(before[part][name], after[part][name]) for name in before[part])
    )
