"""Tiny tokenizers (one token per byte) and processors of every family, made in memory."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from processing.special_tokens import QWEN2_VL_SPECIAL_TOKENS, QWEN_VL_SPECIAL_TOKENS

CHATML = (
    "{%- set state = namespace(pictures=0) -%}"
    "{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\nBe brief.<|im_end|>\n' -}}{%- endif -%}"
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- else -%}{{- part.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def make_byte_tokenizer(special_tokens, pad_token) -> PreTrainedTokenizerFast:
    """Ids 0 ... 255 are bytes, 256 is two line breaks in a row, then the special tokens in their order."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special_tokens])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad_token, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The special tokens of Qwen2-VL on bytes, with a ChatML template."""
    tokenizer = make_byte_tokenizer(QWEN2_VL_SPECIAL_TOKENS, "<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def original_folder(shared, tmp_path_factory):
    """A folder as the original Hub repository, without its weights and remote code."""
    folder = tmp_path_factory.mktemp("Qwen-VL")
    vocabulary = shared / "tokenizers/qwen-vl"
    for path in (vocabulary / "qwen.tiktoken", *(vocabulary / "Qwen-VL").glob("*config.json")):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="session")
def original_tokenizer(original_folder):
    """QWenTokenizer on the real vocabulary."""
    from processing.tokenization_qwenvl import QWenTokenizer

    return QWenTokenizer.from_pretrained(original_folder)


@pytest.fixture(scope="session")
def tokenizer_reference(shared):
    """What the original tokenizer gives for 61 strings, 5 lists and 6 chats."""
    import json

    return json.loads((shared / "reference/tokenizer_reference.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def byte_processor(byte_tokenizer):
    """A factory of processors of the later families on bytes.

    Pictures come in patches of 2 x 2 pixels, merged 2 x 2: 16 pixels are one token, at least 4 tokens and at most 64.
    """
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil, Qwen2VLProcessor, Qwen3VLProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    classes = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}

    def build(family: str, cls=None):
        image_processor = Qwen2VLImageProcessorPil(
            patch_size=2, merge_size=2, size={"shortest_edge": 4 * 16, "longest_edge": 64 * 16}
        )
        cls = cls or classes[family]
        return cls(
            image_processor, byte_tokenizer, Qwen2VLVideoProcessor(), chat_template=byte_tokenizer.chat_template
        )

    return build


@pytest.fixture(scope="session")
def byte_qwen_vl_processor():
    """QwenVLProcessor on bytes: pictures of 28 x 28 pixels, 7 tokens each."""
    from processing.image_processing_pil_qwenvl import QwenVLImageProcessorPil
    from processing.processing_qwenvl import QwenVLProcessor

    tokenizer = make_byte_tokenizer(QWEN_VL_SPECIAL_TOKENS, "<|endoftext|>")
    return QwenVLProcessor(QwenVLImageProcessorPil(size={"height": 28, "width": 28}), tokenizer, num_image_tokens=7)
