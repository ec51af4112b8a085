"""Random rows for the models of small_models.py: ids, labels and pixels as the data path would make them."""

import math
import random

import torch

from benchmarks.small_models import END_ID, IMAGE_ID, PICTURE_TOKENS, START_ID, VOCABULARY, FamilyName
from processing.encoded_example import EncodedExample

SIDE, PATCH = 448, 14


def picture_row(
    family: FamilyName, prompt: int, answer: int, seed: int, pictures: int = 1, vocabulary: int = VOCABULARY
) -> EncodedExample:
    """Pictures, then `prompt` tokens of text without loss, then `answer` tokens with it."""
    generator = torch.Generator().manual_seed(seed)
    picture = [vocabulary + START_ID, *[vocabulary + IMAGE_ID] * PICTURE_TOKENS, vocabulary + END_ID]
    text = torch.randint(2, vocabulary - 10, (prompt + answer,), generator=generator)
    ids = torch.cat([torch.tensor(picture * pictures, dtype=torch.long), text])
    labels = torch.full_like(ids, -100)
    labels[-answer:] = ids[-answer:]
    if family == "qwen_vl":
        pixels = {"pixel_values": torch.randn(pictures, 3, SIDE, SIDE, generator=generator)} if pictures else {}
        return EncodedExample(ids, labels, vision=pixels)
    side = SIDE // PATCH
    flat = {
        "pixel_values": torch.randn(pictures * side * side, 3 * 2 * PATCH * PATCH, generator=generator),
        "image_grid_thw": torch.tensor([[1, side, side]] * pictures),
    }
    is_picture = (ids == vocabulary + IMAGE_ID).long()
    return EncodedExample(ids, labels, mm_token_type_ids=is_picture, vision=flat if pictures else {})


def picture_rows(family: FamilyName, count: int, vocabulary: int = VOCABULARY) -> list[EncodedExample]:
    """One picture and 40 tokens of prompt each, answers of 30 to 90 tokens."""
    return [picture_row(family, 40, 30 + 20 * (number % 4), number, vocabulary=vocabulary) for number in range(count)]


def mixed_rows(family: FamilyName, count: int, vocabulary: int = VOCABULARY, seed: int = 0) -> list[EncodedExample]:
    """Rows of a common mix: half of them text alone, answers log-normal (median 60 tokens, few of several hundred)."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        answer = min(700, max(10, round(math.exp(rng.gauss(math.log(60), 1.0)))))
        pictures = rng.randrange(2)
        rows.append(picture_row(family, 30, answer, number, pictures, vocabulary))
    return rows
