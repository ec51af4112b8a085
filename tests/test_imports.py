"""Imports point down: the model and the processor stand alone, the trainers sit on both, nothing sits on the edges."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"modeling_qwenvl", "processing", "trainers", "hub_upload", "benchmarks", "examples", "tests"}
MAY_IMPORT: dict[str, set[str]] = {
    "modeling_qwenvl": set(),
    "processing": set(),
    "trainers": {"modeling_qwenvl", "processing", "trainers"},
    "hub_upload.py": OURS - {"tests", "hub_upload"},
    "benchmarks": OURS - {"tests"},
    "examples": OURS - {"tests"},
}


def imports_of(source: str) -> list[tuple[int, int, str]]:
    """(line, relative level, dotted name) of every import in `source`, also of those inside functions."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, 0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, node.level, node.module or ""))
    return found


def violations(source: str, place: str) -> list[str]:
    """What in `source`, a file of `place` (a key of MAY_IMPORT), breaks the direction rule."""
    wrong = []
    flat = not MAY_IMPORT[place]
    for line, level, name in imports_of(source):
        if level == 0 and name.split(".")[0] in OURS - MAY_IMPORT[place]:
            wrong.append(f"line {line}: {place} may not import {name}")
        # The Hub copies these two packages file by file into one flat folder: only `from .sibling import x` survives.
        if flat and (level > 1 or (level == 1 and ("." in name or not name))):
            wrong.append(f"line {line}: only `from .sibling import ...` is allowed in {place}")
    return wrong


def files_of(place: str) -> list[Path]:
    return [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_imports_point_down(place):
    wrong = [f"{path.relative_to(ROOT)} {w}" for path in files_of(place) for w in violations(path.read_text(), place)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("place", ["modeling_qwenvl", "processing"])
def test_packages_that_the_hub_copies_are_flat(place):
    assert [p.relative_to(ROOT) for p in files_of(place) if p.parent != ROOT / place] == []


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("import processing.rows", "modeling_qwenvl"),
        ("def f():\n    from trainers.loss import x", "processing"),
        ("from ..processing import x", "modeling_qwenvl"),
        ("from . import rows", "processing"),
        ("import processing.rows", "processing"),
        ("import hub_upload", "trainers"),
        ("from examples.handwriting import scenes", "trainers"),
    ],
)
def test_the_rule_sees_each_way_of_breaking_it(source, place):
    assert violations(source, place)
