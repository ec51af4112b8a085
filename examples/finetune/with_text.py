"""Pictures and pure text mixed: two files, drawn three to one, then a question without any picture.

python examples/finetune/with_text.py rows.jsonl text.jsonl "Who was Ada Lovelace?" [run.seed=1 ...]
"""

import sys
from pathlib import Path

from trainers.conversation import Conversation
from trainers.merge import merge
from trainers.recipe_reading import load_recipe
from trainers.train import train


def main(rows: str, text: str, question: str, *overrides: str) -> str:
    files = f"data.train=[{{path: {rows}, weight: 3.0}}, {{path: {text}, weight: 1.0}}]"
    adapter_folder = train(load_recipe(Path(__file__).with_suffix(".yaml"), [files, *overrides]))
    merged_folder = adapter_folder.with_name("merged")
    merge(adapter_folder, merged_folder)
    answer = Conversation.load(merged_folder, pictures=[], max_new_tokens=64).ask(question)
    print(answer.text)
    return answer.text


if __name__ == "__main__":
    main(*sys.argv[1:])
