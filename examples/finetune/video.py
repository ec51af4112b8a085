"""Videos: rows {"video": "clip.mp4", "prefix", "suffix"}, then a question about another clip.

python examples/finetune/video.py clips.jsonl clip.mp4 "What happens?" [data.video_fps=4.0 ...]
"""

import sys
from pathlib import Path

from trainers.conversation import Conversation
from trainers.merge import merge
from trainers.recipe_reading import load_recipe
from trainers.train import train


def main(rows: str, video: str, question: str, *overrides: str) -> str:
    recipe = load_recipe(Path(__file__).with_suffix(".yaml"), [f"data.train=[{{path: {rows}}}]", *overrides])
    adapter_folder = train(recipe)
    merged_folder = adapter_folder.with_name("merged")
    merge(adapter_folder, merged_folder)
    # Frames per second, their number and their size are the training's: they were saved with the processor.
    answer = Conversation.load(merged_folder, [], max_new_tokens=64, videos=[video]).ask(question)
    print(answer.text)
    return answer.text


if __name__ == "__main__":
    main(*sys.argv[1:])
