"""Several pictures: rows {"images": [..], "prefix", "suffix"} then a question about two of them.

    python examples/finetune/several_pictures.py differences.jsonl before.png after.png [data.picture_side=336 ...]

Which picture is which is said by their order: "the first picture" is images[0]. To put pictures in order or to compare
them are rows of this shape with another prefix.
"""

import sys
from pathlib import Path

from processing.pictures import load_picture
from trainers.conversation import Conversation
from trainers.merge import merge
from trainers.recipe_reading import load_recipe
from trainers.train import train


def main(rows: str, before: str, after: str, *overrides: str) -> str:
    recipe = load_recipe(Path(__file__).with_suffix(".yaml"), [f"data.train=[{{path: {rows}}}]", *overrides])
    adapter_folder = train(recipe)
    merged_folder = adapter_folder.with_name("merged")
    merge(adapter_folder, merged_folder)
    pictures = [load_picture(before), load_picture(after)]
    answer = Conversation.load(merged_folder, pictures, max_new_tokens=64).ask("What has changed?")
    print(answer.text)
    return answer.text


if __name__ == "__main__":
    main(*sys.argv[1:])
