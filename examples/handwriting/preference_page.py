"""The runs of examples/handwriting/preference.py -> one HTML page: gains, what was rewarded on the way, the table."""

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.handwriting.preference_scores import TITLES, Gains, averages, gains
from examples.handwriting.report import STYLE, as_svg

COLOURS = {"sft": "#868e96", "dpo": "#9c36b5", "grpo": "#0b8f5a", "rloo": "#1971c2", "ppo": "#e8590c"}
SMOOTHED = 5  # logged values


def page(records: Sequence[dict[str, Any]]) -> str:
    """The page about all runs; needs nothing else."""
    by_method = gains(records)
    minutes = np.mean([record["minutes"] for record in records])
    parts = [
        "<h1>After SFT: what do DPO, GRPO, RLOO and PPO add?</h1>",
        f"<p class=soft>Each run goes on from the same model for {minutes:.1f} minutes of processor time; sft "
        "learns from the right answers as before. Gains are on held-out questions; 95 % intervals.</p>",
        f'<div class="panel curve">{_gains(by_method)}</div>',
        "<h2>Reward of the sampled completions while learning</h2>",
        f'<div class="panel curve">{_rewards(records)}</div>',
        "<h2>Scores</h2>",
        f'<div class="panel">{_table(records, by_method)}</div>',
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>After SFT</title>'
    body = f"<body><main>{''.join(parts)}</main></body>"
    return f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head>{body}</html>"


def _gains(by_method: Sequence[Gains]) -> str:
    figure = Figure(figsize=(10.4, 2.6), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(TITLES), sharey=True), TITLES.items(), strict=True):
        axes.axvline(0, color="#adb5bd", lw=1)
        for row, one in enumerate(by_method):
            _, gain, low, high = one.of[key]
            axes.plot([low, high], [row, row], color=COLOURS[one.method], lw=2)
            axes.plot(gain, row, "o", color=COLOURS[one.method])
        axes.set_title(title, fontsize=8)
        axes.set_yticks(range(len(by_method)), [one.method for one in by_method])
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()  # of all: they share it
    return as_svg(figure)


def _rewards(records: Sequence[dict[str, Any]]) -> str:
    figure = Figure(figsize=(10.4, 2.8), layout="constrained")
    axes = figure.subplots()
    named: set[str] = set()
    for record in records:
        logged = [(entry["step"], entry["reward"]) for entry in record["log"] if "reward" in entry]
        if len(logged) < SMOOTHED:
            continue
        steps, rewards = np.array(logged).T
        smooth = np.convolve(rewards, np.ones(SMOOTHED) / SMOOTHED, mode="valid")
        method = record["method"]
        label = None if method in named else method
        named.add(method)
        axes.plot(steps[SMOOTHED - 1 :], smooth, color=COLOURS[method], lw=1.4, label=label)
    if named:
        axes.legend(frameon=False)
    axes.set(xlabel="step", ylabel="reward")
    axes.spines[["top", "right"]].set_visible(False)
    return as_svg(figure)


def _table(records: Sequence[dict[str, Any]], by_method: Sequence[Gains]) -> str:
    lines = ["<tr>" + "".join(f"<th>{head}</th>" for head in ("", "runs", *TITLES.values())) + "</tr>"]
    starts = "".join(f"<td>{np.mean(averages(records, 'before', key)):.3f}</td>" for key in TITLES)
    lines.append(f"<tr><td>start</td><td></td>{starts}</tr>")
    for one in by_method:
        cells = "".join(
            f"<td>{after:.3f}<small>{gain:+.3f}; {low:+.3f} to {high:+.3f}</small></td>"
            for after, gain, low, high in one.of.values()
        )
        lines.append(f"<tr><td>{escape(one.method)}</td><td>{one.runs}</td>{cells}</tr>")
    return "<table>" + "".join(lines) + "</table>"
