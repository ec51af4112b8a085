"""The prompts and answers of stage 2 are, character by character, those of the paper's appendix B.1."""

from copy import deepcopy

import pytest
from PIL import Image

from processing.coordinates import CONVENTIONS, Frame, make_shape
from processing.grounding_text import render_ref, render_shapes
from processing.image_processing_pil_qwenvl import QwenVLImageProcessorPil
from processing.processing_qwenvl import QwenVLProcessor
from processing.supervision import encode
from processing.tasks import (
    PROMPTS,
    TASKS,
    Settings,
    caption,
    caption_with_grounding,
    fields_of,
    grounded_captioning,
    ocr_vqa,
    ocr_with_quads,
    pure_text,
    referring_grounding,
    vqa,
)

QWENVL = CONVENTIONS["qwenvl"]
# A picture of 1000 x 1000 pixels, so that a pixel is a thousandth and the paper's numbers can be given as pixels.
FRAME = Frame(height=1000, width=1000, model_height=448, model_width=448)


def written(example):
    """(prompt, answer) of a plain example as the model reads them, with `p` for every picture's path."""
    texts = []
    for message in example.messages:
        text = message["content"] if isinstance(message["content"], str) else ""
        for part in message["content"] if not text else ():
            if part["type"] == "image":
                text += f"<img>{part['image']}</img>"
            elif part["type"] == "text":
                text += part["text"]
            elif part["type"] == "ref":
                text += render_ref(part["text"], QWENVL)
            else:
                numbers = part[{"box": "bbox", "quad": "quad"}[part["type"]]]
                several = numbers if isinstance(numbers[0], list) else [numbers]
                shapes = [make_shape(part["type"], one, part.get("label")) for one in several]
                text += render_shapes(shapes, [FRAME], QWENVL)
        texts.append(text)
    assert example.style == "plain"
    return tuple(texts)


def test_caption():
    assert written(caption("p", "the beautiful flowers for design.")) == (
        "<img>p</img>Generate the caption in English:",
        " the beautiful flowers for design.",
    )


@pytest.mark.parametrize("task", [vqa, ocr_vqa])
def test_questions(task):
    example = task("p", "What is the title of this book?", "Asi Se Dice!, Volume 2")
    assert written(example) == (
        "<img>p</img> What is the title of this book? Answer:",
        " Asi Se Dice!, Volume 2",
    )
    assert example.task == task.__name__


def test_caption_with_grounding():
    pieces = [
        "Beautiful shot of ",
        {"label": "bees", "bbox": [[661, 612, 833, 812], [120, 555, 265, 770]]},
        " gathering nectars from ",
        {"label": "an apricot flower", "bbox": [224, 13, 399, 313]},
    ]
    assert written(caption_with_grounding("p", pieces)) == (
        "<img>p</img>Generate the caption in English with grounding:",
        " Beautiful shot of <ref>bees</ref><box>(661,612),(833,812)</box><box>(120,555),(265,770)</box> gathering "
        "nectars from <ref>an apricot flower</ref><box>(224,13),(399,313)</box>",
    )


def test_referring_grounding_has_nothing_between_the_phrase_and_the_box():
    assert written(referring_grounding("p", "the ear on a giraffe", [176, 106, 232, 160])) == (
        "<img>p</img><ref>the ear on a giraffe</ref>",
        "<box>(176,106),(232,160)</box>",
    )


def test_grounded_captioning():
    assert written(grounded_captioning("p", [360, 542, 476, 705], "Yellow cross country ski racing gloves")) == (
        "<img>p</img><ref>This</ref><box>(360,542),(476,705)</box> is",
        " Yellow cross country ski racing gloves",
    )


def test_ocr_with_quads():
    lines = [
        {"text": "It is managed", "quad": [568, 121, 625, 131, 624, 182, 567, 172]},
        {"text": "by", "quad": [2, 3, 5, 7, 11, 13, 17, 19]},
    ]
    assert written(ocr_with_quads("p", lines)) == (
        "<img>p</img>OCR with grounding:",
        " <ref>It is managed</ref> <quad>(568,121),(625,131),(624,182),(567,172)</quad>"
        "<ref>by</ref> <quad>(2,3),(5,7),(11,13),(17,19)</quad>",
    )
    apart = Settings(blank_before_quad=False, between_lines="\n", blank_in="prompt")
    assert written(ocr_with_quads("p", lines, settings=apart)) == (
        "<img>p</img>OCR with grounding: ",
        "<ref>It is managed</ref><quad>(568,121),(625,131),(624,182),(567,172)</quad>\n"
        "<ref>by</ref><quad>(2,3),(5,7),(11,13),(17,19)</quad>",
    )


def test_pure_text_trains_all_of_the_text_and_has_no_prompt():
    assert written(pure_text("All of it.")) == ("", "All of it.")


def test_the_blank_can_end_the_prompt_and_the_one_after_the_picture_can_be_left_out():
    settings = Settings(blank_in="prompt", blank_after_picture=False)
    assert written(vqa("p", "Who?", "Ada", settings=settings)) == ("<img>p</img>Who? Answer: ", "Ada")
    with pytest.raises(ValueError, match="blank_in is 'both'"):
        Settings(blank_in="both")


def test_chinese_prompts_have_no_blanks():
    box = [2, 3, 5, 7]
    assert written(caption("p", "一只狗", "zh")) == ("<img>p</img>用中文生成图片描述：", "一只狗")
    assert written(vqa("p", "谁？", "阿达", "zh")) == ("<img>p</img>谁？回答：", "阿达")
    assert written(grounded_captioning("p", box, "狗", "zh")) == (
        "<img>p</img><ref>这</ref><box>(2,3),(5,7)</box>是",
        "狗",
    )
    assert all(set(prompts) == {"en", "zh"} for prompts in PROMPTS.values())


def test_units_of_the_boxes_are_passed_on():
    prompt, _ = grounded_captioning("p", [2, 3, 5, 7], "dog", normalized=1000).messages
    assert prompt["content"][1]["normalized"] == 1000


def test_texts_next_to_each_other_are_one_part_because_they_are_tokenized_together():
    _, answer = caption_with_grounding("p", ["A ", "dog ", {"label": "dog", "bbox": [2, 3, 5, 7]}]).messages
    assert [part["type"] for part in answer["content"]] == ["text", "box"]
    assert answer["content"][0]["text"] == " A dog "


def test_with_the_real_vocabulary_the_loss_begins_at_the_blank_before_the_answer(original_tokenizer):
    processor = QwenVLProcessor(QwenVLImageProcessorPil(), deepcopy(original_tokenizer))
    encoded = encode(vqa(Image.new("RGB", (5, 7)), "Is it red?", "No"), processor)
    ids, labels = encoded.input_ids.tolist(), encoded.labels.tolist()
    first = labels.index(next(label for label in labels if label != -100))
    prompt = processor.tokenizer.decode([token for token in ids[:first] if token != processor.image_token_id])
    assert prompt == "<img></img> Is it red? Answer:"
    assert ids[first:] == labels[first:] == [2308, 151643]  # " No", <|endoftext|>


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: caption("p", "", "en"), "text must be text that is not empty, it is ''"),
        (lambda: caption("p", "a", "fr"), "language is 'fr', caption has prompts in en, zh"),
        (lambda: vqa("p", "", "a"), "question must be text that is not empty"),
        (lambda: vqa("p", "Who?", None), "answer must be text that is not empty, it is None"),
        (lambda: pure_text(7), "text must be text that is not empty, it is 7"),
        (lambda: caption_with_grounding("p", []), "pieces must be a list that is not empty"),
        (lambda: caption_with_grounding("p", [7]), "pieces may hold dictionaries with label and bbox, this is 7"),
        (lambda: caption_with_grounding("p", [{"label": "a", "box": [1]}]), "unknown key 'box', did you mean 'bbox'"),
        (lambda: ocr_with_quads("p", [{"text": "a"}]), "an item of lines needs quad, it is {'text': 'a'}"),
        (lambda: referring_grounding("p", "dog", [5, 3, 2, 7]), "xyxy is wanted, not xywh"),
    ],
)
def test_malformed_fields_are_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


def test_fields_of_a_task_are_its_parameters():
    assert fields_of("pure_text") == (("text",), ())
    assert fields_of("ocr_with_quads") == (("image", "lines"), ("language", "normalized"))
    assert set(TASKS) == {
        *("caption", "vqa", "ocr_vqa", "caption_with_grounding"),
        *("referring_grounding", "grounded_captioning", "ocr_with_quads", "pure_text"),
    }
