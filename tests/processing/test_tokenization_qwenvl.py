"""QWenTokenizer: equal to the original on its recordings, and the same behaviour on a small trained vocabulary."""

import base64
import json

import pytest
import tiktoken
from transformers import AutoTokenizer

import processing  # noqa: F401  (registers the tokenizer's name)
from processing.special_tokens import IMAGE_SPECIAL_TOKENS, QWEN_VL_SPECIAL_TOKENS
from processing.tokenization_qwenvl import (
    MARK_END,
    MARK_START,
    PIECE_BREAK,
    SPLIT_PATTERN,
    QWenTokenizer,
    add_qwenvl_tokens,
    train_qwenvl_tokenizer,
)

CORPUS = ["three red digits and three blue ones", "the digit three", "ein Bild, zwei Bilder", "五 red 五"]


@pytest.fixture(scope="module")
def small() -> QWenTokenizer:
    return train_qwenvl_tokenizer(CORPUS, vocab_size=491)


def strings_without_a_path(tokenizer_reference):
    """The recorded strings, but for those where the original packs a file name into ids."""
    return [s for s in tokenizer_reference["strings"] if not ("<img>" in s["text"] and "</img>" in s["text"])]


# --- On the real vocabulary -----------------------------------------------------------------------------------------


def test_ids_equal_the_original_in_all_three_modes(original_tokenizer, tokenizer_reference):
    strings = strings_without_a_path(tokenizer_reference)
    assert len(strings) == 57
    for string in strings:
        text = string["text"]
        assert original_tokenizer(text)["input_ids"] == string["ids"], text
        assert original_tokenizer.encode_text(text, QWEN_VL_SPECIAL_TOKENS) == string["ids"], text
        assert original_tokenizer.encode_text(text, IMAGE_SPECIAL_TOKENS) == string["ids_image_special_only"], text


def test_without_special_tokens_even_a_path_has_the_original_ids(original_tokenizer, tokenizer_reference):
    for string in tokenizer_reference["strings"]:
        assert original_tokenizer.encode_text(string["text"]) == string["ids_no_special"], string["text"]


def test_decoded_texts_equal_the_original_in_all_three_modes(original_tokenizer, tokenizer_reference):
    for string in strings_without_a_path(tokenizer_reference):
        ids = string["ids"]
        assert original_tokenizer.decode(ids) == string["decoded"]
        assert original_tokenizer.decode(ids, skip_special_tokens=True) == string["decoded_skip"]
        kept = original_tokenizer.decode(ids, skip_special_tokens=True, keep_image_special=True)
        assert kept == string["decoded_skip_keep_image"]


def test_size_and_special_ids_equal_the_original(original_tokenizer, tokenizer_reference):
    misc = tokenizer_reference["misc"]
    assert len(original_tokenizer) == misc["len"] == 151860
    ids = {token: original_tokenizer.convert_tokens_to_ids(token) for token in QWEN_VL_SPECIAL_TOKENS}
    assert ids == misc["special_tokens"]
    assert original_tokenizer.pad_token_id == original_tokenizer.eos_token_id == misc["eod_id"] == 151643
    assert original_tokenizer.bos_token is None
    assert original_tokenizer.padding_side == misc["padding_side"] == "right"
    assert original_tokenizer.model_max_length == misc["model_max_length"]


def test_ids_equal_tiktoken_on_random_text(original_tokenizer, shared):
    import random
    import unicodedata

    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(shared / "tokenizers/qwen-vl/qwen.tiktoken"))
    special = {token: len(ranks) + place for place, token in enumerate(QWEN_VL_SPECIAL_TOKENS)}
    original = tiktoken.Encoding("qwen", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    letters = random.Random(17)
    alphabet = [
        *"aeiouthnsr ABC0123456789,.()<>/|_'\n\r\t",
        *"éüßñ一二三漢字かな한글العربيةไทย½²①😀",
        "\u0301",
        "\u0338",
        "<img>",
    ]
    for _ in range(1500):
        text = "".join(letters.choices(alphabet, k=letters.randrange(1, 40)))
        ids = original.encode(unicodedata.normalize("NFC", text), allowed_special="all")
        assert original_tokenizer(text)["input_ids"] == ids, text


def test_auto_tokenizer_reads_the_original_files_without_remote_code(original_folder, tmp_path, tokenizer_reference):
    for name in ("qwen.tiktoken", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((original_folder / name).read_bytes())
    (tmp_path / "config.json").write_text("{}")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is QWenTokenizer
    string = tokenizer_reference["strings"][24]
    assert tokenizer(string["text"])["input_ids"] == string["ids"]


def test_a_saved_real_vocabulary_reloads_with_the_same_ids(original_tokenizer, tmp_path, tokenizer_reference):
    original_tokenizer.save_pretrained(tmp_path)
    reloaded = QWenTokenizer.from_pretrained(tmp_path)
    for string in strings_without_a_path(tokenizer_reference):
        assert reloaded(string["text"])["input_ids"] == string["ids"]
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "auto_map" not in saved, "it would name tokenization_qwen.py, which is not saved"


# --- On a small vocabulary ------------------------------------------------------------------------------------------


def test_special_ids_come_right_behind_a_trained_vocabulary_of_any_size(small):
    assert len(small) == 491
    assert small.convert_tokens_to_ids(list(QWEN_VL_SPECIAL_TOKENS)) == list(range(491 - 217, 491))
    assert small.eos_token_id == small.pad_token_id == 274


def test_a_corpus_that_is_too_small_gives_fewer_ids_than_asked():
    tokenizer = train_qwenvl_tokenizer(["aaaa"], vocab_size=1000)
    assert len(tokenizer) == 256 + 217 + 2  # aa, aaaa
    assert tokenizer.decode(tokenizer.encode("aaaa 五")) == "aaaa 五"


def test_a_vocabulary_without_room_for_bytes_and_special_tokens_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 472, but bytes and special tokens alone take 473"):
        train_qwenvl_tokenizer(CORPUS, vocab_size=472)


def test_digits_are_never_merged_even_if_the_corpus_repeats_a_number():
    tokenizer = train_qwenvl_tokenizer(["451 451 451 451"], vocab_size=600)
    assert tokenizer.tokenize("451") == ["4", "5", "1"]


def test_composed_and_decomposed_letters_have_equal_ids(small):
    assert small.encode("e\u0301") == small.encode("\u00e9")


def test_a_tag_that_normalisation_changes_is_no_tag(small):
    struck = "<img>\u0338"  # composes to <img≯
    assert small.convert_tokens_to_ids("<img>") not in small.encode(struck)
    assert small.decode(small.encode(struck)) == "<img\u226f"
    assert small.encode_text(struck, ["<img>"]) == small.encode(struck)


def test_a_rank_file_becomes_a_tokenizer_with_end_and_padding_tokens_and_without_remote_code(tmp_path):
    ranks = [bytes([byte]) for byte in range(256)] + [b"th", b"re", b"ee", b"thre"]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(ranks)]
    (tmp_path / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    config = {
        "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = QWenTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("three <box>") == [259, ord("e"), ord(" "), 260 + 210]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token) == (260, 260, None)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved/tokenizer_config.json").read_text())


def test_special_strings_stay_text_unless_allowed(small):
    text = "three <box>(1,2),(3,4)</box><|im_end|>"
    box, im_end = small.convert_tokens_to_ids(["<box>", "<|im_end|>"])
    assert not set(small.encode_text(text)) & set(small.convert_tokens_to_ids(list(QWEN_VL_SPECIAL_TOKENS)))
    assert box in small.encode_text(text, IMAGE_SPECIAL_TOKENS)
    assert im_end not in small.encode_text(text, IMAGE_SPECIAL_TOKENS)
    assert small.encode_text(text, QWEN_VL_SPECIAL_TOKENS) == small.encode(text)
    assert small.decode(small.encode_text(text)) == text


def test_allowing_a_string_that_is_no_special_token_is_refused(small):
    with pytest.raises(ValueError, match=r"\['<bbox>'\] are no special tokens of this vocabulary; it has 217"):
        small.encode_text("three", allowed_special=["<bbox>", "<box>"])


def test_decoding_keeps_the_grounding_tokens_and_drops_all_others_when_asked(small):
    ids = small.encode("<img><imgpad></img><ref>three</ref><box>(1,2),(3,4)</box><quad></quad><|im_end|><|endoftext|>")
    kept = small.decode(ids, skip_special_tokens=True, keep_image_special=True)
    assert kept == "<ref>three</ref><box>(1,2),(3,4)</box><quad></quad>"
    assert small.decode(ids, skip_special_tokens=True) == "three(1,2),(3,4)"
    assert small.batch_decode([ids, ids], skip_special_tokens=True, keep_image_special=True) == [kept, kept]


def test_bytes_that_are_no_utf8_decode_to_the_replacement_character(small):
    first_byte = small.encode("é")[0]
    assert small.decode([first_byte]) == "\ufffd"


@pytest.mark.parametrize("load", [QWenTokenizer.from_pretrained, AutoTokenizer.from_pretrained])
def test_a_saved_tokenizer_reloads_as_the_same_class_with_the_same_ids(small, tmp_path, load):
    small.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    reloaded = load(tmp_path)
    assert type(reloaded) is QWenTokenizer
    text = "the digit 31 <ref>three</ref>\n\n e\u0301<|im_end|>"
    assert reloaded.encode(text) == small.encode(text)
    assert reloaded.encode_text(text) == small.encode_text(text)
    assert (reloaded.eos_token_id, reloaded.pad_token_id, reloaded.bos_token) == (274, 274, None)


# --- Marked text ----------------------------------------------------------------------------------------------------


def test_a_marked_token_is_text_and_is_encoded_together_with_the_text_around_it(small):
    marked = f"three {MARK_START}<|im_end|>{MARK_END}\n<box>"
    ids = small(marked, sanitize_control_tokens=True)["input_ids"]
    assert ids == [*small.encode_text("three <|im_end|>\n"), small.convert_tokens_to_ids("<box>")]


def test_line_breaks_on_the_two_sides_of_a_piece_break_are_not_merged():
    tokenizer = train_qwenvl_tokenizer(["\n\n\n\n"], vocab_size=600)
    assert len(tokenizer.encode("\n\n")) == 1
    one = tokenizer.encode("\n")
    assert tokenizer(f"\n{PIECE_BREAK}\n", sanitize_control_tokens=True)["input_ids"] == one + one


def test_offsets_of_marked_text_point_into_the_text_with_its_marks(small):
    marked = f"<ref>{PIECE_BREAK}31{MARK_START}<ref>{MARK_END}9"
    encoded = small(marked, sanitize_control_tokens=True, return_offsets_mapping=True)
    pieces = [marked[start:end] for start, end in encoded["offset_mapping"]]
    assert pieces[:3] == ["<ref>", "3", "1"]
    assert "".join(pieces[3:]).replace(MARK_START, "").replace(MARK_END, "") == "<ref>9"


@pytest.mark.parametrize("side", ["left", "right"])
def test_marked_rows_are_padded_like_any_others_and_their_offsets_with_them(small, side):
    texts = ["three 3", "3"]
    plain = small(texts, padding=True, padding_side=side, return_tensors="pt", return_offsets_mapping=True)
    marked = small(
        texts,
        padding=True,
        padding_side=side,
        return_tensors="pt",
        return_offsets_mapping=True,
        sanitize_control_tokens=True,
    )
    for name in ("input_ids", "attention_mask", "offset_mapping"):
        assert marked[name].tolist() == plain[name].tolist(), name


def test_a_marked_row_is_truncated_like_any_other(small):
    plain = small("three red digits", truncation=True, max_length=2)["input_ids"]
    assert small("three red digits", truncation=True, max_length=2, sanitize_control_tokens=True)["input_ids"] == plain
    assert len(plain) == 2


# --- Other vocabularies ---------------------------------------------------------------------------------------------


def test_a_vocabulary_of_another_model_gets_the_missing_tokens_behind_its_own(byte_tokenizer):
    import copy

    tokenizer = copy.deepcopy(byte_tokenizer)
    size = len(tokenizer)
    assert add_qwenvl_tokens(tokenizer) == 9  # it has <|endoftext|>, <|im_start|>, <|im_end|>; the extras are left out
    assert tokenizer.convert_tokens_to_ids(list(IMAGE_SPECIAL_TOKENS)) == list(range(size, size + 9))
    assert add_qwenvl_tokens(tokenizer) == 0
