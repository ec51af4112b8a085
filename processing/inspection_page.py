"""Inspections -> one HTML page that needs nothing else: no script, no network, every text of the data escaped."""

from __future__ import annotations

from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from html import escape
from io import BytesIO
from pathlib import Path

from .inspection import Inspection, SeenPicture, SeenShape, Token

_SHAPE_COLOURS = ("#e6550d", "#2ca02c", "#d62728", "#9467bd", "#17becf", "#bcbd22", "#e377c2", "#8c564b")
_NUM_BARS = 24  # of the histogram of lengths
_MOST_LEFT_OUT = 200  # tokens shown of what the length policy leaves out

_STYLE = Path(__file__).with_name("inspection_page.css").read_text(encoding="utf-8")


def inspection_page(
    inspections: Sequence[Inspection], title: str, subtitle: str = "", max_length: int | None = None
) -> str:
    """The page: numbers of all rows, lengths, then every row with its pictures, boxes and coloured tokens."""
    total = sum(i.length for i in inspections)
    supervised = sum(i.num_supervised for i in inspections)
    outcomes = Counter(i.outcome for i in inspections)
    facts = [
        (f"{len(inspections):,}", "rows"),
        (f"{total:,}", "tokens seen"),
        (f"{supervised:,} · {supervised / total:.0%}" if total else "0", "supervised"),
        (f"{sum(i.num_picture_tokens for i in inspections):,}", "tokens of pictures"),
        *((f"{count:,}", _OUTCOMES.get(outcome, outcome)) for outcome, count in outcomes.items()),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Whatever the data holds, the page may neither run nor load anything.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        f'<style>{_STYLE}</style></head><body><main><h1>{escape(title)}</h1><p class="sub soft">{escape(subtitle)}</p>'
        f'<div class="facts">{"".join(f"<div><b>{number}</b>{escape(name)}</div>" for number, name in facts)}</div>'
        f'<div class="panel">{_LEGEND}{_histogram(inspections, max_length)}</div>'
        f"{''.join(map(_article, inspections))}</main></body></html>"
    )


_OUTCOMES = {
    "kept": "fit as they are",
    "shrink": "fit with smaller pictures",
    "trim": "fit without their last turns",
    "trim + shrink": "fit with fewer turns and pixels",
    "drop": "dropped, too long",
    "refused": "refused",
}
_LEGEND = (
    '<div class="legend">'
    '<span><span class="supervised">&nbsp;supervised&nbsp;</span> the model learns to write it</span>'
    "<span>plain: it only reads it</span>"
    '<span><span class="special">&nbsp;special&nbsp;</span> special token, only read</span>'
    '<span><span class="picture">&nbsp;picture&nbsp;</span> visual tokens</span>'
    '<span><span class="left_out">&nbsp;left out&nbsp;</span> by the length policy</span></div>'
)


def _article(inspection: Inspection) -> str:
    kind = inspection.outcome.split(" ")[0]
    length = f"{inspection.length:,} tokens"
    if inspection.length != inspection.whole_length:
        length = f"{inspection.length:,} of {inspection.whole_length:,} tokens"
    share = f" · {inspection.num_supervised:,} supervised · {inspection.num_picture_tokens:,} for pictures"
    task = f'<span class="soft">{escape(inspection.task)}</span>' if inspection.task else ""
    problem = f'<p class="problem">{escape(inspection.problem)}</p>' if inspection.problem else ""
    pictures = "".join(_figure(seen, number) for number, seen in enumerate(inspection.pictures, start=1))
    return (
        f'<article><header class="row"><h2>{escape(inspection.source.where)}</h2>{task}'
        f'<span class="badge {kind}">{escape(_OUTCOMES.get(inspection.outcome, inspection.outcome))}</span>'
        f'<span class="numbers">{length}{share}</span></header>{problem}<div class="columns">'
        + (f'<div class="pictures">{pictures}</div>' if pictures else "")
        + (f'<div class="tokens"><pre>{_tokens(inspection.tokens)}</pre></div>' if inspection.tokens else "")
        + "</div></article>"
    )


def _tokens(tokens: Sequence[Token]) -> str:
    """All tokens; of what is left out only the beginning; a weight stands at the first token that has it."""
    kept = [token for token in tokens if token.kind != "left_out"]
    left_out = tokens[len(kept) :]
    shown = [*kept, *left_out[:_MOST_LEFT_OUT]]
    more = sum(token.number for token in left_out[_MOST_LEFT_OUT:])
    weights = [1.0, *(token.weight if token.kind == "supervised" else 1.0 for token in shown)]
    pieces = [
        _token(token, weight != before) for token, before, weight in zip(shown, weights, weights[1:], strict=False)
    ]
    return "".join(pieces) + (f'<span class="left_out"> … and {more:,} more tokens</span>' if more else "")


def _token(token: Token, shows_weight: bool) -> str:
    text = escape(token.text)
    if token.kind == "picture" or (token.number > 1 and token.is_special):
        text = f"{token.number} × {text}"
    # Blanks that would not be seen; a line break is shown and made.
    for blank, shown in (("\r", "␍"), ("\t", "⇥\t"), ("\n", "⏎")):
        text = text.replace(blank, f'<b class="mark">{shown}</b>' + ("\n" if blank == "\n" else ""))
    weight = f'<b class="weight">×{token.weight:g}</b>' if token.kind == "supervised" and shows_weight else ""
    return f'{weight}<span class="{token.kind}">{text}</span>'


def _figure(seen: SeenPicture, number: int) -> str:
    width, height = seen.picture.size
    labels = list(dict.fromkeys(shape.label for shape in seen.shapes))
    colours = {label: _SHAPE_COLOURS[number % len(_SHAPE_COLOURS)] for number, label in enumerate(labels)}
    names = "".join(
        f'<li><i style="background:{colours[label]}"></i>{escape(label or "(no label)")} × '
        f"{sum(shape.label == label for shape in seen.shapes)}</li>"
        for label in labels
    )
    original = f"{seen.original_size[1]} × {seen.original_size[0]}"
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img">'
        f'<image href="{_address(seen)}" width="{width}" height="{height}"/>'
        f"{''.join(_drawn(shape, colours[shape.label], max(width, height)) for shape in seen.shapes)}</svg>"
        f"<figcaption>Picture {number} as the model sees it: {width} × {height} pixels, {seen.num_tokens} tokens "
        f"(original {original})" + (f"<ul>{names}</ul>" if names else "") + "</figcaption></figure>"
    )


def _address(seen: SeenPicture) -> str:
    """The picture as a data address: PNG, or JPEG where that is smaller (photographs)."""
    files = {}
    for name, options in (("png", {"optimize": True}), ("jpeg", {"quality": 92})):
        file = BytesIO()
        seen.picture.save(file, name, **options)
        files[name] = file.getvalue()
    name = min(files, key=lambda name: len(files[name]))
    return f"data:image/{name};base64,{b64encode(files[name]).decode()}"


def _drawn(shape: SeenShape, colour: str, side: int) -> str:
    """The outline of a shape, with a light rim so that it is seen on any ground; its label appears under the mouse."""
    if shape.kind == "point":
        (x, y), radius = shape.corners[0], side / 60
        outline = f'circle cx="{x:.2f}" cy="{y:.2f}" r="{radius:.2f}"'
    elif shape.kind == "box":
        (x1, y1), (x2, y2) = shape.corners
        outline = f'rect x="{x1:.2f}" y="{y1:.2f}" width="{x2 - x1:.2f}" height="{y2 - y1:.2f}"'
    else:
        outline = f'polygon points="{" ".join(f"{x:.2f},{y:.2f}" for x, y in shape.corners)}"'
    title = f"<title>{escape(shape.label or shape.kind)}</title>"
    rim = f'<{outline} fill="none" stroke="#fff" stroke-opacity="0.85" stroke-width="{side / 80:.2f}"/>'
    return (
        f'{rim}<{outline} fill="{colour}" fill-opacity="0.08" stroke="{colour}" stroke-width="{side / 160:.2f}">'
        + (f"{title}</{outline.split(' ')[0]}>")
    )


def _histogram(inspections: Sequence[Inspection], max_length: int | None) -> str:
    """Lengths before the length policy, with the limit; nothing for fewer than two rows."""
    lengths = [i.whole_length for i in inspections if i.whole_length]
    if len(lengths) < 2:
        return ""
    top = max([*lengths, max_length or 0])
    counts = Counter(min(_NUM_BARS - 1, length * _NUM_BARS // top) for length in lengths)
    tallest, width, height = max(counts.values()), 720, 90
    bar = width / _NUM_BARS
    bars = "".join(
        f'<rect x="{index * bar + 1:.1f}" y="{height - count / tallest * (height - 16):.1f}" width="{bar - 2:.1f}" '
        f'height="{count / tallest * (height - 16):.1f}" rx="2" fill="var(--sup)" opacity="0.65">'
        f"<title>{count} rows of {index * top // _NUM_BARS} to {(index + 1) * top // _NUM_BARS} tokens</title></rect>"
        for index, count in sorted(counts.items())
    )
    limit = ""
    if max_length is not None:
        x = max_length / top * width
        anchor, gap = ("end", -5) if x > width / 2 else ("start", 5)
        limit = (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="var(--out)" stroke-dasharray="4 3"/>'
            f'<text x="{x + gap:.1f}" y="11" text-anchor="{anchor}" font-size="11" fill="var(--out)">'
            f"max_length {max_length:,}</text>"
        )
    return (
        f'<svg class="histogram" viewBox="0 0 {width} {height + 18}">'
        f'{bars}<line x1="0" x2="{width}" y1="{height}" y2="{height}" stroke="var(--line)"/>{limit}'
        f'<text x="0" y="{height + 13}" font-size="11" fill="var(--soft)">0</text><text x="{width}" y="{height + 13}" '
        f'font-size="11" text-anchor="end" fill="var(--soft)">{top:,} tokens before the length policy</text></svg>'
    )
