"""Held-out questions, answered and scored: one 0 or 1 per question, its mean, and how sure that mean is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import binomtest

from examples.handwriting.conversations import chat, plain, two_pictures
from examples.handwriting.scenes import Scene
from processing.example import Example
from processing.metrics import exact_match, iou
from trainers.evaluation import Answer, GenerationEvaluation

# What the tables call the tasks, in their order.
TASKS = {
    "caption": "caption, every word right",
    "reading": "reading: which digit is red / top left?",
    "seeing": "questions: how many, which colour?",
    "grounding": "where is it: box, IoU >= 0.5",
    "referring": "what is in this box?",
    "ocr": "OCR: every digit and its quad, IoU >= 0.5",
    "two pictures": "questions about two pictures",
}
LONGEST_ANSWER = {"ocr": 120}  # tokens; others:
LONGEST_OTHER = 40
WATCHED = 24  # held-out scenes that are asked about inside stages 2 and 3; nothing is chosen by the answers
# What is asked there, and the score in `trainers.evaluation.SCORES` that says whether it is right.
INSIDE_TRAINING = {"grounding": "box_f1_at_0.5", "reading": "exact_match", "caption": "exact_match"}


def is_right_text(answer: Answer) -> bool:
    return bool(exact_match(answer.text, answer.truths)) and not answer.parsed.shapes


def is_right_box(answer: Answer) -> bool:
    """Exactly one box, which covers the true one with an IoU of at least 0.5."""
    return len(answer.boxes) == 1 and iou(answer.boxes[0], answer.true_boxes[0]) >= 0.5


def is_right_reading(answer: Answer) -> bool:
    """All digits, in order, each with the right text and a quad whose IoU is at least 0.5."""
    return len(answer.boxes) == len(answer.true_boxes) and all(
        found.label == true.label and iou(found, true) >= 0.5
        for found, true in zip(answer.boxes, answer.true_boxes, strict=True)
    )


IS_RIGHT: dict[str, Callable[[Answer], bool]] = {"grounding": is_right_box, "ocr": is_right_reading}


@dataclass(frozen=True)
class Score:
    """How many of `total` answers are right."""

    right: int
    total: int

    @property
    def mean(self) -> float:
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval (Wilson).

        Example:
            >>> [round(end, 2) for end in Score(8, 10).interval]
            [0.49, 0.94]
        """
        found = binomtest(self.right, self.total).proportion_ci(method="wilson")
        return float(found.low), float(found.high)


def questions(scenes: Sequence[Scene], task: str, style: str, seed: int) -> list[Example]:
    """One question of `task` per scene, the same for the same seed; about two pictures, per pair of neighbours."""
    rng = np.random.default_rng(seed)
    if task == "two pictures":
        pairs = zip(scenes, [*scenes[1:], scenes[0]], strict=True)
        return [two_pictures(first, second, rng) for first, second in pairs]
    if style == "plain":
        return [plain(scene, rng, task) for scene in scenes]
    return [chat(scene, rng, [task]) for scene in scenes]


def inside_training(scenes: Sequence[Scene], style: str, seed: int) -> GenerationEvaluation:
    """A question per scene and task of INSIDE_TRAINING; the first answers are boxes, which are drawn."""
    asked = {task: questions(scenes, task, style, seed) for task in INSIDE_TRAINING}
    return GenerationEvaluation(
        [replace(example, task=task) for task, examples in asked.items() for example in examples],
        batch_size=len(scenes),
        max_new_tokens=LONGEST_OTHER,
        scores={task: (name,) for task, name in INSIDE_TRAINING.items()},
        num_drawn=4,
    )


def commonest_answer(examples: Sequence[Example], processor) -> Score:
    """What always giving the commonest answer would score: chance, for answers that are words."""
    texts = [processor.render_conversation(e.messages, _sizes(e))[-1]["content"][-1]["text"] for e in examples]
    return Score(max(texts.count(text) for text in set(texts)), len(texts))


def _sizes(example: Example) -> list[tuple[int, int]]:
    return [(picture.height, picture.width) for picture in example.pictures]


def ask(
    model, processor, scenes: Sequence[Scene], style: str, seed: int, tasks=tuple(TASKS)
) -> dict[str, list[Answer]]:
    """The answers (greedy) to one question per scene and task, by task."""
    answers = {}
    for task in tasks:
        asked = GenerationEvaluation(
            questions(scenes, task, style, seed),
            batch_size=len(scenes),
            max_new_tokens=LONGEST_ANSWER.get(task, LONGEST_OTHER),
        )
        answers[task] = asked.answers(model, processor)
    return answers


def score(answers: dict[str, list[Answer]]) -> dict[str, Score]:
    return {
        task: Score(sum(IS_RIGHT.get(task, is_right_text)(answer) for answer in given), len(given))
        for task, given in answers.items()
    }
