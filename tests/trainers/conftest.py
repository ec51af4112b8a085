"""Tiny random models of each family, and batches that fit them. Sizes are small; seeds are fixed."""

import json
from functools import cache

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    TrainerCallback,
    set_seed,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from modeling_qwenvl.configuration_qwenvl import QwenVLConfig
from modeling_qwenvl.modeling_qwenvl import QwenVLForConditionalGeneration
from processing.image_processing_pil_qwenvl import QwenVLImageProcessorPil
from processing.processing_families import load_processor
from processing.processing_qwenvl import QwenVLProcessor
from processing.special_tokens import QWEN2_VL_SPECIAL_TOKENS, QWEN_VL_SPECIAL_TOKENS

IMAGE_ID, START_ID, END_ID, VOCABULARY = 90, 91, 92, 97
GRID = (1, 4, 4)  # frames, patch rows, patch columns of every picture: 4 visual tokens after merging 2 x 2

_rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
_text = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_parameters": _rope,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_ids = {
    "image_token_id": IMAGE_ID,
    "vision_start_token_id": START_ID,
    "vision_end_token_id": END_ID,
    "video_token_id": 93,
    "tie_word_embeddings": False,
}


def _qwen2_vl():
    vision = {"depth": 3, "embed_dim": 24, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 2}
    config = Qwen2VLConfig(vision_config=vision, text_config=dict(_text), **_ids)
    return Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl():
    vision = {
        "depth": 3,
        "hidden_size": 24,
        "intermediate_size": 28,
        "num_heads": 2,
        "patch_size": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
        "window_size": 8,
    }
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=dict(_text), **_ids)
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl():
    vision = {
        "depth": 3,
        "hidden_size": 24,
        "intermediate_size": 28,
        "num_heads": 2,
        "patch_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    config = Qwen3VLConfig(vision_config=vision, text_config={**_text, "head_dim": 8}, **_ids)
    return Qwen3VLForConditionalGeneration(config)


_tower = {
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def _llava():
    vision = CLIPVisionConfig(**_tower)
    text = Qwen2Config(**{**_text, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}})
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


def _qwen_vl():
    """4 queries per picture of 8 x 8 pixels, 2 x 2 patches."""
    vision = {**_tower, "position_grid": 2}
    text = {**_text, "num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    del text["tie_word_embeddings"]
    config = QwenVLConfig(
        vision_config=vision,
        text_config=text,
        num_queries=4,
        adapter_num_heads=2,
        image_token_id=IMAGE_ID,
        image_start_token_id=START_ID,
        image_end_token_id=END_ID,
        tie_word_embeddings=False,
    )
    return QwenVLForConditionalGeneration(config)


def _composed(tower, text, **adapter):
    """Two models joined; their ids as in the other families."""
    model = QwenVLForConditionalGeneration.from_vision_text_pretrained(tower, text, **adapter)
    config = model.config
    config.image_token_id, config.image_start_token_id, config.image_end_token_id = IMAGE_ID, START_ID, END_ID
    return model


def _clip_qwen2():
    """A class token that the adapter does not read, and a last layer neither."""
    text = {**_text, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    tower = CLIPVisionModel(CLIPVisionConfig(**_tower))
    return _composed(tower, Qwen2ForCausalLM(Qwen2Config(**text)), adapter="mlp", vision_feature_layer=-2)


def _siglip_llama():
    text = {**_text, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    tower = SiglipVisionModel(SiglipVisionConfig(**_tower))
    return _composed(tower, LlamaForCausalLM(LlamaConfig(**text)), num_queries=4, adapter_num_heads=2)


# Models that a user put together; `family` does not run over them.
COMPOSED = {"clip_qwen2": _clip_qwen2, "siglip_llama": _siglip_llama}

BUILDERS = {
    "qwen_vl": _qwen_vl,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "llava": _llava,
}


def _row(family: str, seed: int, length: int, pictures: int) -> dict:
    """One row: pictures first, then a prompt without loss and an answer with it, of `length` text tokens together."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, IMAGE_ID, (length,), generator=generator).tolist()
    ids = [token for _ in range(pictures) for token in (START_ID, *[IMAGE_ID] * 4, END_ID)] + text
    answer = length - length // 2
    row = {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor([-100] * (len(ids) - answer) + ids[-answer:]),
        "attention_mask": torch.ones(len(ids), dtype=torch.long),
    }
    if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        row["mm_token_type_ids"] = (row["input_ids"] == IMAGE_ID).int()
    if pictures:
        if family in ("llava", "qwen_vl", *COMPOSED):
            row["pixel_values"] = torch.randn(pictures, 3, 8, 8, generator=generator)
        else:
            frames, rows, columns = GRID
            row["pixel_values"] = torch.randn(pictures * frames * rows * columns, 3 * 2 * 2 * 2, generator=generator)
            row["image_grid_thw"] = torch.tensor([GRID] * pictures)
    return row


def _collate(rows: list[dict]) -> dict:
    """Pads on the right; pictures one after the other."""
    fill = {"labels": -100, "loss_weights": 0.0}
    batch = {}
    for key in {key: None for row in rows for key in row}:
        values = [row[key] for row in rows if key in row]
        if key in ("pixel_values", "image_grid_thw"):
            batch[key] = torch.cat(values)
        else:
            batch[key] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill.get(key, 0))
    return batch


@pytest.fixture
def build():
    """build("qwen2_5_vl", seed=0) -> a tiny random model, dropout off, always with the same weights."""

    def _build(family: str, seed: int = 0):
        set_seed(seed)
        return (BUILDERS | COMPOSED)[family]()

    return _build


@pytest.fixture
def collate():
    return _collate


@pytest.fixture
def make_rows():
    """make_rows("qwen2_5_vl", 4) -> rows of different lengths, each with one picture."""

    def _make(family: str, count: int, seed: int = 0, pictures: int = 1) -> list[dict]:
        return [_row(family, seed + i, length=5 + 3 * (i % 4), pictures=pictures) for i in range(count)]

    return _make


@pytest.fixture
def row_of():
    """row_of("qwen2_5_vl", seed, length, pictures=0) -> one row of that many text tokens and pictures."""
    return _row


# The quick suite runs the tests of every family on two of them.
@pytest.fixture(
    params=[
        name if name in ("qwen_vl", "qwen2_5_vl") else pytest.param(name, marks=pytest.mark.slow) for name in BUILDERS
    ]
)
def family(request) -> str:
    return request.param


# Folders as `from_pretrained` takes them, for tests of whole runs.

_CHATML = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- else -%}{{- part.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def _processor(family: str):
    """One token per byte; pictures of 8 x 8 pixels become 4 tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    is_ours = family in ("qwen_vl", *COMPOSED)
    special = QWEN_VL_SPECIAL_TOKENS if is_ours else QWEN2_VL_SPECIAL_TOKENS
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    if is_ours:
        return QwenVLProcessor(QwenVLImageProcessorPil(size={"height": 8, "width": 8}), fast, num_image_tokens=4)
    pictures = Qwen2VLImageProcessorPil(patch_size=2, merge_size=2, size={"shortest_edge": 16, "longest_edge": 64})
    classes = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}
    if family == "qwen3_vl":
        # All frames together: 16 of 8 x 8 pixels.
        videos = Qwen3VLVideoProcessor(patch_size=2, size={"shortest_edge": 16, "longest_edge": 1024})
    else:
        videos = Qwen2VLVideoProcessor(patch_size=2, size={"shortest_edge": 16, "longest_edge": 64})
    return classes[family](pictures, fast, videos, chat_template=_CHATML)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """model_folder("qwen2_5_vl") -> a folder with a tiny random model and its processor."""

    @cache
    def _folder(family: str):
        processor = _processor(family)
        set_seed(0)
        model = (BUILDERS | COMPOSED)[family]()
        config = model.config
        ids = processor.tokenizer.convert_tokens_to_ids
        config.image_token_id = processor.image_token_id
        config.text_config.vocab_size = 8 * (len(processor.tokenizer) // 8 + 1)
        if isinstance(config, QwenVLConfig):
            config.image_start_token_id, config.image_end_token_id = ids("<img>"), ids("</img>")
        else:
            config.vision_start_token_id, config.vision_end_token_id = ids("<|vision_start|>"), ids("<|vision_end|>")
            config.video_token_id = ids("<|video_pad|>")
        folder = tmp_path_factory.mktemp(family)
        type(model)(config).save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    return _folder


@pytest.fixture
def rows_file(tmp_path):
    """A .jsonl of 12 rows: a grey picture of 8 x 8 pixels, and its brightness as the answer."""
    lines = []
    for number in range(12):
        Image.new("RGB", (8, 8), (20 * number,) * 3).save(tmp_path / f"{number}.png")
        question = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "How bright?"}]
        answer = {"role": "assistant", "content": f"{20 * number} of 255"}
        lines.append(json.dumps({"messages": [{"role": "user", "content": question}, answer]}))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def write_video():
    """write_video(path, num_frames=8, side=8, fps=4) -> the path of a real video that brightens."""

    def _write(path, num_frames: int = 8, side: int = 8, fps: int = 4) -> str:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=fps)
            stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
            for number in range(num_frames):
                pixels = np.full((side, side, 3), 255 * number // num_frames, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        return str(path)

    return _write


class Interruption(Exception):
    pass


class StopsAtStepThree(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise Interruption


@pytest.fixture
def train_until_step_three():
    """train_until_step_three(trainer): trains, and is interrupted there as by Ctrl-C."""

    def _train(trainer) -> None:
        trainer.add_callback(StopsAtStepThree())
        with pytest.raises(Interruption):
            trainer.train()

    return _train


@pytest.fixture
def load(model_folder):
    """load(family, noise=0.0): the tiny model in float32, its weights moved at random, and its processor."""

    def _load(family, noise=0.0):
        model = AutoModelForImageTextToText.from_pretrained(model_folder(family), dtype=torch.float32)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=noise)
        return model, load_processor(str(model_folder(family)))

    return _load
