"""QLoRA: does it fit this GPU, train in 4 bits, merge onto the unquantised model, ask.

python examples/finetune/qlora.py rows.jsonl picture.png "What is this?" [data.max_length=4096 ...]
"""

import sys
from pathlib import Path

from processing.pictures import load_picture
from trainers.conversation import Conversation
from trainers.estimate import estimate
from trainers.merge import merge
from trainers.recipe_reading import load_recipe
from trainers.train import train


def main(rows: str, picture: str, question: str, *overrides: str) -> str:
    recipe = load_recipe(Path(__file__).with_suffix(".yaml"), [f"data.train=[{{path: {rows}}}]", *overrides])
    needed = estimate(recipe)
    if not needed.fits(recipe.hardware.memory_gib):
        sys.exit(f"It needs {needed.gib_needed:.1f} GiB, the recipe says {recipe.hardware.memory_gib} GiB.")
    adapter_folder = train(recipe)
    merged_folder = adapter_folder.with_name("merged")
    print(merge(adapter_folder, merged_folder))  # onto the weights that the 4 bits were made from
    answer = Conversation.load(merged_folder, [load_picture(picture)], max_new_tokens=64).ask(question)
    print(answer.text)
    return answer.text


if __name__ == "__main__":
    main(*sys.argv[1:])
