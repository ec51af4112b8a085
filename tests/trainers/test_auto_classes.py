"""Model and processor in one folder, found by transformers' Auto classes and by its pipeline."""

import PIL.Image
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline

from modeling_qwenvl import QwenVLConfig, QwenVLForConditionalGeneration
from processing import QWenTokenizer, QwenVLImageProcessorPil, QwenVLProcessor, train_qwenvl_tokenizer

NUM_QUERIES = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model with its processor, as save_pretrained writes them."""
    tokenizer = train_qwenvl_tokenizer(["three red digits and three blue ones"], vocab_size=491)
    size = {"height": 28, "width": 28}
    processor = QwenVLProcessor(QwenVLImageProcessorPil(size=size), tokenizer, num_image_tokens=NUM_QUERIES)
    start_id, end_id = tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
    config = QwenVLConfig(
        vision_config={
            "model_type": "qwen_vl_vision",
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "position_grid": 2,
        },
        text_config={
            "model_type": "qwen_vl_text",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": len(tokenizer),
        },
        num_queries=NUM_QUERIES,
        adapter_num_heads=2,
        image_token_id=processor.image_token_id,
        image_start_token_id=start_id,
        image_end_token_id=end_id,
    )
    torch.manual_seed(7)
    model = QwenVLForConditionalGeneration(config)
    model.generation_config.eos_token_id = processor.stop_token_ids
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    folder = tmp_path_factory.mktemp("tiny-qwen-vl")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def original_folder(shared, tmp_path_factory):
    """A folder as the original Hub repository, without its weights and remote code."""
    folder = tmp_path_factory.mktemp("Qwen-VL")
    vocabulary = shared / "tokenizers/qwen-vl"
    for path in (vocabulary / "qwen.tiktoken", *(vocabulary / "Qwen-VL").glob("*config.json")):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def question(color):
    picture = PIL.Image.new("RGB", (50, 40), color)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "three?"}]
    return [{"role": "user", "content": content}]


def answer_by_hand(folder, conversation) -> str:
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output_ids = model.generate(**inputs, max_new_tokens=7, do_sample=False)
    return processor.post_process_image_text_to_text(output_ids[:, inputs["input_ids"].shape[1] :])[0]


def test_auto_classes_find_model_and_processor_of_a_folder(folder):
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is QwenVLProcessor
    assert type(AutoTokenizer.from_pretrained(folder)) is QWenTokenizer
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model) is QwenVLForConditionalGeneration
    assert model.config.num_image_tokens == processor.num_image_tokens == NUM_QUERIES
    assert model.config.image_token_id == processor.image_token_id


def test_the_pipeline_answers_as_model_and_processor_by_hand(folder):
    pipe = pipeline("image-text-to-text", model=str(folder))
    assert type(pipe.processor) is QwenVLProcessor
    for color in ("red", "blue"):
        greedy = {"max_new_tokens": 7, "do_sample": False}
        (result,) = pipe(text=question(color), return_full_text=False, generate_kwargs=greedy)
        assert result["generated_text"] == answer_by_hand(folder, question(color))


def test_the_pipeline_answers_a_batch_of_different_lengths_as_one_by_one(folder):
    pipe = pipeline("image-text-to-text", model=str(folder))
    longer = [{"role": "user", "content": [*question("blue")[0]["content"], {"type": "text", "text": "three" * 9}]}]
    greedy = {"max_new_tokens": 7, "do_sample": False}
    results = pipe(text=[question("red"), longer], batch_size=2, return_full_text=False, generate_kwargs=greedy)
    answers = [result["generated_text"] for (result,) in results]
    assert answers == [answer_by_hand(folder, question("red")), answer_by_hand(folder, longer)]


def test_a_batch_of_prompts_is_answered_as_one_by_one(folder):
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    longer = [{"role": "user", "content": "three red digits and three blue ones"}]
    conversations = [question("red"), longer, question("blue")]
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    assert 0 in inputs["attention_mask"]
    output_ids = model.generate(**inputs, max_new_tokens=7, do_sample=False)
    together = processor.post_process_image_text_to_text(output_ids[:, inputs["input_ids"].shape[1] :])
    assert together == [answer_by_hand(folder, conversation) for conversation in conversations]


@pytest.mark.parametrize("options", [{}, pytest.param({"trust_remote_code": True}, marks=pytest.mark.slow)])
def test_the_original_repository_gives_our_classes_with_and_without_remote_code(original_folder, options):
    processor = AutoProcessor.from_pretrained(original_folder, **options)
    assert type(processor) is QwenVLProcessor
    assert (
        type(processor.tokenizer) is type(AutoTokenizer.from_pretrained(original_folder, **options)) is QWenTokenizer
    )
    assert processor.num_image_tokens == QwenVLConfig.from_pretrained(original_folder).num_image_tokens == 256
