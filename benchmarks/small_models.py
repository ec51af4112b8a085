"""Small random models with the real architectures, for benchmarks of one training step.

Small enough for a laptop, and in the proportions that matter: a vocabulary of full size, a picture of 448 x 448 pixels
that is 1,024 patches for the tower and 256 tokens for the language model.
"""

from typing import Literal

from transformers import PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, set_seed

from modeling_qwenvl.configuration_qwenvl import QwenVLConfig
from modeling_qwenvl.modeling_qwenvl import QwenVLForConditionalGeneration

FamilyName = Literal["qwen2_5_vl", "qwen_vl"]

VOCABULARY = 151_936
SMALL_VOCABULARY = 1024  # so that the output layer does not decide what a step costs
PICTURE_TOKENS = 256  # of 448 x 448 pixels, in both families
# The last ids of the vocabulary, whatever its size.
IMAGE_ID, START_ID, END_ID, VIDEO_ID = -1, -2, -3, -4


def small_model(family: FamilyName, vocabulary: int = VOCABULARY, seed: int = 0) -> PreTrainedModel:
    """Random weights in float32; with the full vocabulary Qwen2.5-VL has 83M parameters and Qwen-VL 87M.

    The ids of pictures are the vocabulary's last ones: `vocabulary + IMAGE_ID` and so on.
    """
    set_seed(seed)
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    if family == "qwen_vl":
        vision = {
            "hidden_size": 320,
            "intermediate_size": 1280,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "image_size": 448,
            "patch_size": 14,
        }
        return QwenVLForConditionalGeneration(
            QwenVLConfig(
                vision_config=vision,
                text_config={**text, "num_key_value_heads": 6},
                num_queries=PICTURE_TOKENS,
                adapter_num_heads=6,
                image_token_id=vocabulary + IMAGE_ID,
                image_start_token_id=vocabulary + START_ID,
                image_end_token_id=vocabulary + END_ID,
                tie_word_embeddings=True,
            )
        )
    vision = {
        "depth": 8,
        "hidden_size": 320,
        "intermediate_size": 960,
        "num_heads": 4,
        "out_hidden_size": 384,
        "fullatt_block_indexes": [3, 7],
    }
    rope = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            vision_config=vision,
            text_config={**text, "num_key_value_heads": 2, "rope_parameters": rope, "tie_word_embeddings": True},
            image_token_id=vocabulary + IMAGE_ID,
            vision_start_token_id=vocabulary + START_ID,
            vision_end_token_id=vocabulary + END_ID,
            video_token_id=vocabulary + VIDEO_ID,
            tie_word_embeddings=True,
        )
    )
