"""`qwenvl chat`: what it prints and draws, and what it refuses."""

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from typer.testing import CliRunner

from modeling_qwenvl import QwenVLConfig, QwenVLForConditionalGeneration
from processing import QwenVLImageProcessorPil, QwenVLProcessor, train_qwenvl_tokenizer
from processing.coordinates import Box
from trainers.cli import app
from trainers.conversation import Conversation

SIDE = 28


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a random model of 4 tokens per picture, and a picture."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = train_qwenvl_tokenizer(["where is the three"], vocab_size=480)
    size = {"height": SIDE, "width": SIDE}
    processor = QwenVLProcessor(QwenVLImageProcessorPil(size=size), tokenizer, num_image_tokens=4)
    start, end, pad, eos = tokenizer.convert_tokens_to_ids(["<img>", "</img>", "<imgpad>", "<|im_end|>"])
    vision = {
        "model_type": "qwen_vl_vision",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 7,
        "position_grid": 4,
    }
    text = {
        "model_type": "qwen_vl_text",
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = QwenVLForConditionalGeneration(
        QwenVLConfig(
            vision_config=vision,
            text_config=text,
            num_queries=4,
            adapter_num_heads=2,
            image_token_id=pad,
            image_start_token_id=start,
            image_end_token_id=end,
        )
    )
    model.generation_config.eos_token_id = eos
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    Image.new("RGB", (40, 20), "white").save(folder / "picture.png")
    return folder


@pytest.fixture
def answering(monkeypatch):
    """Makes every model say a given text: what follows generation is under test, and what went into it is kept."""

    def say(*raws):
        left, seen = list(raws), []

        def generate(self, **inputs):
            tokenizer = AutoProcessor.from_pretrained(self.name_or_path).tokenizer
            seen.append(tokenizer.decode(inputs["input_ids"][0]))
            new = torch.tensor([tokenizer(left.pop(0), add_special_tokens=False)["input_ids"]])
            return torch.cat([inputs["input_ids"], new], dim=1)

        monkeypatch.setattr(QwenVLForConditionalGeneration, "generate", generate)
        return seen

    return say


def _chat(saved, *options, **kwargs):
    command = ["chat", "--model", str(saved / "model"), "--image", str(saved / "picture.png"), *options]
    return CliRunner().invoke(app, command, **kwargs)


def test_a_random_model_answers_something_and_the_command_ends_well(saved):
    result = _chat(saved, "--question", "where is the three?", "--max-new-tokens", "3")
    assert result.exit_code == 0, result.output
    assert "where is the three?" in result.output


def test_a_box_is_printed_in_pixels_of_the_picture_and_drawn(saved, tmp_path, answering):
    answering("<ref>the three</ref><box>(250,500),(500,999)</box><|im_end|>")
    result = _chat(saved, "--question", "where?", "--draw", str(tmp_path / "drawn.png"))
    assert "the three: box (10, 10), (20, 20)" in result.output  # of 40 x 20 pixels
    drawn = Image.open(tmp_path / "drawn.png")
    assert drawn.size == (600, 300)
    assert drawn.getpixel((150, 225)) != (255, 255, 255)  # the left side of the box, 15 times as large
    assert drawn.getpixel((450, 75)) == (255, 255, 255)


def test_a_malformed_box_is_reported_and_not_drawn(saved, tmp_path, answering):
    answering("<box>(250,500),(500</box><|im_end|>")
    result = _chat(saved, "--question", "where?", "--draw", str(tmp_path / "drawn.png"))
    assert "unreadable" in result.output
    assert not (tmp_path / "drawn.png").exists()


def test_the_second_question_is_asked_after_the_first_answer_with_its_tags_and_the_picture_once(saved, answering):
    seen = answering("<box>(1,2),(3,4)</box><|im_end|>", "three<|im_end|>")
    result = _chat(saved, "--question", "where?", "--question", "which?")
    assert result.exit_code == 0, result.output
    assert seen[1].count("<img>") == 1
    assert seen[1].endswith(
        "where?<|im_end|>\n<|im_start|>assistant\n<box>(1,2),(3,4)</box><|im_end|>\n"
        "<|im_start|>user\nwhich?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_the_user_types_cannot_end_the_message(saved, answering):
    seen = answering("no<|im_end|>")
    _chat(saved, "--question", "<|im_end|>")
    assert "<|im_end|>" in seen[0].split("user\n")[1]
    processor_ids = Conversation.load(str(saved / "model"), []).processor.tokenizer("<|im_end|>")["input_ids"]
    assert len(processor_ids) == 1  # as a token it would be one; typed, it stays ten characters or fewer pieces


def test_without_a_question_it_asks_until_an_empty_line(saved, answering):
    seen = answering("one<|im_end|>", "two<|im_end|>")
    result = _chat(saved, input="first?\nsecond?\n\nthird?\n")
    assert result.exit_code == 0, result.output
    assert len(seen) == 2
    assert "two" in result.output


def test_it_also_ends_where_the_input_ends(saved, answering):
    answering("one<|im_end|>")
    assert _chat(saved, input="first?\n").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--image", "nowhere.png"], "nowhere.png"), (["--image", "https://example.org/a.png"], "network")],
)
def test_a_picture_that_cannot_be_had_is_named(saved, options, message):
    result = CliRunner().invoke(app, ["chat", "--model", str(saved / "model"), *options, "--question", "?"])
    assert result.exit_code == 2
    assert message in result.output


def test_a_folder_without_a_model_is_refused(saved, tmp_path):
    result = CliRunner().invoke(
        app, ["chat", "--model", str(tmp_path), "--image", str(saved / "picture.png"), "--question", "?"]
    )
    assert result.exit_code == 2
    assert "no processor" in result.output.replace("\n", " ")


def test_boxes_of_a_conversation_are_in_original_pixels(saved, answering):
    answering("<box>(0,0),(500,500)</box><|im_end|>")
    conversation = Conversation.load(str(saved / "model"), [Image.new("RGB", (40, 20))])
    assert conversation.ask("where?").shapes == (Box(0, 0, 20, 10),)


def test_a_chat_about_nothing_is_refused(saved):
    result = CliRunner().invoke(app, ["chat", "--model", str(saved / "model"), "--question", "What?"])
    assert result.exit_code == 2
    assert "give --image or --video" in " ".join(result.output.split())
