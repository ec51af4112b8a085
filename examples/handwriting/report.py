"""Results and answers -> one HTML page that needs nothing else: scores, loss curve, held-out pictures, the method."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from io import BytesIO, StringIO
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from examples.handwriting.results import BLIND, MOMENTS, Run
from examples.handwriting.scoring import INSIDE_TRAINING, IS_RIGHT, TASKS, WATCHED, Score, is_right_text
from processing.coordinates import Box
from trainers.evaluation import Answer

TRUE, FOUND = "#0b8f5a", "#e8590c"  # colours of true and predicted boxes
TINTS = dict(zip(INSIDE_TRAINING, ("#e8590c", "#1971c2", "#868e96"), strict=True))
CURVES = ("#868e96", "#adb5bd", "#1971c2", "#0b8f5a", "#e8590c")

DATA = (
    "The 1797 digits of scikit-learn (8x8 pixels, the test part of UCI's Optical Recognition of Handwritten Digits) "
    "are the contents of 14 forms that 13 people filled in. Scenes for training show digits of forms 0 to 10, "
    "held-out scenes those of forms 11 to 13. One person may have filled in two forms, so it cannot be ruled out that "
    "one hand is on both sides; no digit is. Recipes were chosen on forms 9 and 10, before training took them in; "
    "earlier models' mistakes on held-out forms were looked at."
)
STAGE_0 = (
    "Stage 0 is ours: it stands for OpenCLIP's tower and Qwen-7B, with which the paper begins. In it the tower learns "
    "to say for every patch which digit and colour it lies on and where that digit's edges are, and the language "
    "model, whose first heads begin by looking back one to four tokens, learns the scenes' texts without pictures. "
    "The resampler starts from our local initialisation."
)
FONT = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")


def report(
    runs: Sequence[Run],
    answers: dict[str, list[Answer]],
    machine: dict[str, str],
    recipe: str,
    commands: Sequence[str],
    per_task: int = 8,
) -> str:
    """The page. `answers`: what the first run's model answered to held-out questions after stage 3, by task."""
    run = runs[0]
    last = run.scores["stage 3"]
    num_scenes = next(iter(last.values())).total
    minutes = run.total_seconds / 60
    total = run.parameters["total"]
    facts = [
        (f"{last['reading'].mean:.0%}", "digits read right"),
        (f"{last['grounding'].mean:.0%}", "found, IoU at least 0.5"),
        (f"{last['caption'].mean:.0%}", "captions right, every word"),
        (f"{run.scores[BLIND]['reading'].mean:.0%}", 'digits "read" on blank paper'),
        (f"{minutes:.1f} min", f"in all, on {machine['processors']}"),
    ]
    parts = [
        f"<h1>A Qwen-VL of {total / 1e6:.1f} million parameters learns to see handwriting</h1>",
        "<p class=soft>Real architecture, real processor, the paper's three stages; digits from people whose hand it "
        f"never saw. Every number below was measured in this run, on {num_scenes} held-out scenes per task.</p>",
        f'<div class="facts">{"".join(_fact(*fact) for fact in facts)}</div>',
        "<h2>Scores</h2>",
        f'<div class="panel">{_scores(run)}</div>',
        "<p class=soft>Share of right answers, with the 95 % interval (Wilson). Blind: the same questions to the same "
        "model, with the pictures blanked. Commonest answer: what always giving the most frequent true answer would "
        "score. Before stage 3 the questions have the paper's plain form, after it they are ChatML; two pictures are "
        "always asked about in ChatML, which is only taught in stage 3.</p>",
        *([_seeds(runs)] if len(runs) > 1 else []),
        "<h2>Loss, and answers inside training</h2>",
        f'<div class="panel curve">{_curve(run)}</div>',
        f"<p class=soft>Held-out scenes: below, the share of right answers to {WATCHED} questions a task; above, as "
        "black dots, the loss. <code>tensorboard --logdir</code> on the folder logs/ shows the same, with drawn "
        "boxes.</p>",
        "<h2>Held-out scenes</h2>",
        f"<p class=soft>The first {per_task} of each task, not chosen."
        f'<span class="key" style="color:{TRUE}"></span>true box'
        f'<span class="key" style="color:{FOUND}"></span>the model\'s box</p>',
    ]
    for task, given in answers.items():
        parts.append(f"<h2>{escape(TASKS[task])}</h2>")
        parts.append('<div class="sheet">' + "".join(_figure(task, answer) for answer in given[:per_task]) + "</div>")
    parts += [
        "<h2>What was trained when</h2>",
        f'<div class="panel">{_stages(run)}</div>',
        f"<p class=soft>Recipe <code>{escape(recipe)}</code>, seed {run.seed}. Also: "
        + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in run.seconds.items())
        + ". Parameters: "
        + ", ".join(f"{name} {count:,}" for name, count in run.parameters.items())
        + ".</p>",
        "<h2>What it learned from, and what not</h2>",
        f"<p>{DATA}</p><p>{STAGE_0}</p>",
        "<h2>Try it</h2>",
        "".join(f"<p><code>{escape(command)}</code></p>" for command in commands),
        "<h2>Machine and versions</h2>",
        "<p class=soft>" + " · ".join(f"{escape(k)} {escape(v)}" for k, v in machine.items()) + "</p>",
    ]
    title = "Qwen-VL learns to see handwriting"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = f"<body><main>{''.join(parts)}</main></body>"
    return f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head>{body}</html>"


def _fact(number: str, words: str) -> str:
    return f'<div class="fact"><b>{number}</b><span>{escape(words)}</span></div>'


def _scores(run: Run) -> str:
    moments = [moment for moment in MOMENTS if moment in run.scores]
    heads = ["", *(MOMENTS[m] for m in moments), "blind", "commonest answer"]
    lines = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for task, name in TASKS.items():
        cells = [f"<td>{escape(name)}</td>"]
        cells += [_cell(run.scores[m].get(task), is_last=m == moments[-1]) for m in moments]
        cells += [_cell(run.scores[BLIND].get(task)), _cell(run.commonest.get(task), with_interval=False)]
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "<table>" + "".join(lines) + "</table>"


def _cell(score: Score | None, is_last: bool = False, with_interval: bool = True) -> str:
    if score is None:
        return '<td class="soft">–</td>'
    low, high = score.interval
    interval = f"<small>{low:.2f} – {high:.2f}</small>" if with_interval else ""
    if not is_last:
        return f"<td>{score.mean:.2f}{interval}</td>"
    bar = f'<div class="bar"><i style="width:{score.mean:.1%}"></i></div>'
    return f'<td class="last"><b>{score.mean:.2f}</b>{interval}{bar}</td>'


def _seeds(runs: Sequence[Run]) -> str:
    """Every task at every moment: mean over the seeds, and the lowest and highest of them; after stage 3 also each."""
    moments = [*(moment for moment in MOMENTS if moment in runs[0].scores), BLIND]
    heads = [MOMENTS.get(moment, moment) for moment in moments] + [f"seed {run.seed}, stage 3" for run in runs]
    lines = ["<tr><th></th>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for task, name in TASKS.items():
        cells = [f"<td>{escape(name)}</td>"]
        for moment in moments:
            means = [run.scores[moment][task].mean for run in runs]
            range_of_means = f"<small>{min(means):.2f} – {max(means):.2f}</small>"
            cells.append(f"<td><b>{np.mean(means):.2f}</b>{range_of_means}</td>")
        cells += [f"<td>{run.scores['stage 3'][task].mean:.2f}</td>" for run in runs]
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return (
        f'<h2>{len(runs)} seeds</h2><div class="panel"><table>{"".join(lines)}</table></div>'
        "<p class=soft>Mean over the seeds, and from the lowest to the highest. The held-out scenes and questions are "
        "the same; all else differs: weights, scenes to learn from, their order. In every run stage 1 left the "
        "language model and stage 3 the tower bit-identical.</p>"
    )


def _curve(run: Run) -> str:
    """All stages one after the other, in optimiser steps: losses above, what was answered inside them below."""
    with matplotlib.rc_context(FONT):
        figure = Figure(figsize=(10.4, 4.6), layout="constrained")
        axes, shares = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        start = 0
        for number, (stage, colour) in enumerate(zip(run.stages, CURVES, strict=True)):
            if stage.losses:
                steps, losses = np.array(stage.losses).T
                axes.plot(start + steps, losses, color=colour, lw=0.7, alpha=0.35)
                width = min(15, len(losses))
                smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
                axes.plot(start + steps[width - 1 :], smooth, color=colour, lw=1.8)
            if stage.asked:
                steps = [start + step for step, _ in stage.asked]
                axes.plot(steps, [logged["eval_loss"] for _, logged in stage.asked], "k.", ms=4)
                for task, score in INSIDE_TRAINING.items():
                    right = [logged[f"eval_{task}/{score}"] for _, logged in stage.asked]
                    shares.plot(steps, right, ".-", color=TINTS[task], lw=1.4)
            for panel in (axes, shares):
                panel.axvspan(start, start + stage.steps, color=colour, alpha=0.05, lw=0)
            axes.text(
                start + stage.steps / 2,
                1.0 + 0.08 * (number % 2),  # names of short stages would run into each other on one line
                stage.name,
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
            )
            start += stage.steps
        axes.set(xlim=(0, max(start, 1)), ylim=(0, None), ylabel="loss")
        shares.set(ylim=(0, 1.03), xlabel="optimiser steps", ylabel="right")
        for task, tint in TINTS.items():
            shares.plot([], [], ".-", color=tint, label=TASKS[task])
        shares.legend(loc="lower left", frameon=False)
        for panel in (axes, shares):
            panel.spines[["top", "right"]].set_visible(False)
        return as_svg(figure)


def as_svg(figure: Figure) -> str:
    """The figure as an element of a page, its words as text."""
    text = StringIO()
    with matplotlib.rc_context(FONT):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return text.getvalue()[text.getvalue().index("<svg") :]


def _stages(run: Run) -> str:
    heads = ["", "what learns", "equal bit for bit", "from what", "steps", "conversations", "tokens", "seconds"]
    lines = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for stage in run.stages:
        cut = f"<small>of {stage.planned:,}, to keep the time</small>" if stage.steps < stage.planned else ""
        tokens = f"{stage.tokens:,}" if stage.tokens else "–"
        lines.append(
            f'<tr><td>{escape(stage.name)}</td><td class="words">{escape(stage.trained)}</td>'
            f'<td class="words">{escape(", ".join(stage.unchanged).replace("_", " ") or "–")}</td>'
            f'<td class="words">{escape(stage.learned_from)}</td><td>{stage.steps:,}{cut}</td><td>{stage.seen:,}'
            f"<small>{stage.different:,} different</small></td><td>{tokens}</td><td>{stage.seconds:.0f}</td></tr>"
        )
    return "<table>" + "".join(lines) + "</table>"


def _figure(task: str, answer: Answer) -> str:
    is_right = IS_RIGHT.get(task, is_right_text)(answer)
    shapes = [(box, TRUE) for box in answer.true_boxes] + [(box, FOUND) for box in answer.boxes]
    asked = [(Box(*part["bbox"]), TRUE) for part in answer.example.messages[-2]["content"] if part["type"] == "box"]
    pictures = "".join(
        _svg(picture, [(box, colour) for box, colour in shapes + asked if box.image_index == index])
        for index, picture in enumerate(answer.pictures)
    )
    texts = [part["text"].strip() for part in answer.example.messages[-2]["content"] if "text" in part]
    question = texts[0] if len(texts) == 1 else "What is in the box?"
    given = answer.text or ", ".join(box.label or "box" for box in answer.boxes) or answer.raw or "nothing"
    given = "box" if task == "grounding" and answer.boxes else given
    verdict = "right" if is_right else "wrong"
    truth = "" if is_right or answer.true_boxes else f'<div class="question">true: {escape(answer.truths[0])}</div>'
    return (
        f'<figure><div class="pictures">{pictures}</div><figcaption><div class="question">{escape(question)}</div>'
        f'<div class="answer {verdict}">{"✓" if is_right else "✗"} {escape(given)}</div>{truth}</figcaption></figure>'
    )


def _svg(picture: Image.Image, boxes: Sequence[tuple[Box, str]]) -> str:
    """The picture with boxes, sharp at any size."""
    file = BytesIO()
    picture.save(file, format="PNG")
    data = b64encode(file.getvalue()).decode()
    lines = "".join(
        f'<rect x="{b.x1:.2f}" y="{b.y1:.2f}" width="{b.x2 - b.x1:.2f}" height="{b.y2 - b.y1:.2f}" fill="none" '
        f'stroke="{colour}" stroke-width="{0.9 if colour == TRUE else 0.6}"/>'
        for b, colour in boxes
    )
    width, height = picture.size
    size = f'width="{width}" height="{height}" style="image-rendering:pixelated"'
    return f'<svg viewBox="0 0 {width} {height}"><image href="data:image/png;base64,{data}" {size}/>{lines}</svg>'
