"""Grounding: RefCOCO rows, {"image", "bbox": [x, y, width, height], "sentence"}, then a box drawn on a picture.

python examples/finetune/grounding.py refs.jsonl picture.png "the left cup" [optimizer.max_steps=500 ...]
"""

import sys
from pathlib import Path

from processing.drawing import draw_shapes
from processing.pictures import load_picture
from processing.row_formats_detection import REFERRING_QUESTION
from trainers.conversation import Conversation
from trainers.merge import merge
from trainers.recipe_reading import load_recipe
from trainers.train import train


def main(rows: str, picture: str, phrase: str, *overrides: str) -> str:
    recipe = load_recipe(Path(__file__).with_suffix(".yaml"), [f"data.train=[{{path: {rows}}}]", *overrides])
    adapter_folder = train(recipe)
    merged_folder = adapter_folder.with_name("merged")
    merge(adapter_folder, merged_folder)
    seen = load_picture(picture)
    answer = Conversation.load(merged_folder, [seen], max_new_tokens=64).ask(REFERRING_QUESTION.format(phrase=phrase))
    for shape in answer.shapes:  # in pixels of the picture as it lies on the disk, whatever the model saw
        print(shape)
    for problem in answer.problems:
        print(f"unreadable: {problem.piece} ({problem.reason})")
    draw_shapes(seen, answer.shapes).save(merged_folder.with_name("answer.png"))
    return answer.text


if __name__ == "__main__":
    main(*sys.argv[1:])
