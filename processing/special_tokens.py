"""Every special string of the Qwen-VL family, once, with what it means. Ids come from the tokenizer, never from here.

Two vocabularies share one set of 151,643 byte-pair ranks and differ in what follows them:

- Qwen-VL (2023): `QWEN_VL_SPECIAL_TOKENS`, 217 strings in the order of their ids (151643 ... 151859 on the real one).
- Qwen2-VL, Qwen2.5-VL, Qwen3-VL: the `<|...|>` strings at the end of this file (151646 ... 151656 on the real one).
"""

# --- Shared by both -------------------------------------------------------------------------------------------------

ENDOFTEXT = "<|endoftext|>"  # ends a document; the only separator and padding of pre-training, hence eos and pad
IM_START = "<|im_start|>"  # opens a ChatML message: `<|im_start|>role\n`
IM_END = "<|im_end|>"  # closes a ChatML message; an answer is complete when the model writes it

# --- Qwen-VL (2023) -------------------------------------------------------------------------------------------------

EXTRAS = tuple(f"<|extra_{index}|>" for index in range(205))  # reserved, never trained
REF_START, REF_END = "<ref>", "</ref>"  # around the phrase that the boxes after it belong to
BOX_START, BOX_END = "<box>", "</box>"  # around `(x1,y1),(x2,y2)`, integers in [0, 1000)
QUAD_START, QUAD_END = "<quad>", "</quad>"  # around four corner points, for text lines that are not upright
IMG_START, IMG_END = "<img>", "</img>"  # around the visual tokens of one picture
IMGPAD = "<imgpad>"  # one visual token: its embedding is overwritten by a vector of the adapter

GROUNDING_TOKENS = (REF_START, REF_END, BOX_START, BOX_END, QUAD_START, QUAD_END)
"""The six that belong to an answer: kept when an answer is decoded for parsing."""

IMAGE_SPECIAL_TOKENS = (*GROUNDING_TOKENS, IMG_START, IMG_END, IMGPAD)
"""The nine that the original chat still reads as tokens in what a user types; all others stay text there."""

QWEN_VL_SPECIAL_TOKENS = (ENDOFTEXT, IM_START, IM_END, *EXTRAS, *IMAGE_SPECIAL_TOKENS)
"""All 217 in the order of their ids."""

IMAGE_SLOT = IMG_START + IMGPAD + IMG_END
"""What stands for one picture in a text before the processor writes one `<imgpad>` per visual token."""

# --- Qwen2-VL and later ---------------------------------------------------------------------------------------------

OBJECT_REF_START, OBJECT_REF_END = "<|object_ref_start|>", "<|object_ref_end|>"  # as <ref>, </ref>
BOX2_START, BOX2_END = "<|box_start|>", "<|box_end|>"  # as <box>, </box>; Qwen2-VL only, later models write JSON
QUAD2_START, QUAD2_END = "<|quad_start|>", "<|quad_end|>"  # as <quad>, </quad>
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"  # around the visual tokens of a picture or a video
VISION_PAD = "<|vision_pad|>"  # reserved
IMAGE_PAD = "<|image_pad|>"  # one visual token of a picture
VIDEO_PAD = "<|video_pad|>"  # one visual token of a video

QWEN2_VL_SPECIAL_TOKENS = (
    ENDOFTEXT,
    IM_START,
    IM_END,
    OBJECT_REF_START,
    OBJECT_REF_END,
    BOX2_START,
    BOX2_END,
    QUAD2_START,
    QUAD2_END,
    VISION_START,
    VISION_END,
    VISION_PAD,
    IMAGE_PAD,
    VIDEO_PAD,
)
"""All 14 of the Qwen2-VL vocabulary in the order of their ids."""
