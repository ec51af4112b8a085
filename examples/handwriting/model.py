"""An untrained small Qwen-VL of the real architecture, and its processor with a tokenizer made for the scenes."""

from collections.abc import Iterable

import torch

from examples.handwriting.scenes import SIZE
from modeling_qwenvl import QwenVLConfig, QwenVLForConditionalGeneration
from processing import QwenVLImageProcessorPil, QwenVLProcessor, train_qwenvl_tokenizer
from processing.special_tokens import IMG_END, IMG_START, IMGPAD

PATCH = 5  # 8 x 8 patches of a scene; a digit's square is 3 x 3 of them
NUM_QUERIES = 16  # the paper's ratio: a quarter of the patches
WIDTH = 128
LONGEST = 512  # tokens
LOOKS_BACK = (1, 2, 3, 4)  # tokens; one head each
LOOK = 2.5  # length of the parts of a query and of a key that see the distance alone; their product is the logit
FAST_WAVES = 6  # of the rotary embedding's 16: the others hardly turn from one token to the next


def make_processor(texts: Iterable[str]) -> QwenVLProcessor:
    """The real processor for pictures of SIZE pixels, with a tokenizer of at most 700 ids trained on `texts`."""
    tokenizer = train_qwenvl_tokenizer(texts, vocab_size=700)
    return QwenVLProcessor(
        QwenVLImageProcessorPil(size={"height": SIZE, "width": SIZE}), tokenizer, num_image_tokens=NUM_QUERIES
    )


def make_model(processor: QwenVLProcessor) -> QwenVLForConditionalGeneration:
    """Tower (4 blocks), resampler (16 queries) and language model (4 layers), all 128 wide; see `look_back`."""
    ids = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in (IMGPAD, IMG_START, IMG_END)}
    config = QwenVLConfig(
        vision_config={
            "model_type": "qwen_vl_vision",
            "hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": SIZE,
            "patch_size": PATCH,
            "position_grid": SIZE // PATCH,
            "initializer_range": 0.05,  # narrow layers: 0.02 is made for widths in the thousands
        },
        text_config={
            "model_type": "qwen_vl_text",
            "vocab_size": len(processor.tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "initializer_range": 0.05,
            "seq_length": LONGEST,
            "max_position_embeddings": LONGEST,
        },
        adapter_type="resampler",
        adapter_init="local",
        num_queries=NUM_QUERIES,
        adapter_num_heads=4,
        image_token_id=ids[IMGPAD],
        image_start_token_id=ids[IMG_START],
        image_end_token_id=ids[IMG_END],
        tie_word_embeddings=True,
    )
    model = QwenVLForConditionalGeneration(config)
    model.generation_config.eos_token_id = processor.stop_token_ids
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    look_back(model)
    return model


@torch.no_grad()
def look_back(model: QwenVLForConditionalGeneration) -> None:
    """Lets the heads of the language model's first layer begin with the tokens 1 to 4 places back; they learn on.

    Ours: any pre-trained language model has such heads, and to learn one takes a small model longer than our minutes.
    Without them "(" does not know that "the red three" stands four tokens before it, and a box is that of any digit.

    The biases of queries and keys are the same for all tokens, so they see the distance alone: rotated by the distance
    first, a query's points where the key of the token that many places before it points.
    """
    text = model.model.language_model
    attention = text.layers[0].self_attn
    query_bias_K2D, key_bias_K2D = (
        projection.bias.view(len(LOOKS_BACK), 2, -1) for projection in (attention.q_proj, attention.k_proj)
    )
    angles_KF = torch.tensor(LOOKS_BACK)[:, None] * text.rotary_emb.inv_freq[:FAST_WAVES]
    query_bias_K2D[:, 0, :FAST_WAVES] = LOOK * angles_KF.cos()
    query_bias_K2D[:, 1, :FAST_WAVES] = -LOOK * angles_KF.sin()
    key_bias_K2D[:, 0, :FAST_WAVES] = LOOK
