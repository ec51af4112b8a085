"""LoRA, then a question to base and adapter put together again in memory, nothing merged.

python examples/finetune/lora.py rows.jsonl picture.png "What is this?" [lora.rank=16 ...]
"""

import sys
from pathlib import Path

from transformers import AutoModelForImageTextToText

from processing.pictures import load_picture
from processing.processing_families import load_processor
from trainers.conversation import Conversation
from trainers.lora import TORCH_DTYPES, load_lora
from trainers.recipe_reading import load_recipe
from trainers.train import train


def main(rows: str, picture: str, question: str, *overrides: str) -> str:
    recipe = load_recipe(Path(__file__).with_suffix(".yaml"), [f"data.train=[{{path: {rows}}}]", *overrides])
    adapter_folder = train(recipe)
    dtype = TORCH_DTYPES[recipe.model.dtype]
    base = AutoModelForImageTextToText.from_pretrained(recipe.model.path, dtype=dtype)
    model = load_lora(base, adapter_folder, dtype=dtype).eval()
    # The processor of the adapter's folder: it knows the resolution of the training.
    conversation = Conversation(model, load_processor(adapter_folder), [load_picture(picture)], max_new_tokens=64)
    answer = conversation.ask(question)
    print(answer.text)
    return answer.text


if __name__ == "__main__":
    main(*sys.argv[1:])
