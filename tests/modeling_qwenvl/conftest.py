"""The original model on weights that a formula gives, with its pictures and answers; and tiny native models."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_qwenvl import QwenVLConfig, QwenVLForConditionalGeneration, QwenVLTextConfig, QwenVLVisionConfig

FIXTURES = Path(__file__).parents[1] / "fixtures"
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def shapes_of_original(config: dict) -> dict[str, tuple[int, ...]]:
    """Every key of the 2023 checkpoint and its shape, written down from the format's description, for any sizes."""
    visual, H, V = config["visual"], config["hidden_size"], config["vocab_size"]
    C, E, P = visual["width"], visual["output_dim"], visual["patch_size"]
    M, F = int(C * visual["mlp_ratio"]), config["intermediate_size"] // 2
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (V, H), "lm_head.weight": (V, H)}
    for n in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{n}."
        shapes |= {layer + "ln_1.weight": (H,), layer + "ln_2.weight": (H,)}
        shapes |= {layer + "attn.c_attn.weight": (3 * H, H), layer + "attn.c_attn.bias": (3 * H,)}
        shapes |= {layer + "attn.c_proj.weight": (H, H), layer + "mlp.c_proj.weight": (H, F)}
        shapes |= {layer + "mlp.w1.weight": (F, H), layer + "mlp.w2.weight": (F, H)}
    shapes["transformer.ln_f.weight"] = (H,)
    tower = "transformer.visual."
    shapes |= {tower + "conv1.weight": (C, 3, P, P), tower + "positional_embedding": (256, C)}
    norms = {tower + "ln_pre": C, tower + "ln_post": E, tower + "attn_pool.ln_q": E, tower + "attn_pool.ln_kv": E}
    linears = {tower + "attn_pool.attn.out_proj": (E, E)}
    for n in range(visual["layers"]):
        block = f"{tower}transformer.resblocks.{n}."
        norms |= {block + "ln_1": C, block + "ln_2": C}
        linears |= {block + "attn.in_proj": (3 * C, C), block + "attn.out_proj": (C, C)}
        linears |= {block + "mlp.c_fc": (M, C), block + "mlp.c_proj": (C, M)}
    for name, width in norms.items():
        shapes |= {name + ".weight": (width,), name + ".bias": (width,)}
    for name, shape in linears.items():
        shapes |= {name + ".weight": shape, name + ".bias": shape[:1]}
    pool, Q = tower + "attn_pool.", visual.get("n_queries", 256)
    shapes |= {pool + "pos_embed": (Q, E), pool + "query": (Q, E), tower + "proj": (E, E)}
    shapes |= {pool + "attn.in_proj_weight": (3 * E, E), pool + "attn.in_proj_bias": (3 * E,)}
    if C != E:
        shapes[pool + "kv_proj.weight"] = (E, C)
    return shapes


def sincos_of_original(num_queries: int, width: int) -> torch.Tensor:
    """The resampler's table cell by cell: sin and cos of the column, then of the row."""
    side = round(num_queries**0.5)
    frequency = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    cells = [(row, column) for row in range(side) for column in range(side)]
    table = [np.concatenate([f(x * frequency) for x in (c, r) for f in (np.sin, np.cos)]) for r, c in cells]
    return torch.tensor(np.array(table), dtype=torch.float32)


def seeded_original_weights(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """The weights that the recorded run had, drawn key by key in sorted order."""
    generator = np.random.Generator(np.random.PCG64(seed))
    weights = {}
    for key, shape in sorted(shapes_of_original(config).items()):
        if key.endswith("attn_pool.pos_embed"):
            weights[key] = sincos_of_original(*shape)
            continue
        r = generator.standard_normal(shape, dtype=np.float32)
        *_, owner, kind = ("", *key.split("."))
        if owner.startswith("ln_"):
            value = 1 + 0.1 * r if kind == "weight" else 0.1 * r
        elif kind.endswith("bias"):
            value = 0.1 * r
        elif key.endswith(("wte.weight", "positional_embedding", "attn_pool.query")):
            value = 0.5 * r
        else:
            fan = shape[0] if key.endswith("visual.proj") else np.prod(shape[1:])
            value = r * 1.2 / np.sqrt(fan)
        weights[key] = torch.from_numpy(value.astype(np.float32))
    return weights


def with_placeholders(input_ids: np.ndarray | torch.Tensor, start_id: int) -> torch.Tensor:
    """The original's ids with every slot between `<img>` and `</img>` (bytes of a path there) made a placeholder."""
    ids = torch.as_tensor(input_ids).clone()
    opened = (ids == start_id).int().cumsum(1) - (ids == start_id + 1).int().cumsum(1)
    return ids.masked_fill((opened == 1) & (ids != start_id), start_id + 2)


def pixels(folder: Path, names, size: int) -> torch.Tensor | None:
    """Pictures as the original prepared them: (n, 3, size, size)."""
    if names is None or len(names) == 0:
        return None
    pictures = [Image.open(folder / str(n)).convert("RGB").resize((size, size), Image.BICUBIC) for n in names]
    arrays = [(np.asarray(p, dtype=np.float32) / 255 - MEAN) / STD for p in pictures]
    return torch.from_numpy(np.stack(arrays).astype(np.float32)).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Recording:
    """What the original code gave on formula weights: `data` as described by its keys, e.g. "one_image/logits"."""

    data: dict[str, np.ndarray]
    config: dict
    weights: dict[str, torch.Tensor]
    folder: Path

    def inputs(self, case: str) -> dict[str, torch.Tensor]:
        """input_ids with placeholders, attention_mask and pixel_values (where there are pictures) of one case."""
        visual = self.config["visual"]
        ids = with_placeholders(self.data[f"{case}/input_ids"], visual["image_start_id"])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        images = pixels(FIXTURES / "images", self.data.get(f"{case}/image_files"), visual["image_size"])
        return inputs if images is None else inputs | {"pixel_values": images}


@pytest.fixture(autouse=True)
def _same_random_numbers_in_whatever_order_tests_run():
    torch.manual_seed(0)


@pytest.fixture(scope="session", name="shapes_of_original")
def shapes_of_original_fixture():
    return shapes_of_original


@pytest.fixture(scope="session", name="with_placeholders")
def with_placeholders_fixture():
    return with_placeholders


@pytest.fixture(scope="session")
def recording(tmp_path_factory) -> Recording:
    data = dict(np.load(FIXTURES / "seeded_public.npz"))
    config = json.loads(str(data["config"]))
    weights = seeded_original_weights(config, int(data["seed"]))
    folder = tmp_path_factory.mktemp("original")
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(weights, folder / "pytorch_model.bin")
    return Recording(data, config, weights, folder)


@pytest.fixture
def original(recording) -> QwenVLForConditionalGeneration:
    """A fresh model with the formula weights, loaded from the original layout."""
    return QwenVLForConditionalGeneration.from_pretrained(recording.folder)


@pytest.fixture
def tiny_config():
    """A factory of small native configs: 3 layers of width 32 below, 2 of width 64 above, 4 queries, 97 tokens."""

    def build(**fields) -> QwenVLConfig:
        vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
        vision |= {"image_size": 28, "patch_size": 7, "position_grid": 3}
        text = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2}
        text |= {"num_attention_heads": 4, "seq_length": 64}
        ids = {"image_token_id": 93, "image_start_token_id": 91, "image_end_token_id": 92}
        resampler = {"num_queries": 4, "adapter_num_heads": 2}
        if fields.get("adapter_type", "resampler") != "resampler":
            resampler = {}
        fields = {"vision_config": {}, "text_config": {}} | ids | resampler | fields
        fields["vision_config"] = QwenVLVisionConfig(**(vision | fields["vision_config"]))
        fields["text_config"] = QwenVLTextConfig(**(text | fields["text_config"]))
        return QwenVLConfig(**fields)

    return build


@pytest.fixture
def tiny_model(tiny_config):
    """A factory of small random models in evaluation mode, always with the same weights for the same config."""

    def build(**fields) -> QwenVLForConditionalGeneration:
        torch.manual_seed(7)
        return QwenVLForConditionalGeneration(tiny_config(**fields)).eval()

    return build


@pytest.fixture
def tiny_inputs() -> dict[str, torch.Tensor]:
    """Two rows of 13 tokens with one picture and two pictures."""
    picture = [91, 93, 93, 93, 93, 92]
    rows = [[5, *picture, 11, 12, 13, 17, 19, 23], [*picture, *picture, 29]]
    pixel_values = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixel_values}
