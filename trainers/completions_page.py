"""Sampled answers -> one HTML page: picture with true and answered boxes, prompt, completion, rewards, advantage.

The page needs nothing else: no script, no network, every text of the data escaped.
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from io import BytesIO
from itertools import groupby

from PIL import Image

from processing.coordinates import Shape
from processing.drawing import draw_shapes
from trainers.answering import COLOURS, MIN_SIDE
from trainers.reward_solution import Solution, answer_of, prompt_text, read_solution
from trainers.rollouts import Prompt

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #009e73; --bad: #d55e00; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
article { border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin: 1rem 0; }
.prompt { white-space: pre-wrap; font-weight: 600; margin: 0 0 .6rem; }
.completion { display: flex; gap: 1rem; border-top: 1px solid var(--line); padding: .6rem 0; align-items: flex-start; }
.completion pre { flex: 1; margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 14rem; max-height: 14rem; border-radius: 4px; }
td { padding: 0 .5rem 0 0; } td + td { text-align: right; font-variant-numeric: tabular-nums; }
.up { color: var(--good); } .down { color: var(--bad); }
"""


@dataclass(frozen=True)
class Completed:
    """One sampled answer: what every reward function gave (NaN: it does not apply), and the advantage."""

    prompt: Prompt
    text: str
    rewards: Mapping[str, float]
    advantage: float


def completions_page(completed: Sequence[Completed], title: str) -> str:
    """The page; neighbours with the same prompt are one group. True boxes are green, answered ones orange."""
    groups = [list(group) for _, group in groupby(completed, key=lambda one: id(one.prompt))]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Whatever the model wrote, the page may neither run nor load anything.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        f'img-src data:"><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>'
        f"<p>{len(completed)} completions of {len(groups)} prompts. True boxes are green, answered ones orange.</p>"
        f"{''.join(map(_group, groups))}</body></html>"
    )


def _group(group: Sequence[Completed]) -> str:
    prompt = group[0].prompt
    shown = "".join(map(_completion, group))
    return (
        f'<article><p class="prompt">{escape(prompt_text(prompt.messages))}</p>'
        f"<p>{escape(prompt.example.source.where)}; solution: {escape(str(prompt.example.solution)[:400])}</p>"
        f"{shown}</article>"
    )


def _completion(one: Completed) -> str:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{value:.3f}</td></tr>" for name, value in one.rewards.items())
    side = "up" if one.advantage > 0 else "down"
    advantage = f'<tr class="{side}"><td>advantage</td><td>{one.advantage:+.3f}</td></tr>'
    picture = draw_completion(one)
    image = "" if picture is None else f'<img alt="" src="{_address(picture)}">'
    return f'<div class="completion">{image}<pre>{escape(one.text)}</pre><table>{rows}{advantage}</table></div>'


def draw_completion(one: Completed) -> Image.Image | None:
    """The picture that the answer is about, with true and answered shapes; None for a prompt without pictures."""
    prompt = one.prompt
    if not prompt.pictures:
        return None
    try:
        solution = read_solution(prompt.example.solution)
    except ValueError:  # of a kind that only a reward of the user's own reads
        solution = Solution()
    index = len(prompt.pictures) - 1 if solution.image_index is None else solution.image_index
    parsed = prompt.reader.shapes(answer_of(one.text), index)
    shapes: list[Shape] = [replace(box, label="truth") for box in solution.boxes or ()]
    shapes += [replace(shape, label="answer") for shape in parsed.shapes]
    return draw_shapes(prompt.pictures[index], shapes, min_side=MIN_SIDE, colours=COLOURS)


def _address(picture: Image.Image) -> str:
    file = BytesIO()
    picture.convert("P", palette=Image.Palette.ADAPTIVE).save(file, "png", optimize=True)
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
