"""Full SFT, then a question to the trained model.

python examples/finetune/full.py rows.jsonl picture.png "What is this?" [optimizer.learning_rate=2e-5 ...]
"""

import sys
from pathlib import Path

from processing.pictures import load_picture
from trainers.conversation import Conversation
from trainers.recipe_reading import load_recipe
from trainers.train import train


def main(rows: str, picture: str, question: str, *overrides: str) -> str:
    recipe = load_recipe(Path(__file__).with_suffix(".yaml"), [f"data.train=[{{path: {rows}}}]", *overrides])
    model_folder = train(recipe)  # weights, processor and chat template, as AutoModelForImageTextToText loads them
    answer = Conversation.load(model_folder, [load_picture(picture)], max_new_tokens=64).ask(question)
    print(answer.text)
    return answer.text


if __name__ == "__main__":
    main(*sys.argv[1:])
