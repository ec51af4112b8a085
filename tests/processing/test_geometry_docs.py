"""The page about coordinates and the examples in the docstrings say what happens."""

import doctest
import importlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from processing import augmentation, coordinates, grounding_text
from processing.processing_families import Qwen2_5_VLProcessor

PAGE = Path(__file__).resolve().parents[2] / "docs/coordinates.md"
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
MODULES = [
    "answer_parsing",
    "augmentation",
    "augmented_conversations",
    "coordinates",
    "direction_words",
    "drawing",
    "grounding_text",
    "picture_sources",
    "pictures",
    "smart_resize",
]


def test_the_page_shows_what_happens(byte_tokenizer):
    limits = {"shortest_edge": 3136, "longest_edge": 1_003_520}
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessorPil(size=limits), byte_tokenizer, Qwen2VLVideoProcessor())
    result = doctest.testfile(str(PAGE), module_relative=False, globs={"processor": processor}, optionflags=FLAGS)
    assert (result.failed, result.attempted > 10) == (0, True)


@pytest.mark.parametrize("module", MODULES)
def test_the_docstrings_show_what_happens(module):
    names = {"Image": Image, "np": np} | vars(coordinates) | vars(grounding_text) | vars(augmentation)
    names = {name: value for name, value in names.items() if not name.startswith("__")}
    result = doctest.testmod(importlib.import_module(f"processing.{module}"), extraglobs=names, optionflags=FLAGS)
    assert (result.failed, result.attempted > 0) == (0, True)
