"""What is asked about a scene and what the right answer is: the tasks of stage 2 and the conversations of stage 3.

Every function makes a `processing.example.Example`, in whose last message the truth stands: training learns it,
scoring compares with it.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from examples.handwriting.scenes import NUMERALS, Mark, Scene
from processing import tasks
from processing.example import Example
from processing.parts import Part

Rng = np.random.Generator


def caption_of(scene: Scene) -> str:
    """Example:
    >>> caption_of(scene)
    'red three at the top left, blue seven at the centre'
    """
    return ", ".join(f"{mark.colour} {mark.name} at the {mark.place}" for mark in scene.marks)


def _one_of(scene: Scene, rng: Rng) -> Mark:
    return scene.marks[rng.integers(len(scene.marks))]


def _phrase(mark: Mark, rng: Rng) -> str:
    return str(rng.choice([f"the {mark.name}", f"the {mark.colour} digit", f"the {mark.colour} {mark.name}"]))


def _quad(mark: Mark) -> list[int]:
    x1, y1, x2, y2 = mark.box
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def reading_question(scene: Scene, rng: Rng) -> tuple[str, str]:
    """Which digit has this colour, or stands at this place if no other does."""
    mark = _one_of(scene, rng)
    is_alone = sum(other.place == mark.place for other in scene.marks) == 1
    if is_alone and rng.random() < 0.5:
        return f"Which digit is at the {mark.place}?", mark.name
    return f"Which digit is {mark.colour}?", mark.name


def seeing_question(scene: Scene, rng: Rng) -> tuple[str, str]:
    """How many digits there are, or which colour one has."""
    if rng.random() < 0.5:
        return "How many digits are there?", NUMERALS[len(scene.marks)]
    mark = _one_of(scene, rng)
    return f"Which colour is the {mark.name}?", mark.colour


# --- Stages 1 and 2: the paper's seven tasks, in plain text ---


def caption(scene: Scene, rng: Rng) -> Example:
    return tasks.caption(scene.picture, caption_of(scene))


def reading(scene: Scene, rng: Rng) -> Example:
    return tasks.ocr_vqa(scene.picture, *reading_question(scene, rng))


def seeing(scene: Scene, rng: Rng) -> Example:
    return tasks.vqa(scene.picture, *seeing_question(scene, rng))


def caption_with_grounding(scene: Scene, rng: Rng) -> Example:
    pieces: list[str | dict] = []
    for mark in scene.marks:
        pieces += [", "] * bool(pieces) + [{"label": f"{mark.colour} {mark.name}", "bbox": list(mark.box)}]
    return tasks.caption_with_grounding(scene.picture, pieces)


def grounding(scene: Scene, rng: Rng) -> Example:
    mark = _one_of(scene, rng)
    return tasks.referring_grounding(scene.picture, _phrase(mark, rng), list(mark.box))


def referring(scene: Scene, rng: Rng) -> Example:
    mark = _one_of(scene, rng)
    return tasks.grounded_captioning(scene.picture, list(mark.box), f"{mark.colour} {mark.name}")


def ocr(scene: Scene, rng: Rng) -> Example:
    lines = [{"text": str(mark.value), "quad": _quad(mark)} for mark in scene.marks]
    # Without the blank the digit is the quad's label, as the text of an answer is read.
    return tasks.ocr_with_quads(scene.picture, lines, settings=tasks.Settings(blank_before_quad=False))


# --- Stage 3: ChatML ---

Turn = tuple[list[Part], list[Part]]  # question, answer


def _text(text: str) -> Part:
    return {"type": "text", "text": text}


def _chat(scenes: list[Scene], turns: list[Turn], weights: list[float], task: str) -> Example:
    pictures: list[Part] = [{"type": "image", "image": scene.picture} for scene in scenes]
    messages = []
    for number, (question, answer) in enumerate(turns):
        messages.append({"role": "user", "content": [*pictures, *question] if number == 0 else question})
        messages.append({"role": "assistant", "content": answer, "weight": weights[number]})
    return Example(messages, task=task)


def _ask_caption(scene: Scene, rng: Rng) -> Turn:
    return [_text("Describe the picture.")], [_text(caption_of(scene))]


def _ask_reading(scene: Scene, rng: Rng) -> Turn:
    question, answer = reading_question(scene, rng)
    return [_text(question)], [_text(answer)]


def _ask_seeing(scene: Scene, rng: Rng) -> Turn:
    question, answer = seeing_question(scene, rng)
    return [_text(question)], [_text(answer)]


def _ask_where(scene: Scene, rng: Rng) -> Turn:
    mark = _one_of(scene, rng)
    phrase = _phrase(mark, rng)
    return [_text(f"Where is {phrase}?")], [{"type": "box", "bbox": list(mark.box), "label": phrase}]


def _ask_what(scene: Scene, rng: Rng) -> Turn:
    mark = _one_of(scene, rng)
    return [_text("What is in "), {"type": "box", "bbox": list(mark.box)}, _text("?")], [
        _text(f"{mark.colour} {mark.name}")
    ]


def _ask_to_read(scene: Scene, rng: Rng) -> Turn:
    quads: list[Part] = [{"type": "quad", "quad": _quad(m), "label": str(m.value)} for m in scene.marks]
    return [_text("Read the digits with their places.")], quads


def _ask_about_two(first: Scene, second: Scene, rng: Rng) -> Turn:
    scenes = (first, second)
    index = int(rng.integers(2))
    others = {mark.value for mark in scenes[1 - index].marks}
    only_here = [mark for mark in scenes[index].marks if mark.value not in others]
    if only_here and rng.random() < 0.5:
        mark = only_here[rng.integers(len(only_here))]
        return [_text(f"Which picture shows a {mark.name}?")], [_text(f"Picture {index + 1}")]
    mark = _one_of(scenes[index], rng)
    return [_text(f"Which digit is {mark.colour} in Picture {index + 1}?")], [_text(mark.name)]


ASK: dict[str, Callable[[Scene, Rng], Turn]] = {
    "caption": _ask_caption,
    "reading": _ask_reading,
    "seeing": _ask_seeing,
    "grounding": _ask_where,
    "referring": _ask_what,
    "ocr": _ask_to_read,
}

_PLAIN: dict[str, Callable[[Scene, Rng], Example]] = {
    "caption": caption,
    "reading": reading,
    "seeing": seeing,
    "grounding": grounding,
    "referring": referring,
    "ocr": ocr,
    "caption_with_grounding": caption_with_grounding,
}


# Loss weight of an answer's tokens: an answer of one word must not drown among boxes of twenty tokens.
WEIGHTS = {
    "caption": 2.0,
    "reading": 5.0,
    "seeing": 4.0,
    "grounding": 2.0,
    "referring": 5.0,
    "ocr": 0.5,
    "caption_with_grounding": 0.7,
    "two pictures": 5.0,
}


def plain(scene: Scene, rng: Rng, name: str) -> Example:
    """A row of one of the paper's tasks."""
    return replace(_PLAIN[name](scene, rng), weight=WEIGHTS[name])


def chat(scene: Scene, rng: Rng, names: list[str]) -> Example:
    """A conversation about one scene, a turn for each of these names in `ASK`."""
    turns = [ASK[name](scene, rng) for name in names]
    return _chat([scene], turns, [WEIGHTS[name] for name in names], task=names[-1])


def two_pictures(first: Scene, second: Scene, rng: Rng, turns: int = 1) -> Example:
    """A conversation about two scenes."""
    asked = [_ask_about_two(first, second, rng) for _ in range(turns)]
    return _chat([first, second], asked, [WEIGHTS["two pictures"]] * turns, task="two pictures")
