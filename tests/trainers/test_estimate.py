"""The memory estimate: exact where it counts, within a few per cent of measured peaks where it runs sizes only."""

import gc
import json
from functools import cache

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3VLConfig,
    TrainerCallback,
    set_seed,
)

from modeling_qwenvl import QwenVLConfig
from trainers.arguments import StageArguments
from trainers.estimate import GIB, Estimate, _optimizer_bytes, estimate, estimate_config
from trainers.lora import TORCH_DTYPES, quantization_config
from trainers.recipe_model import prepare_model, trained_parts
from trainers.recipe_reading import load_recipe
from trainers.sft import QwenVLSFTTrainer
from trainers.sizes_only import WEIGHT_CASTS, Allocations, GpuBehaviour, nf4_bytes

ROWS, LENGTH, SIDE = 2, 256, 112
IMAGE, START, END, VIDEO = 1990, 1991, 1992, 1993


def config_of(family: str):
    """About 1.5 million weights: 4 blocks and 4 layers, 64 patches and 16 tokens per picture of 112 pixels."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = {"vocab_size": 2003, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2, "rope_parameters": {**rope, "mrope_section": [4, 6, 6]}}  # fmt: skip
    ids = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END,
           "video_token_id": VIDEO, "tie_word_embeddings": False}  # fmt: skip
    vision = {"depth": 4, "hidden_size": 96, "intermediate_size": 192, "num_heads": 4, "patch_size": 14,
              "out_hidden_size": 128}  # fmt: skip
    if family == "qwen2_vl":
        vision = {"depth": 4, "embed_dim": 96, "hidden_size": 128, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
        return Qwen2VLConfig(vision_config=vision, text_config=text, **ids)
    if family == "qwen2_5_vl":
        vision |= {"fullatt_block_indexes": [1, 3], "window_size": 112}
        return Qwen2_5_VLConfig(vision_config=vision, text_config=text, **ids)
    if family == "qwen3_vl":
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]}
        return Qwen3VLConfig(vision_config=vision, text_config={**text, "head_dim": 32}, **ids)
    text = {**text, "num_key_value_heads": 4, "rope_parameters": rope}
    vision = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
              "image_size": SIDE, "patch_size": 14}  # fmt: skip
    if family == "llava":
        return LlavaConfig(vision_config=CLIPVisionConfig(**vision), text_config=Qwen2Config(**text),
                           image_token_index=IMAGE, vision_feature_select_strategy="default")  # fmt: skip
    return QwenVLConfig(vision_config={**vision, "position_grid": 8}, text_config=text, num_queries=16,
                        adapter_num_heads=4, image_token_id=IMAGE, image_start_token_id=START,
                        image_end_token_id=END, tie_word_embeddings=False)  # fmt: skip


def batch_of(family: str) -> dict[str, torch.Tensor]:
    """Two full rows with one picture each, everything else supervised."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1900, (ROWS, LENGTH), generator=generator)
    ids[:, 1], ids[:, 2:18], ids[:, 18] = START, IMAGE, END
    labels = ids.clone()
    labels[:, :19] = -100
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    if family == "qwen_vl":
        return batch | {"pixel_values": torch.randn(ROWS, 3, SIDE, SIDE)}
    patches = torch.randn(ROWS * 64, 3 * 2 * 14 * 14)
    grid = torch.tensor([[1, 8, 8]] * ROWS)
    return batch | {"mm_token_type_ids": (ids == IMAGE).int(), "pixel_values": patches, "image_grid_thw": grid}


def recipe_of(*overrides: str):
    return load_recipe(
        "cpu_demo",
        [
            "model.path=in-memory",
            "optimizer.max_steps=2",
            f"optimizer.global_batch_size={ROWS}",
            f"hardware.per_device_batch_size={ROWS}",
            f"data.max_length={LENGTH}",
            f"data.picture_side={SIDE}",
            *overrides,
        ],
    )


class MeasureSecondStep(TrainerCallback):
    """Records what the allocator gave and took back during the second step, when the optimiser has its states."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            gc.collect()
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profile.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.profile.__exit__(None, None, None)

    def peak(self, folder) -> int:
        self.profile.export_chrome_trace(str(folder / "trace.json"))
        events = json.loads((folder / "trace.json").read_text())["traceEvents"]
        memory = sorted((e["args"] for e in events if e.get("name") == "[memory]"), key=lambda e: e["Ev Idx"])
        now = peak = 0
        for event in memory:
            now += event["Bytes"]
            peak = max(peak, now)
        return peak


def measured(family, recipe, folder) -> tuple[int, int, int]:
    """(weights, optimiser states, peak of the rest) in bytes, of a real run on the CPU."""
    set_seed(0)
    model = AutoModelForImageTextToText.from_config(config_of(family), dtype=TORCH_DTYPES[recipe.model.dtype])
    model = prepare_model(model, recipe, [])
    optimizer = recipe.optimizer
    arguments = StageArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=ROWS, save_strategy="no", use_cpu=True,
        gradient_accumulation_steps=recipe.accumulation_steps, bf16=recipe.hardware.precision == "bfloat16",
        learning_rate=optimizer.learning_rate, disable_tqdm=True, optim="adamw_torch_fused",
    )  # fmt: skip
    batch = batch_of(family)
    callback = MeasureSecondStep()
    trainer = QwenVLSFTTrainer(
        model, arguments, train_dataset=[{}] * 16, callbacks=[callback], trained=trained_parts(recipe),
        data_collator=lambda rows: {key: value.clone() for key, value in batch.items()},
    )  # fmt: skip
    trainer.train()
    states = [value for state in trainer.optimizer.state.values() for value in state.values() if value.ndim]
    weights = sum(p.nbytes for p in model.parameters())
    return weights, sum(state.nbytes for state in states), callback.peak(folder)


LORA = ["parts.language_model.train=lora", "parts.embeddings.train=frozen", "lora={rank: 8}"]
SETTINGS = {
    "tower frozen": [],
    "all trained": ["parts.tower.train=full"],
    "checkpointing": ["parts.language_model.checkpointing=true"],
    "tower and adapter": [
        "parts={tower: {train: full}, language_model: {train: frozen}, embeddings: {train: frozen}}"
    ],
    "LoRA": LORA,
    "accumulation": ["optimizer.global_batch_size=4"],
    "bfloat16 LoRA": [*LORA, "hardware.precision=bfloat16", "model.dtype=bfloat16"],
    "bfloat16": ["hardware.precision=bfloat16"],
}
# Two of them, on two families, in the quick suite.
CASES = [
    pytest.param(
        family,
        name,
        marks=[] if (family, name) in (("qwen2_5_vl", "LoRA"), ("qwen_vl", "all trained")) else [pytest.mark.slow],
    )
    for family in ("qwen_vl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    for name in SETTINGS
]


@pytest.mark.filterwarnings("ignore:Memory block of unknown size was allocated:UserWarning")
@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_estimate_is_within_five_per_cent_of_the_measured_peak(family, name, tmp_path):
    recipe = recipe_of(*SETTINGS[name])
    found = estimate_config(config_of(family), recipe)
    weights, states, peak = measured(family, recipe, tmp_path)
    assert sum(found.weights.values()) == weights
    assert sum(found.optimizer.values()) == states
    assert found.tensors == pytest.approx(weights + states + peak, rel=0.05)


def test_the_parts_hold_what_trains_and_the_table_says_it():
    found = estimate_config(config_of("qwen2_5_vl"), recipe_of())
    assert found.trained["tower"] == 0
    assert found.optimizer["tower"] == 0
    assert found.trained["adapter"] == found.parameters["adapter"] > 0
    assert found.optimizer["adapter"] == 2 * found.weights["adapter"] == 8 * found.parameters["adapter"]
    assert found.moving["tower"] < 0.02 * found.moving["language_model"]  # pixels and what is on its way, no graph
    cells = [list(column.cells) for column in found.table().columns]
    assert cells[1][:4] == [f"{found.parameters[part]:,}" for part in found.parameters]


def moving(*overrides, family="qwen2_5_vl"):
    return estimate_config(config_of(family), recipe_of(*overrides)).moving


def test_what_the_settings_save():
    kept = moving()["language_model"]
    assert moving("parts.language_model.checkpointing=true")["language_model"] < kept / 8
    # With a quarter of the targets the peak is no longer where the loss is computed.
    whole, half = moving()["head and loss"], moving("estimate.supervised_share=0.5")["head and loss"]
    assert half == pytest.approx(whole / 2, rel=0.1)
    # Of 2 rows of 256, 2 x 240 targets beside a picture of 16 tokens each, 2 x 208 beside three.
    fewer = moving("estimate.pictures_per_row=3")["head and loss"]
    assert fewer == pytest.approx(whole * 208 / 240, rel=0.01)
    matrices = 4 * 2 * 4 * 256 * 256 * 4  # layers x rows x heads x length x length x bytes
    assert moving("model.attention=eager")["language_model"] == pytest.approx(kept + matrices, rel=0.01)
    longer = moving("data.max_length=512")["language_model"]
    assert longer == pytest.approx(2 * kept, rel=0.02)  # linear in length: no attention matrix is kept


def test_a_packed_batch_is_one_long_row_and_costs_what_its_rows_cost():
    padded, packed = moving(), moving("data.packing=true")
    for label in ("language_model", "head and loss"):
        assert packed[label] == pytest.approx(padded[label], rel=0.02)
    half = moving("data.packing=true", f"hardware.per_device_batch_size={ROWS // 2}")
    assert half["language_model"] == pytest.approx(packed["language_model"] / 2, rel=0.02)
    matrices = 4 * 4 * 512 * 512 * 4  # layers x heads x length x length x bytes
    eager = moving("data.packing=true", "model.attention=eager")["language_model"]
    assert eager - packed["language_model"] == pytest.approx(matrices, rel=0.02)


def test_more_pictures_cost_the_tower_when_it_trains():
    one = moving("parts.tower.train=full")["tower"]
    assert moving("parts.tower.train=full", "estimate.pictures_per_row=3")["tower"] == pytest.approx(3 * one, rel=0.05)
    assert "tower" not in {label for label, size in moving().items() if size > one / 20}


def test_pictures_that_fill_the_row_are_refused():
    with pytest.raises(ValueError, match=r"16 picture\(s\) of 112 pixels have 256 tokens.*max_length 256"):
        moving("estimate.pictures_per_row=16")


def test_sharding_divides_what_stays_and_data_parallelism_adds_buckets():
    alone = estimate_config(config_of("qwen_vl"), recipe_of())
    batch = ["optimizer.global_batch_size=8"]
    copies = estimate_config(config_of("qwen_vl"), recipe_of("hardware.devices=4", *batch))
    assert copies.weights == alone.weights
    assert copies.communication == sum(alone.optimizer.values()) // 2  # a second copy of the float32 gradients
    sharded = estimate_config(config_of("qwen_vl"), recipe_of("hardware={devices: 4, sharding: full}", *batch))
    assert sum(sharded.weights.values()) == pytest.approx(sum(alone.weights.values()) / 4, abs=16)
    assert sum(sharded.optimizer.values()) == pytest.approx(sum(alone.optimizer.values()) / 4, abs=16)


@pytest.mark.slow
def test_sharding_divides_gradients_and_gathers_two_layers_at_a_time():
    alone, sharded = (
        estimate_config(config_of("qwen_vl"), recipe_of(hardware, f"optimizer.global_batch_size={rows}"))
        for hardware, rows in (("hardware.devices=1", 4), ("hardware={devices: 4, sharding: full}", 16))
    )  # two micro-batches each, so that the second finds gradients
    assert sharded.moving["gradients"] == alone.moving["gradients"] // 4 > 0
    layer = AutoModelForImageTextToText.from_config(config_of("qwen_vl")).model.language_model.layers[0]
    assert sharded.communication == 2 * sum(p.nbytes for p in layer.parameters())
    half = {"alone": "hardware.precision=bfloat16",
            "sharded": "hardware={devices: 4, sharding: full, precision: bfloat16}"}  # fmt: skip
    found = {name: estimate_config(config_of("qwen_vl"), recipe_of(hardware, "optimizer.global_batch_size=16"))
             for name, hardware in half.items()}  # fmt: skip
    assert found["sharded"].communication == sharded.communication // 2
    # Copies of weights for the multiplications, which gathered layers are already.
    assert found["alone"].moving[WEIGHT_CASTS] > 0
    assert WEIGHT_CASTS not in found["sharded"].moving


def test_what_a_gpu_must_have_is_all_tensors_a_twentieth_more_and_a_gib():
    found = Estimate(
        recipe_of(), {}, {}, weights={"tower": 3 * GIB}, optimizer={"tower": 2 * GIB},
        moving={"tower": 4 * GIB, "gradients": GIB}, communication=2 * GIB,
    )  # fmt: skip
    assert found.tensors == 12 * GIB
    assert found.gib_needed == pytest.approx(12 * 1.05 + 1)
    assert found.fits(13.7)
    assert not found.fits(13.5)


def test_eight_bit_states_take_a_quarter():
    full = sum(estimate_config(config_of("qwen_vl"), recipe_of()).optimizer.values())
    eight = sum(estimate_config(config_of("qwen_vl"), recipe_of("optimizer.states=8bit")).optimizer.values())
    assert 0.25 < eight / full < 0.30  # norms and biases below 4096 weights stay in float32


def test_eight_bit_states_of_small_tensors_stay_in_float32():
    recipe = recipe_of("optimizer.states=8bit")
    sizes = [_optimizer_bytes(torch.empty(numel), recipe) for numel in (4095, 4096)]
    assert sizes == [
        2 * 4 * 4095,
        2 * 4096 + 2 * 4 * 16,
    ]  # two floats each; two bytes, and two scales per block of 256


def test_llava_can_be_estimated_too():
    found = estimate_config(config_of("llava"), recipe_of("parts.tower.train=full"))
    assert min(found.weights.values()) > 0
    assert found.moving["tower"] > 0


# Four bits


def test_nf4_bytes_are_those_of_bitsandbytes(tmp_path):
    """Equal but for bitsandbytes' tables, 16 + 256 floats per tensor, which a real matrix does not notice."""
    config = config_of("qwen2_5_vl")
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path, quantization_config=quantization_config(tmp_path, torch.float32), device_map={"": "cpu"}
    )
    layer = model.model.language_model.layers[0].mlp.gate_proj
    numel = 128 * 352
    state = layer.weight.quant_state
    scales = state.absmax.nbytes + state.state2.absmax.nbytes + state.offset.nbytes
    assert layer.weight.nbytes + scales == nf4_bytes(numel) == numel // 2 + 704 + 4 * 3 + 4


def test_quantised_weights_are_unpacked_one_at_a_time():
    overrides = [*LORA, "model.quantization=nf4"]
    four_bit = estimate_config(config_of("qwen2_5_vl"), recipe_of(*overrides))
    plain = estimate_config(config_of("qwen2_5_vl"), recipe_of(*LORA))
    assert four_bit.parameters == plain.parameters
    assert four_bit.weights["tower"] == plain.weights["tower"]
    assert four_bit.weights["language_model"] < 0.4 * plain.weights["language_model"]
    # Activations are the same; a matrix of the largest layer, 128 x 352 in float32, comes on top at most.
    assert 0 <= sum(four_bit.moving.values()) - sum(plain.moving.values()) <= 128 * 352 * 4


# Real sizes, without weights


@cache
def qwen_vl_needs(name, *overrides):
    return estimate_config(QwenVLConfig(), load_recipe(name, list(overrides)))


@pytest.mark.slow
def test_qwen_vl_has_its_published_number_of_parameters():
    found = qwen_vl_needs("paper_pretrain", "parts.tower.checkpointing=true")
    assert sum(found.parameters.values()) == 9_656_935_168  # the checkpoint's index: 19,313,870,336 bytes of bfloat16
    assert found.parameters["language_model"] + found.parameters["embeddings"] > 7.7e9


@pytest.mark.slow
def test_qwen2_5_vl_7b_on_one_gpu(shared):
    path = f"model.path={shared / 'tokenizers/qwen2.5-vl'}"
    qlora = estimate(load_recipe("qlora_24gb", [path]))
    # 8,292,166,656 published ones, the adapter's copy that PEFT trains, and LoRA of rank 64.
    assert sum(qlora.parameters.values()) == 8_292_166_656 + 44_574_464 + 161_480_704
    assert qlora.fits(24.0)
    assert not estimate(load_recipe("lora_80gb", [path])).fits(24.0)
    assert estimate(load_recipe("lora_80gb", [path])).fits(80.0)


# sizes_only.py


def test_allocations_are_counted_from_birth_to_death_once_per_storage():
    with Allocations() as memory:
        x = torch.zeros(250)
        view = x.view(10, 25)
        memory.label = "sum"
        y = view + 1
        del x
        assert memory.now == {"other": 1000, "sum": 1000}  # the view holds the storage
        del view
        assert memory.now["other"] == 0
        z = torch.zeros(3)
        memory.relabel(z, "three")
    assert memory.now["three"] == 12
    assert memory.at_peak == {"other": 1000, "sum": 1000}
    assert y.sum() == 250


def test_flash_attention_keeps_no_matrix_of_length_by_length():
    query = torch.empty(2, 4, 64, 16, device="meta", requires_grad=True)
    with Allocations(known=[query]) as memory, GpuBehaviour():
        result = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert sum(memory.now.values()) == result.nbytes + 2 * 4 * 64 * 4


def test_autocast_multiplies_in_bfloat16_and_normalises_in_float32():
    linear = torch.nn.Linear(8, 8, device="meta")
    with GpuBehaviour(autocast=True):
        product = linear(torch.empty(4, 8, device="meta"))
        assert product.dtype == torch.bfloat16
        assert torch.nn.functional.layer_norm(product, (8,)).dtype == torch.float32
    with GpuBehaviour():
        assert linear(torch.empty(4, 8, device="meta")).dtype == torch.float32
