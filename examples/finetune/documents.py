"""Pages to QwenVL HTML: rows {"image", "prefix": "QwenVL HTML", "suffix": "<body>..data-bbox..</body>"}, then a page.

python examples/finetune/documents.py pages.jsonl page.png [data.picture_side=2016 ...]
"""

import sys
from pathlib import Path

from processing.document_boxes import document_from_model
from processing.pictures import load_picture
from trainers.conversation import Conversation
from trainers.merge import merge
from trainers.recipe_reading import load_recipe
from trainers.train import train


def main(rows: str, page: str, *overrides: str) -> str:
    recipe = load_recipe(Path(__file__).with_suffix(".yaml"), [f"data.train=[{{path: {rows}}}]", *overrides])
    adapter_folder = train(recipe)
    merged_folder = adapter_folder.with_name("merged")
    merge(adapter_folder, merged_folder)
    picture = load_picture(page)
    conversation = Conversation.load(merged_folder, [picture], max_new_tokens=4096)
    html = conversation.ask("QwenVL HTML").text
    (frame,) = conversation.processor.frames([(picture.height, picture.width)])
    html = document_from_model(html, frame, conversation.processor.convention)  # boxes in pixels of the page
    print(html)
    return html


if __name__ == "__main__":
    main(*sys.argv[1:])
