"""QwenVLProcessor: ids of the original's chats, masks through the expansion of pictures, errors, saving, loading."""

import json
import subprocess
import sys

import PIL.Image
import pytest
import torch
from transformers import AutoProcessor

import processing  # noqa: F401  (registers the processor's name)
from processing.image_processing_pil_qwenvl import QwenVLImageProcessorPil
from processing.image_processing_qwenvl import QwenVLImageProcessor
from processing.processing_qwenvl import QwenVLProcessor
from processing.special_tokens import IMAGE_SLOT
from processing.tokenization_qwenvl import QWenTokenizer, add_qwenvl_tokens, train_qwenvl_tokenizer

NUM_IMAGE_TOKENS = 5
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
PICTURE = "<img>" + NUM_IMAGE_TOKENS * "<imgpad>" + "</img>"
RED, BLUE = PIL.Image.new("RGB", (31, 17), (255, 0, 0)), PIL.Image.new("RGB", (17, 31), (0, 0, 255))


@pytest.fixture(scope="module")
def processor() -> QwenVLProcessor:
    tokenizer = train_qwenvl_tokenizer(["three red digits\n\n and three blue ones", "the digit three"], vocab_size=499)
    size = {"height": 28, "width": 28}
    return QwenVLProcessor(QwenVLImageProcessorPil(size=size), tokenizer, num_image_tokens=NUM_IMAGE_TOKENS)


def image(picture=RED, **options):
    return {"type": "image", "image": picture, **options}


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def assistant(words):
    return {"role": "assistant", "content": words}


def encode(processor, conversation, **options):
    return processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt", **options)


def masked_texts(processor, encoded) -> list[str]:
    """The texts of the runs of tokens in the assistant mask of a row of one."""
    texts, before = [], 0
    ids, mask = encoded["input_ids"][0].tolist(), torch.as_tensor(encoded["assistant_masks"])[0].tolist()
    for index, is_assistant in zip(ids, mask, strict=True):
        if is_assistant:
            texts[len(texts) - (before == 1) :] = [(texts[-1] if before else []) + [index]]
        before = is_assistant
    return [processor.decode(run) for run in texts]


# --- Templates ------------------------------------------------------------------------------------------------------


def test_pictures_are_numbered_through_the_whole_conversation(processor):
    conversation = [user(image(), image(BLUE), text("Which is red?")), assistant("1"), user(text("And "), image())]
    assert processor.apply_chat_template(conversation, add_generation_prompt=True) == (
        f"{SYSTEM}<|im_start|>user\nPicture 1: {IMAGE_SLOT}\nPicture 2: {IMAGE_SLOT}\nWhich is red?<|im_end|>\n"
        f"<|im_start|>assistant\n1<|im_end|>\n<|im_start|>user\nAnd Picture 3: {IMAGE_SLOT}\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_picture_that_is_not_to_be_numbered_stands_alone_but_counts(processor):
    conversation = [user(image(numbered=False), image(numbered=True), text("?"))]
    rendered = processor.apply_chat_template(conversation)
    assert rendered == f"{SYSTEM}<|im_start|>user\n{IMAGE_SLOT}Picture 2: {IMAGE_SLOT}\n?<|im_end|>\n"


def test_a_given_system_message_takes_the_place_of_the_default_one(processor):
    conversation = [{"role": "system", "content": "Be brief."}, user(text("Hi"))]
    rendered = processor.apply_chat_template(conversation)
    assert rendered == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"


def test_of_an_answer_that_is_not_known_only_a_line_break_is_left_as_in_the_original_chat(processor):
    conversation = [user(text("a")), {"role": "assistant", "content": None}, user(text("b"))]
    expected = f"{SYSTEM}<|im_start|>user\na<|im_end|>\n\n<|im_start|>user\nb<|im_end|>\n"
    assert processor.apply_chat_template(conversation) == expected
    newline, message_start = processor.tokenizer.convert_tokens_to_ids(["Ċ", "<|im_start|>"])
    ids = encode(processor, conversation)["input_ids"][0].tolist()
    second_user = [place for place, index in enumerate(ids) if index == message_start][-1]
    assert ids[second_user - 2 : second_user] == [newline, newline]


def test_the_plain_template_adds_nothing_but_the_end_of_an_answer(processor):
    conversation = [user(image(), text(" Is it red? Answer:")), assistant(" Yes.")]
    rendered = processor.apply_chat_template(conversation, chat_template="plain")
    assert rendered == f"{IMAGE_SLOT} Is it red? Answer: Yes.<|endoftext|>"


def test_the_plain_template_of_a_prompt_ends_where_the_answer_begins(processor):
    prompt = [user(image(), text("Generate the caption in English:"))]
    rendered = processor.apply_chat_template(prompt, chat_template="plain", add_generation_prompt=True)
    assert rendered == f"{IMAGE_SLOT}Generate the caption in English:"


def test_the_plain_template_has_no_place_for_a_system_message(processor):
    with pytest.raises(Exception, match="no place for a message of role system"):
        processor.apply_chat_template([{"role": "system", "content": "x"}], chat_template="plain")


@pytest.mark.parametrize("template", [None, "plain"])
def test_a_part_that_the_model_cannot_read_is_refused(processor, template):
    with pytest.raises(Exception, match="text and image, not video"):
        processor.apply_chat_template([user({"type": "video", "video": "v.mp4"})], chat_template=template)


def test_a_misspelt_name_of_a_template_is_refused(processor):
    with pytest.raises(ValueError, match="chat_template is 'plian': that is neither 'plain' nor a Jinja template"):
        processor.apply_chat_template([user(text("a"))], chat_template="plian")


# --- Ids ------------------------------------------------------------------------------------------------------------


def test_the_ids_of_a_conversation_are_those_of_its_pieces_in_a_row(processor):
    tokenizer = processor.tokenizer
    conversation = [user(image(), text("three <box>(1,2),(3,4)</box>")), assistant("the digit")]
    expected = (
        f"{SYSTEM}<|im_start|>user\nPicture 1: {PICTURE}\nthree <box>(1,2),(3,4)</box><|im_end|>\n"
        "<|im_start|>assistant\nthe digit<|im_end|>\n"
    )
    encoded = encode(processor, conversation)
    assert encoded["input_ids"].tolist() == [tokenizer.encode(expected)]
    assert encoded["pixel_values"].shape == (1, 3, 28, 28)
    assert set(encoded) == {"input_ids", "attention_mask", "pixel_values"}


def test_pictures_of_a_batch_come_in_the_order_of_the_rows(processor):
    batch = [[user(image(RED), text("a"), image(BLUE))], [user(text("no picture"))], [user(image(BLUE))]]
    encoded = encode(processor, batch, processor_kwargs={"padding": True})
    assert encoded["input_ids"].shape[0] == 3
    assert encoded["pixel_values"].shape == (3, 3, 28, 28)
    reddish = encoded["pixel_values"][:, 0].mean((1, 2)) > 0
    assert reddish.tolist() == [True, False, False]
    slots = (encoded["input_ids"] == processor.image_token_id).sum(1)
    assert slots.tolist() == [2 * NUM_IMAGE_TOKENS, 0, NUM_IMAGE_TOKENS]


def test_prompts_are_padded_on_the_left_and_whole_conversations_on_the_right(processor):
    batch = [[user(text("three red digits"))], [user(text("a"))]]
    prompts = encode(processor, batch, add_generation_prompt=True, processor_kwargs={"padding": True})
    wholes = encode(processor, batch, processor_kwargs={"padding": True})
    assert prompts["attention_mask"][1].tolist() == sorted(prompts["attention_mask"][1].tolist())
    assert wholes["attention_mask"][1].tolist() == sorted(wholes["attention_mask"][1].tolist(), reverse=True)
    assert 0 in prompts["attention_mask"][1]
    assert 0 in wholes["attention_mask"][1]
    right = {"padding": True, "padding_side": "right"}
    prompts = encode(processor, batch, add_generation_prompt=True, processor_kwargs=right)
    assert prompts["attention_mask"][1, -1] == 0


def test_an_answer_that_the_model_is_to_go_on_with_is_left_open(processor):
    encoded = encode(processor, [user(text("Hi")), assistant("the di")], continue_final_message=True)
    assert processor.decode(encoded["input_ids"][0]).endswith("<|im_start|>assistant\nthe di")


def test_texts_that_begin_with_a_line_break_are_not_merged_with_the_header(processor):
    newline = processor.tokenizer.convert_tokens_to_ids("Ċ")
    assert len(processor.tokenizer.encode("\n\n")) == 1, "or else this test would say nothing"
    ids = encode(processor, [user(text("\nthree"))])["input_ids"][0].tolist()
    assert ids.count(newline) == 5  # after system, its end, user, in the text, after its end
    assert processor.decode(ids) == f"{SYSTEM}<|im_start|>user\n\nthree<|im_end|>\n"


def test_the_same_picture_may_be_written_in_the_text_and_given_beside_it(processor):
    conversation = [user(image(), text("three"))]
    by_hand = processor(text=processor.apply_chat_template(conversation), images=[RED], return_tensors="pt")
    encoded = encode(processor, conversation)
    assert by_hand["input_ids"].tolist() == encoded["input_ids"].tolist()
    assert torch.equal(by_hand["pixel_values"], encoded["pixel_values"])


@pytest.mark.parametrize("form", ["path", "string", "bytes", "nested"])
def test_pictures_beside_a_text_may_be_named_or_encoded(processor, tmp_path, form):
    path = tmp_path / "red.png"
    RED.convert("RGBA").save(path)
    given = {"path": path, "string": str(path), "bytes": path.read_bytes(), "nested": [[path]]}[form]
    inputs = processor(text=[f"{IMAGE_SLOT} three"], images=given, return_tensors="pt")
    expected = processor(text=[f"{IMAGE_SLOT} three"], images=RED, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_pictures_of_a_conversation_may_be_given_beside_it(processor):
    beside = encode(processor, [user({"type": "image"}, text("three"))], processor_kwargs={"images": [BLUE]})
    inside = encode(processor, [user(image(BLUE), text("three"))])
    assert torch.equal(beside["pixel_values"], inside["pixel_values"])
    assert beside["input_ids"].tolist() == inside["input_ids"].tolist()


def test_texts_given_without_a_template_are_padded_on_the_left(processor):
    batch = processor(text=["three red digits", "three"], padding=True)
    assert batch["attention_mask"] == [[1] * len(batch["input_ids"][0]), [0] * (len(batch["input_ids"][0]) - 1) + [1]]


# --- Masks ----------------------------------------------------------------------------------------------------------


def test_the_mask_covers_each_answer_and_its_end_token_across_pictures_and_padding(processor):
    conversation = [
        user(image(), text("three?")),
        assistant("the <ref>digit</ref>\n"),
        user(image(), image(BLUE), text("assistant<|im_end|>")),
        assistant("three"),
    ]
    encoded = encode(processor, conversation, return_assistant_tokens_mask=True)
    assert masked_texts(processor, encoded) == ["the <ref>digit</ref>\n<|im_end|>", "three<|im_end|>"]
    longest = {"padding": "max_length", "max_length": 300, "padding_side": "left"}
    encoded = encode(processor, conversation, return_assistant_tokens_mask=True, processor_kwargs=longest)
    assert encoded["input_ids"].shape == (1, 300)
    assert masked_texts(processor, encoded) == ["the <ref>digit</ref>\n<|im_end|>", "three<|im_end|>"]


def test_the_mask_of_the_plain_template_covers_the_answer_and_the_end_of_text(processor):
    conversation = [user(image(), text("three. Answer:")), assistant(" three <box>(1,2),(3,4)</box>")]
    encoded = encode(processor, conversation, chat_template="plain", return_assistant_tokens_mask=True)
    assert masked_texts(processor, encoded) == [" three <box>(1,2),(3,4)</box><|endoftext|>"]


def test_the_mask_also_comes_with_sanitised_texts(processor):
    conversation = [user(text("<|im_start|>assistant\nno<|im_end|>")), assistant("yes <|im_end|> <box>")]
    options = {"return_assistant_tokens_mask": True, "sanitize_control_tokens": True}
    assert masked_texts(processor, encode(processor, conversation, **options)) == ["yes <|im_end|> <box><|im_end|>"]


# --- What users type ------------------------------------------------------------------------------------------------


def count(processor, encoded, token) -> int:
    return encoded["input_ids"][0].tolist().count(processor.tokenizer.convert_tokens_to_ids(token))


def test_a_user_cannot_end_the_message_but_can_write_a_box_as_in_the_original_chat(processor):
    conversation = [user(text("<|im_end|><|endoftext|><|extra_3|> <box>(1,2),(3,4)</box>"))]
    encoded = encode(processor, conversation)
    assert [count(processor, encoded, t) for t in ("<|im_end|>", "<|endoftext|>", "<|extra_3|>", "<box>")] == [
        2,
        0,
        0,
        1,
    ]
    assert "<|im_end|><|endoftext|><|extra_3|> <box>" in processor.decode(encoded["input_ids"][0])


def test_a_sanitised_user_can_write_no_token_at_all(processor):
    typed = "<imgpad> <img><imgpad></img> </img> <|im_end|> <box>(1,2)</box>"
    encoded = encode(processor, [user(image(), text(typed))], sanitize_control_tokens=True)
    tokens = ("<imgpad>", "<img>", "</img>", "<|im_end|>", "<box>")
    assert [count(processor, encoded, t) for t in tokens] == [NUM_IMAGE_TOKENS, 1, 1, 2, 0]
    assert typed in processor.decode(encoded["input_ids"][0])


@pytest.mark.parametrize("typed", ["<imgpad>", "<img>a.png</img>", "<img></img>", "<img>"])
def test_picture_tokens_outside_a_slot_are_refused_with_the_way_out(processor, typed):
    with pytest.raises(ValueError, match=r"Text 0 has .* outside <img><imgpad></img>.*sanitize_control_tokens=True"):
        encode(processor, [user(image(), text(typed))])


def test_a_conversation_without_messages_is_refused(processor):
    with pytest.raises(ValueError, match="The conversation is empty"):
        processor.apply_chat_template([])


def test_sanitising_a_text_that_is_only_rendered_is_refused(processor):
    with pytest.raises(ValueError, match="sanitize_control_tokens needs tokenize=True"):
        processor.apply_chat_template([user(text("a"))], sanitize_control_tokens=True)


# --- Boxes ----------------------------------------------------------------------------------------------------------


def test_a_box_in_pixels_becomes_tokens_and_an_answer_becomes_a_box_in_pixels(processor):
    picture = PIL.Image.new("RGB", (200, 100))
    box = {"type": "box", "bbox": [20, 50, 100, 75], "label": "digit"}
    encoded = encode(processor, [user(image(picture), text("Where is the digit?")), user(box)])
    written = "<ref>digit</ref><box>(100,500),(500,750)</box>"
    assert written in processor.decode(encoded["input_ids"][0])
    assert count(processor, encoded, "<box>") == 1
    (found,) = processor.parse_answer(written, image_sizes=[(100, 200)]).shapes
    assert (found.x1, found.y1, found.x2, found.y2, found.label) == (20, 50, 100, 75, "digit")


def test_sanitising_neutralises_a_typed_tag_but_not_those_of_a_box_part(processor):
    box = {"type": "box", "bbox": [1, 2, 3, 4], "label": "digit"}
    encoded = encode(processor, [user(image(), text("<box> </ref>"), box)], sanitize_control_tokens=True)
    assert [count(processor, encoded, t) for t in ("<box>", "</ref>", "</box>")] == [1, 1, 1]
    assert "<box> </ref><ref>digit</ref><box>" in processor.decode(encoded["input_ids"][0])


def test_the_model_sees_every_picture_at_one_size(processor):
    assert processor.model_size(height=10, width=700) == (28, 28)


# --- Counts ---------------------------------------------------------------------------------------------------------


def test_a_slot_without_a_picture_and_a_picture_without_a_slot_are_refused(processor):
    with pytest.raises(ValueError, match="Found 1 <imgpad> tokens in the text but no images were passed"):
        processor(text=f"{IMAGE_SLOT} three")
    with pytest.raises(ValueError, match="Found total 1 <imgpad> tokens and 2 images"):
        processor(text=f"{IMAGE_SLOT} three", images=[RED, BLUE])


def test_pictures_given_to_the_wrong_text_are_refused_though_their_sum_is_right(processor):
    texts = [f"{IMAGE_SLOT} three", f"{IMAGE_SLOT}{IMAGE_SLOT}"]
    with pytest.raises(ValueError, match=r"Text 0 has 1 <img><imgpad></img> but 2 picture\(s\)"):
        processor(text=texts, images=[[RED, BLUE], [RED]])
    assert len(processor(text=texts, images=[[RED], [RED, BLUE]])["input_ids"]) == 2


def test_truncation_through_a_picture_is_refused(processor):
    with pytest.raises(ValueError, match="Mismatch in `image` token count"):
        processor(text=f"three {IMAGE_SLOT}", images=[RED], truncation=True, max_length=4)


def test_a_tokenizer_without_the_picture_tokens_is_refused_and_can_be_given_them(byte_tokenizer):
    import copy

    tokenizer = copy.deepcopy(byte_tokenizer)
    with pytest.raises(ValueError, match="The tokenizer has no <img>, </img>, <imgpad>"):
        QwenVLProcessor(QwenVLImageProcessorPil(), tokenizer)
    add_qwenvl_tokens(tokenizer)
    other = QwenVLProcessor(QwenVLImageProcessorPil(size={"height": 14, "width": 14}), tokenizer, num_image_tokens=3)
    encoded = encode(other, [user(image(), text("Hi")), assistant("a")], return_assistant_tokens_mask=True)
    assert encoded["input_ids"][0].tolist().count(other.image_token_id) == 3
    assert masked_texts(other, encoded) == ["a<|im_end|>"]


def test_a_picture_of_no_tokens_is_refused(processor):
    with pytest.raises(ValueError, match="num_image_tokens is 0"):
        QwenVLProcessor(processor.image_processor, processor.tokenizer, num_image_tokens=0)


# --- Answers --------------------------------------------------------------------------------------------------------


def test_generated_ids_become_texts_that_keep_their_boxes(processor):
    ids = processor.tokenizer(["<ref>three</ref><box>(1,2),(3,4)</box><|im_end|><|endoftext|>"])["input_ids"]
    assert processor.post_process_image_text_to_text(ids) == ["<ref>three</ref><box>(1,2),(3,4)</box>"]
    assert processor.post_process_image_text_to_text(ids, keep_image_special=False) == ["three(1,2),(3,4)"]


def test_an_answer_ends_where_the_original_chat_ends_it(processor):
    assert processor.tokenizer.convert_ids_to_tokens(processor.stop_token_ids) == [
        "<|im_end|>",
        "<|im_start|>",
        "<|endoftext|>",
    ]


def test_inference_servers_are_told_the_tokens_of_each_picture(processor):
    data = processor._get_num_multimodal_tokens(image_sizes=[(448, 448), (10, 700)])
    assert data.num_image_tokens == [NUM_IMAGE_TOKENS, NUM_IMAGE_TOKENS]


# --- Saving and loading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "image_processor_class"), [("pil", QwenVLImageProcessorPil), ("torchvision", QwenVLImageProcessor)]
)
def test_a_saved_processor_reloads_with_everything_it_had(processor, tmp_path, backend, image_processor_class):
    processor.save_pretrained(tmp_path)
    reloaded = AutoProcessor.from_pretrained(tmp_path, **({} if backend == "pil" else {"backend": backend}))
    assert type(reloaded) is QwenVLProcessor
    assert type(reloaded.tokenizer) is QWenTokenizer
    assert type(reloaded.image_processor) is image_processor_class
    assert reloaded.num_image_tokens == NUM_IMAGE_TOKENS
    assert reloaded.chat_template == processor.chat_template
    assert reloaded.image_processor.size == processor.image_processor.size
    conversation = [user(image(), text("three <|im_end|>")), assistant("three")]
    ours, theirs = encode(processor, conversation), encode(reloaded, conversation)
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()


def test_settings_can_be_overruled_while_loading(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    reloaded = QwenVLProcessor.from_pretrained(tmp_path, size={"height": 14, "width": 14}, num_image_tokens=7)
    encoded = encode(reloaded, [user(image())])
    assert encoded["pixel_values"].shape == (1, 3, 14, 14)
    assert encoded["input_ids"][0].tolist().count(reloaded.image_token_id) == 7


def test_an_unknown_backend_is_refused(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="backend is 'numpy'; known are pil, torchvision"):
        QwenVLProcessor.from_pretrained(tmp_path, backend="numpy")


def test_a_folder_that_holds_no_processor_is_refused_by_name(processor, tmp_path):
    processor.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen"}))
    with pytest.raises(ValueError, match=rf"{tmp_path} holds no Qwen-VL processor"):
        QwenVLProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(("written", "num_image_tokens"), [({}, 256), ({"n_queries": 9}, 9)])
def test_a_config_of_the_original_says_size_and_number_of_tokens(processor, tmp_path, written, num_image_tokens):
    processor.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen", "visual": {"image_size": 56, **written}}))
    loaded = QwenVLProcessor.from_pretrained(tmp_path)
    assert loaded.num_image_tokens == num_image_tokens
    assert loaded.model_size(height=1, width=2) == (56, 56)


@pytest.mark.slow
def test_a_fresh_process_that_imports_the_package_loads_the_folder(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    code = (
        "import processing; from transformers import AutoProcessor\n"
        f"processor = AutoProcessor.from_pretrained({str(tmp_path)!r})\n"
        "print(type(processor).__name__, processor.num_image_tokens, processor.tokenizer.encode('three'))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stdout.strip() == f"QwenVLProcessor {NUM_IMAGE_TOKENS} {processor.tokenizer.encode('three')}"


# --- The original's recordings --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original_processor(original_folder, original_tokenizer) -> QwenVLProcessor:
    return QwenVLProcessor.from_pretrained(original_folder)


def test_the_original_repository_gives_a_processor_of_448_pixels_and_256_tokens(original_processor):
    assert type(original_processor.tokenizer) is QWenTokenizer
    assert original_processor.num_image_tokens == 256
    assert original_processor.image_token_id == 151859
    size = original_processor.image_processor.size
    assert (size["height"], size["width"]) == (448, 448)


def as_conversation(chat) -> list:
    """A recorded chat as messages, `Picture k: <img>path</img>` as picture parts. An answer of None stays unknown."""
    import re

    def message(role, words):
        if words is None:
            return {"role": role, "content": None}
        parts = re.split(r"Picture \d+: <img>.*?</img>\n", words)
        content = [text(parts[0])]
        for part in parts[1:]:
            content += [image(), text(part)]
        return {"role": role, "content": content}

    turns = [m for q, a in chat["history"] or [] for m in (message("user", q), message("assistant", a))]
    return [message("system", chat["system"]), *turns, message("user", chat["query"])]


def without_paths(ids: list[int]) -> list[int]:
    """Recorded ids with what is packed between <img> and </img> replaced by <imgpad>."""
    inside, replaced = False, []
    for index in ids:
        inside = inside and index != 151858
        replaced.append(151859 if inside else index)
        inside = inside or index == 151857
    return replaced


def test_prompts_have_the_ids_of_the_original_chat(original_processor, tokenizer_reference):
    chats = [chat for chat in tokenizer_reference["chat"] if chat.get("chat_format") != "raw"]
    # One chat is so long that the original drops its oldest turn: that is the caller's decision here.
    chats = [chat for chat in chats if len(chat["raw_text"]) < 5000]
    assert len(chats) == 4
    for chat in chats:
        encoded = encode(original_processor, as_conversation(chat), add_generation_prompt=True)
        assert encoded["input_ids"][0].tolist() == without_paths(chat["context_tokens"]), chat["query"]


def test_a_raw_prompt_has_the_ids_of_the_original(original_processor, tokenizer_reference):
    (chat,) = (chat for chat in tokenizer_reference["chat"] if chat.get("chat_format") == "raw")
    assert chat["raw_text"] == "raw text <img>a.png</img>"
    conversation = [user(text("raw text "), image())]
    encoded = encode(original_processor, conversation, chat_template="plain", add_generation_prompt=True)
    assert encoded["input_ids"][0].tolist() == without_paths(chat["context_tokens"])
