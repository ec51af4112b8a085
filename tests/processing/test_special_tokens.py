"""Special tokens: none twice, in the order of the original's ids."""

import processing.special_tokens as special_tokens
from processing.special_tokens import (
    GROUNDING_TOKENS,
    IMAGE_SPECIAL_TOKENS,
    QWEN2_VL_SPECIAL_TOKENS,
    QWEN_VL_SPECIAL_TOKENS,
)


def test_the_original_has_217_different_special_tokens_and_ends_with_imgpad():
    assert len(set(QWEN_VL_SPECIAL_TOKENS)) == len(QWEN_VL_SPECIAL_TOKENS) == 217
    assert QWEN_VL_SPECIAL_TOKENS[3] == "<|extra_0|>"
    assert QWEN_VL_SPECIAL_TOKENS[207] == "<|extra_204|>"
    tags = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>")
    assert QWEN_VL_SPECIAL_TOKENS[208:] == tags


def test_the_order_is_that_of_the_original_ids(tokenizer_reference):
    ids = tokenizer_reference["misc"]["special_tokens"]
    assert {token: 151643 + place for place, token in enumerate(QWEN_VL_SPECIAL_TOKENS)} == ids


def test_the_order_of_qwen2_vl_is_that_of_its_ids(shared):
    import json

    config = json.loads((shared / "tokenizers/qwen2.5-vl/tokenizer_config.json").read_text())
    by_id = {int(index): token["content"] for index, token in config["added_tokens_decoder"].items()}
    assert [by_id[151643 + place] for place in range(14)] == list(QWEN2_VL_SPECIAL_TOKENS)


def test_six_of_the_nine_image_tokens_belong_to_answers():
    assert set(IMAGE_SPECIAL_TOKENS) - set(GROUNDING_TOKENS) == {"<img>", "</img>", "<imgpad>"}
    assert len(IMAGE_SPECIAL_TOKENS) == 9


def test_every_string_is_in_one_of_the_two_vocabularies():
    strings = [value for name, value in vars(special_tokens).items() if name.isupper() and isinstance(value, str)]
    single = set(strings) - {special_tokens.IMAGE_SLOT}
    assert single <= set(QWEN_VL_SPECIAL_TOKENS) | set(QWEN2_VL_SPECIAL_TOKENS)
