"""DoRA, merged into an ordinary model folder, then a question.

python examples/finetune/dora.py rows.jsonl picture.png "What is this?" [lora.rank=32 ...]
"""

import sys
from pathlib import Path

from processing.pictures import load_picture
from trainers.conversation import Conversation
from trainers.merge import merge
from trainers.recipe_reading import load_recipe
from trainers.train import train


def main(rows: str, picture: str, question: str, *overrides: str) -> str:
    recipe = load_recipe(Path(__file__).with_suffix(".yaml"), [f"data.train=[{{path: {rows}}}]", *overrides])
    adapter_folder = train(recipe)
    merged_folder = adapter_folder.with_name("merged")
    print(merge(adapter_folder, merged_folder))
    answer = Conversation.load(merged_folder, [load_picture(picture)], max_new_tokens=64).ask(question)
    print(answer.text)
    return answer.text


if __name__ == "__main__":
    main(*sys.argv[1:])
