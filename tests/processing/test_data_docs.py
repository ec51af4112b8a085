"""What docs/data.md and docs/documents.md say is so: their rows parse, their examples give what they print."""

import doctest
import importlib
import json
import re
from copy import deepcopy
from functools import reduce
from operator import getitem
from pathlib import Path
from random import Random

import pytest

from processing.example import RowError
from processing.row_formats import ROW_FORMATS, examples_from_row, recognise
from processing.tasks import TASKS, fields_of

DOCS = Path(__file__).resolve().parents[2] / "docs"
MODULES = (
    *(
        "checking",
        "document_boxes",
        "document_markdown",
        "document_parsing",
        "documents",
        "example",
        "markdown_tables",
    ),
    *("reading_order", "row_formats", "row_formats_detection", "row_pictures", "rows", "tagged_text", "tasks"),
)
SECTION = re.compile(r"^### (\w+)\n(.*?)(?=^##)", re.MULTILINE | re.DOTALL)
JSON_BLOCK = re.compile(r"^```json\n(.*?)^```", re.MULTILINE | re.DOTALL)


def documented_rows():
    sections = SECTION.findall((DOCS / "data.md").read_text(encoding="utf-8"))
    return {name: json.loads(block) for name, text in sections for block in JSON_BLOCK.findall(text)}


def test_every_format_has_an_example_in_the_docs():
    assert set(documented_rows()) == set(ROW_FORMATS)


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_the_row_in_the_docs_is_recognised_and_read(name):
    row = documented_rows()[name]
    assert recognise(row) == name
    examples = examples_from_row(row)
    assert len(examples) == (2 if name == "refcoco" else 1)
    assert all(example.num_pictures == (2 if name == "messages" else 1) for example in examples)


def test_the_rows_in_the_docs_say_what_the_text_around_them_says():
    rows = documented_rows()
    (detection,) = examples_from_row(rows["coco"])
    assert detection.left_out == {"crowd annotation": 1}
    (reward,) = examples_from_row(rows["reward"])
    assert reward.columns == {"level": "easy"}
    (page,) = examples_from_row(rows["prefix_suffix"])
    assert page.messages[1]["content"][0]["type"] == "document"
    (ocr,) = examples_from_row(rows["task"])
    assert ocr.style == "plain"


def test_the_document_row_is_read():
    (row,) = (json.loads(block) for block in JSON_BLOCK.findall((DOCS / "documents.md").read_text(encoding="utf-8")))
    (example,) = examples_from_row(row)
    assert example.messages[1]["content"][0]["type"] == "document"


VALUES = [
    *(None, True, 0, -1, 7, float("inf"), float("nan"), "", "a", "<image>", "<box>", b"x", [], [[]], {}, [{}], [None]),
    *([1, 2, 3, 4], ["a"], {"a": 1}, {"type": "image"}, {"bytes": None, "path": None}),
]


def places(node, path=()):
    """The paths to everything inside a row."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path] * bool(path) + [place for key, value in items for place in places(value, (*path, key))]


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_a_row_with_something_wrong_anywhere_is_read_or_refused_and_never_breaks_the_reader(name):
    random = Random(7)
    num_refused = 0
    for _ in range(300):
        row = documented_rows()[name]
        for _ in range(random.randint(1, 2)):
            *path, last = random.choice(places(row) or [("id",)])
            node = reduce(getitem, path, row)
            if random.random() < 0.15 and (isinstance(node, list) or last in node):
                del node[last]
            else:
                node[last] = deepcopy(random.choice(VALUES))
        try:
            examples_from_row(row, format=random.choice([None, name]))
        except RowError:
            num_refused += 1
    assert 100 < num_refused < 300


@pytest.mark.parametrize("task", TASKS)
def test_the_table_of_tasks_names_the_fields_that_a_task_needs(task):
    text = (DOCS / "data.md").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if line.startswith("| `") and f"`{task}`" in line.split("|")[1])
    assert all(f"`{field}`" in line for field in fields_of(task)[0])


@pytest.mark.parametrize("page", ["data.md", "documents.md"])
def test_the_examples_in_the_docs_give_what_they_print(page):
    result = doctest.testfile(str(DOCS / page), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert (result.failed, result.attempted > 3) == (0, True)


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_in_the_docstrings_give_what_they_print(module):
    flags = doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(importlib.import_module(f"processing.{module}"), optionflags=flags)
    assert (result.failed, result.attempted > 0) == (0, True)
