"""Held-out examples -> generated answers -> scores per task; used inside training by `StageTrainer`, and alone.

The prompt is the conversation up to its last answer, rendered as at inference; the answer is what `generate` gives;
the truth is the row's last answer, its boxes in pixels of the original picture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from rich.progress import track
from torch import nn

from processing.cider import cider_d
from processing.coordinates import Box, Frame, Shape, bounding_box
from processing.example import Example, Message, count_pictures
from processing.grounding_mixin import GroundingMixin, shapes_in_pixels
from processing.grounding_text import ParsedAnswer
from processing.metrics import anls, box_f1, edit_similarity, exact_match, vqa_accuracy
from processing.parts import SHAPES
from processing.pictures import ANYTHING, PictureLimits, load_picture
from processing.supervision import template_of
from trainers.conversation import until_stop


@dataclass(frozen=True)
class Answer:
    """What the model answered to one example, beside the truth. Shapes are in pixels of the original pictures.

    truths: accepted texts; more than one where the row has a column `answers` (a list of texts).
    """

    example: Example
    pictures: tuple[Image.Image, ...]
    raw: str
    parsed: ParsedAnswer
    truths: tuple[str, ...]
    true_shapes: tuple[Shape, ...]

    @property
    def text(self) -> str:
        """The answer without tags, JSON and end tokens."""
        return self.parsed.text.strip()

    @property
    def boxes(self) -> list[Box]:
        return [bounding_box(shape) for shape in self.parsed.shapes]

    @property
    def true_boxes(self) -> list[Box]:
        return [bounding_box(shape) for shape in self.true_shapes]


Score = Callable[[Answer], float]
SCORES: dict[str, Score] = {
    "exact_match": lambda answer: exact_match(answer.text, answer.truths),
    "vqa_accuracy": lambda answer: vqa_accuracy(answer.text, answer.truths),
    "anls": lambda answer: anls(answer.text, answer.truths),
    "edit_similarity": lambda answer: max(edit_similarity(answer.text, truth) for truth in answer.truths),
    "box_f1_at_0.5": lambda answer: box_f1(answer.boxes, answer.true_boxes),
}
CORPUS_SCORES: dict[str, Callable[[Sequence[Answer]], float]] = {
    "cider_d": lambda answers: _mean(cider_d([a.text for a in answers], [a.truths for a in answers])),
}
# What is measured for which task of stage 2 (processing/tasks.py); other tasks: DEFAULT_SCORES.
TASK_SCORES: dict[str, tuple[str, ...]] = {
    "caption": ("exact_match", "cider_d"),
    "vqa": ("vqa_accuracy", "exact_match"),
    "ocr_vqa": ("anls", "exact_match"),
    "caption_with_grounding": ("exact_match", "cider_d", "box_f1_at_0.5"),
    "referring_grounding": ("box_f1_at_0.5",),
    "grounded_captioning": ("exact_match", "cider_d"),
    "ocr_with_quads": ("edit_similarity", "box_f1_at_0.5"),
    "pure_text": ("exact_match", "anls"),
}
DEFAULT_SCORES = ("exact_match", "anls")
DEFAULT_SCORES_WITH_BOXES = ("exact_match", "box_f1_at_0.5")


@dataclass(frozen=True)
class GenerationEvaluation:
    """What to ask and how; `StageTrainer(..., generation=GenerationEvaluation(held_out))` runs it at every evaluation.

    Args:
        examples: held-out examples of kind "sft". Each evaluation asks the same ones.
        batch_size: prompts per call of `generate`, padded on the left.
        max_new_tokens: longest answer.
        scores: task -> names of SCORES and CORPUS_SCORES, besides or instead of those of TASK_SCORES.
        limits: which pictures may be loaded.
        num_drawn: answers per evaluation whose picture is drawn, with the true and the predicted boxes.
        temperature: of sampling from the whole distribution, above 0; None: greedy.

    Raises:
        ValueError: no examples, a temperature of 0 or less, an example without an answer to compare with, or an
            unknown score.
    """

    examples: Sequence[Example]
    batch_size: int = 8
    max_new_tokens: int = 64
    scores: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    limits: PictureLimits = ANYTHING
    num_drawn: int = 0
    temperature: float | None = None

    def __post_init__(self) -> None:
        if not self.examples:
            raise ValueError("GenerationEvaluation has no examples to ask about.")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"A temperature of {self.temperature} cannot be sampled at; None answers greedily.")
        for example in self.examples:
            if example.kind != "sft":
                raise ValueError(f"{example.source.where}: kind {example.kind!r} has no answer to compare with.")
        for task, names in self.scores.items():
            if unknown := set(names) - {*SCORES, *CORPUS_SCORES}:
                known = ", ".join(sorted({*SCORES, *CORPUS_SCORES}))
                raise ValueError(f"Task {task!r} asks for {', '.join(sorted(unknown))}; known scores are {known}.")

    def answers(self, model: nn.Module, processor: GroundingMixin) -> list[Answer]:
        """The answers of `model`, in the order of `examples`. Model modes are as before when it returns."""
        was_training = {module: module.training for module in model.modules()}
        model.eval()
        try:
            return list(self._ask(model, processor))
        finally:
            for module, training in was_training.items():
                module.training = training

    def measure(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Means over the answers of each task, by "task/score"; "task/unparsable" is the share of answers with a
        malformed shape.

        Example:
            >>> evaluation.measure(answers)
            {'vqa/vqa_accuracy': 0.75, 'vqa/exact_match': 0.75, 'vqa/unparsable': 0.0}
        """
        by_task: dict[str, list[Answer]] = defaultdict(list)
        for answer in answers:
            by_task[answer.example.task or "all"].append(answer)
        measured = {}
        for task, members in by_task.items():
            for name in self._names(task, members):
                score = SCORES.get(name)
                measured[f"{task}/{name}"] = (
                    _mean([score(answer) for answer in members]) if score else CORPUS_SCORES[name](members)
                )
            measured[f"{task}/unparsable"] = _mean([float(bool(answer.parsed.problems)) for answer in members])
        return measured

    def _names(self, task: str, answers: Sequence[Answer]) -> tuple[str, ...]:
        default = DEFAULT_SCORES_WITH_BOXES if any(answer.true_shapes for answer in answers) else DEFAULT_SCORES
        return self.scores.get(task) or TASK_SCORES.get(task) or default

    def _ask(self, model: nn.Module, processor: Any) -> Iterator[Answer]:
        # Rows of one batch share a template, and have about one length if they have the same number of pictures.
        order = sorted(
            range(len(self.examples)), key=lambda i: (self.examples[i].style, self.examples[i].num_pictures)
        )
        batches: list[list[int]] = []
        for _, same_style in groupby(order, key=lambda i: self.examples[i].style):
            indices = list(same_style)
            batches += [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        answers: dict[int, Answer] = {}
        for batch in track(batches, description="answering held-out examples", transient=True):
            for i, answer in zip(
                batch, self._ask_batch(model, processor, [self.examples[i] for i in batch]), strict=True
            ):
                answers[i] = answer
        yield from (answers[i] for i in range(len(self.examples)))

    @torch.inference_mode()
    def _ask_batch(self, model: Any, processor: Any, examples: Sequence[Example]) -> Iterator[Answer]:
        pictures = [tuple(load_picture(source, self.limits) for source in example.pictures) for example in examples]
        prompts = [
            _with_pictures(example.messages[:-1], loaded) for example, loaded in zip(examples, pictures, strict=True)
        ]
        inputs = processor.apply_chat_template(
            prompts,
            chat_template=template_of(processor, examples[0].style),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            sanitize_control_tokens=True,
            processor_kwargs={"padding": True, "padding_side": "left", "return_tensors": "pt"},
        )
        inputs = inputs.to(next(model.parameters()).device)
        how: dict[str, Any] = {"do_sample": False}
        if self.temperature is not None:
            how = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        output = model.generate(**inputs, max_new_tokens=self.max_new_tokens, **how)
        new = output[:, inputs["input_ids"].shape[1] :]
        said = [until_stop(ids, model.generation_config) for ids in new.tolist()]
        raws = processor.tokenizer.batch_decode(said, skip_special_tokens=False)
        for example, loaded, raw in zip(examples, pictures, raws, strict=True):
            sizes = [(picture.height, picture.width) for picture in loaded]
            truth = processor.render_conversation(example.messages, sizes)[-1]
            true_shapes = _shapes(example, processor.frames(sizes))
            true_text = processor.parse_answer(_text(truth), sizes).text.strip()
            yield Answer(
                example=example,
                pictures=loaded,
                raw=raw,
                parsed=processor.parse_answer(raw, sizes),
                truths=tuple(example.columns.get("answers", (true_text,))),
                true_shapes=tuple(true_shapes),
            )


def _with_pictures(messages: Sequence[Message], pictures: Sequence[Image.Image]) -> list[Message]:
    """The messages with each picture's place taken by the loaded picture."""
    left = iter(pictures)

    def loaded(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "image": next(left)} if part["type"] == "image" else part

    return [
        {key: value for key, value in message.items() if key in ("role", "content")}
        | ({} if isinstance(message["content"], str) else {"content": [loaded(part) for part in message["content"]]})
        for message in messages
    ]


def _shapes(example: Example, frames: Sequence[Frame]) -> Iterator[Shape]:
    """The shapes of the last answer, in original pixels."""
    content = example.messages[-1]["content"]
    for part in content if not isinstance(content, str) else ():
        if part["type"] in SHAPES:
            before = sum(count_pictures(message) for message in example.messages[:-1])
            yield from shapes_in_pixels(part, frames, before, "refuse", None)


def _text(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
