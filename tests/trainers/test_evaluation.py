"""Evaluation by generation, with a model that says what the test tells it to."""

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import GenerationConfig

from processing.coordinates import Box
from processing.example import Example, Source
from processing.image_processing_pil_qwenvl import QwenVLImageProcessorPil
from processing.processing_qwenvl import QwenVLProcessor
from processing.tokenization_qwenvl import train_qwenvl_tokenizer
from trainers.evaluation import GenerationEvaluation


@pytest.fixture(scope="module")
def processor():
    return QwenVLProcessor(
        image_processor=QwenVLImageProcessorPil(size={"height": 28, "width": 28}),
        tokenizer=train_qwenvl_tokenizer(["one two three"], vocab_size=480),
        num_image_tokens=3,
    )


class Parrot(nn.Module):
    """Answers a prompt that holds a key of `answers` with its value, and remembers how it was asked."""

    def __init__(self, processor, answers):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout(0.5)
        self.tokenizer = processor.tokenizer
        self.generation_config = GenerationConfig(eos_token_id=processor.stop_token_ids)
        self.answers = answers
        self.prompts, self.batch_sizes, self.num_pictures = [], [], []

    def generate(self, input_ids, attention_mask, max_new_tokens, pixel_values=None, **how):
        assert not self.training
        assert not self.dropout.training
        self.how = how
        assert bool(attention_mask[:, -1].all()), "prompts are padded on the left"
        prompts = self.tokenizer.batch_decode(input_ids)
        self.prompts += prompts
        self.batch_sizes.append(len(prompts))
        self.num_pictures.append(0 if pixel_values is None else len(pixel_values))
        said = [next(answer for key, answer in self.answers.items() if key in prompt) for prompt in prompts]
        ids = [self.tokenizer(text)["input_ids"][:max_new_tokens] for text in said]
        longest = max(map(len, ids))
        pad = self.tokenizer.pad_token_id
        return torch.tensor(
            [[*p, *a, *[pad] * (longest - len(a))] for p, a in zip(input_ids.tolist(), ids, strict=True)]
        )


def ask(question, *answer_parts, task=None, picture=(200, 100), style="chat", **columns):
    """A question about one white picture of `picture` = (width, height), None for no picture."""
    image = [] if picture is None else [{"type": "image", "image": Image.new("RGB", picture, "white")}]
    user = {"role": "user", "content": [*image, {"type": "text", "text": question}]}
    return Example(
        [user, {"role": "assistant", "content": list(answer_parts)}], task=task, style=style, columns=columns,
        source=Source("test.jsonl", 3),
    )  # fmt: skip


def text(words):
    return {"type": "text", "text": words}


def box(*numbers, **options):
    return {"type": "box", "bbox": list(numbers), **options}


def test_answers_come_back_in_the_order_of_the_examples_whatever_the_batches(processor):
    examples = [
        ask("Q1?", text("one")),
        ask("Q2?", text("two"), picture=None),
        ask("Q3?", text("three")),
        ask("Q4?", text("4")),
    ]
    model = Parrot(processor, {"Q1?": "one", "Q2?": "two", "Q3?": "three", "Q4?": "four"})
    answers = GenerationEvaluation(examples, batch_size=3).answers(model, processor)
    assert [answer.text for answer in answers] == ["one", "two", "three", "four"]
    assert model.batch_sizes == [3, 1]
    assert sum(model.num_pictures) == 3


def test_the_answer_ends_before_the_first_end_token(processor):
    model = Parrot(processor, {"Q1?": "one<|im_end|>\n<|im_start|>user\ntwo"})
    [answer] = GenerationEvaluation([ask("Q1?", text("one"))]).answers(model, processor)
    assert answer.raw == answer.text == "one"


def test_the_prompt_ends_where_the_answer_begins_and_does_not_hold_it(processor):
    model = Parrot(processor, {"Q1?": "one", "Q2?": "two"})
    plain = ask("Q2?", text("two"), style="plain", task="caption")
    GenerationEvaluation([ask("Q1?", text("SECRET")), plain]).answers(model, processor)
    chat_prompt, plain_prompt = sorted(model.prompts, key=len, reverse=True)
    assert chat_prompt.endswith("<|im_start|>assistant\n")
    assert "SECRET" not in chat_prompt
    assert plain_prompt.endswith("</img>Q2?")
    assert "<|im_start|>" not in plain_prompt


def test_boxes_are_compared_in_pixels_of_the_original_picture(processor):
    # The model says thousandths; the picture is 200 x 100: (100,200),(500,600) is (20,20) to (100,60).
    example = ask("Where?", box(20, 20, 100, 60, label="it"), task="referring_grounding")
    model = Parrot(processor, {"Where?": "<ref>it</ref><box>(100,200),(500,600)</box>"})
    evaluation = GenerationEvaluation([example])
    [answer] = evaluation.answers(model, processor)
    assert answer.true_boxes == [Box(20, 20, 100, 60, label="it")]
    assert answer.boxes == [Box(20, 20, 100, 60, label="it")]
    assert evaluation.measure([answer]) == {
        "referring_grounding/box_f1_at_0.5": 1.0,
        "referring_grounding/unparsable": 0.0,
    }


def test_normalised_truth_is_turned_into_pixels_too(processor):
    example = ask("Where?", box(0.1, 0.2, 0.5, 0.6, normalized=1), task="referring_grounding")
    model = Parrot(processor, {"Where?": "nowhere"})
    evaluation = GenerationEvaluation([example])
    [answer] = evaluation.answers(model, processor)
    [true] = answer.true_boxes
    assert (true.x1, true.y1, true.x2, true.y2) == pytest.approx((20, 20, 100, 60))
    assert evaluation.measure([answer])["referring_grounding/box_f1_at_0.5"] == 0.0


def test_a_malformed_box_is_counted_as_unparsable(processor):
    examples = [ask("Q1?", box(0, 0, 10, 10), task="t"), ask("Q2?", box(0, 0, 10, 10), task="t")]
    model = Parrot(processor, {"Q1?": "<box>(0,0),(50</box>", "Q2?": "<box>(0,0),(50,100)</box>"})
    evaluation = GenerationEvaluation(examples)
    measured = evaluation.measure(evaluation.answers(model, processor))
    assert measured == {"t/exact_match": 1.0, "t/box_f1_at_0.5": 0.5, "t/unparsable": 0.5}


def test_scores_are_means_per_task_and_the_column_answers_names_all_accepted_texts(processor):
    examples = [
        ask("Q1?", text("one"), task="vqa"),
        ask("Q2?", text("two"), task="vqa", answers=["two", "2", "a pair"]),
        ask("Q3?", text("x"), task="ocr_vqa"),
    ]
    model = Parrot(processor, {"Q1?": "seven", "Q2?": "A pair", "Q3?": "x"})
    evaluation = GenerationEvaluation(examples, scores={"vqa": ("exact_match",)})
    measured = evaluation.measure(evaluation.answers(model, processor))
    assert measured == {
        "vqa/exact_match": 0.5,
        "vqa/unparsable": 0.0,
        "ocr_vqa/anls": 1.0,
        "ocr_vqa/exact_match": 1.0,
        "ocr_vqa/unparsable": 0.0,
    }


def test_answers_are_greedy_unless_a_temperature_is_given(processor):
    model = Parrot(processor, {"Q": "one"})
    GenerationEvaluation([ask("Q", text("one"))]).answers(model, processor)
    assert model.how == {"do_sample": False}
    GenerationEvaluation([ask("Q", text("one"))], temperature=0.7).answers(model, processor)
    # The whole distribution, whatever the checkpoint's generation config narrows it to.
    assert model.how == {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0}


def test_module_modes_are_as_before(processor):
    model = Parrot(processor, {"Q1?": "one"}).train()
    model.dropout.eval()
    GenerationEvaluation([ask("Q1?", text("one"))]).answers(model, processor)
    assert model.training
    assert not model.dropout.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"examples": []}, "no examples"),
        ({"examples": [ask("Q", text("a"))], "temperature": 0.0}, "temperature of 0.0 cannot be sampled"),
        ({"examples": [ask("Q", text("a"))], "scores": {"vqa": ("bleu",)}}, "asks for bleu; known scores are anls"),
        (
            {"examples": [Example([{"role": "user", "content": "Q"}], kind="reward", solution="a")]},
            "kind 'reward' has no answer",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerationEvaluation(**settings)
