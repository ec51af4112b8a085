"""What a run reports of itself, on batches that can be counted by hand."""

import pytest
import torch

from trainers import monitoring
from trainers.families import find_parts
from trainers.freezing import TrainedParts, freeze
from trainers.monitoring import StepMonitor, peak_flops

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """The monitor's clock, in seconds: clock.now can be set."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(monitoring, "perf_counter", lambda: Clock.now)
    return Clock


def monitor_of(model, parts=("tower", "adapter", "language_model", "embeddings")):
    frozen = freeze(model, TrainedParts(parts))
    return StepMonitor(frozen.parts, frozen.trains)


def batch(rows, lengths, supervised, pictures=0):
    width = max(lengths)
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    labels = torch.full((rows, width), -100)
    labels.view(-1)[:supervised] = 5
    made = {"labels": labels, "attention_mask": mask}
    return made | ({"pixel_values": torch.zeros(pictures, 3, 8, 8)} if pictures else {})


def test_rates_and_shares_count_what_was_observed_since_the_last_call(build, clock):
    monitor = monitor_of(build("qwen_vl"))
    monitor.observe(batch(2, [7, 3], supervised=4, pictures=3))
    monitor.observe(batch(1, [6], supervised=4))
    clock.now = 2.0
    figures = monitor.figures(CPU)
    assert figures["tokens_per_second"] == 16 / 2  # 7 + 3 + 6
    assert figures["pictures_per_second"] == 3 / 2
    assert figures["padding_share"] == pytest.approx(4 / 20)
    assert figures["supervised_share"] == 8 / 16
    assert figures["memory_gib"] > 0.05
    assert monitor.figures(CPU) == {}
    monitor.observe(batch(1, [5], supervised=1))
    clock.now = 3.0
    assert monitor.figures(CPU)["tokens_per_second"] == 5


def test_packed_rows_without_mask_have_no_padding(build):
    monitor = monitor_of(build("qwen_vl"))
    monitor.observe({"labels": torch.tensor([[-100, 3, 4]])})
    assert monitor.figures(CPU)["padding_share"] == 0


def test_pictures_of_the_later_families_are_counted_by_their_grid(build, clock):
    monitor = monitor_of(build("qwen2_5_vl"))
    grid = torch.tensor([[1, 4, 4], [1, 2, 2]])
    monitor.observe(batch(1, [5], 2) | {"pixel_values": torch.zeros(20, 12), "image_grid_thw": grid})
    clock.now = 1.0
    assert monitor.figures(CPU)["pictures_per_second"] == 2


def numbers(model):
    parts = find_parts(model)
    sizes = {
        part: sum(p.numel() for _, p in parts.parameters(part)) for part in ("tower", "adapter", "language_model")
    }
    return sizes | {"head": model.get_output_embeddings().weight.numel()}


def test_training_everything_costs_six_operations_per_weight_and_token(build):
    model = build("qwen2_5_vl")
    n = numbers(model)
    expected = 6 * (5 * (n["tower"] + n["adapter"]) + 7 * n["language_model"] + 3 * n["head"])
    assert monitor_of(model).flops(num_patches=5, num_tokens=7, num_supervised=3) == expected


def test_a_frozen_tower_costs_its_forward_pass_only(build):
    model = build("qwen2_5_vl")
    n = numbers(model)
    monitor = monitor_of(model, ("adapter", "language_model", "embeddings"))
    assert monitor.flops(1, 0, 0) == 2 * n["tower"] + 6 * n["adapter"]


def test_a_frozen_language_model_behind_a_trained_tower_passes_gradient_on(build):
    model = build("qwen2_5_vl")
    n = numbers(model)
    monitor = monitor_of(model, ("tower", "adapter"))
    assert monitor.flops(0, 1, 0) == 4 * n["language_model"]
    assert monitor.flops(0, 0, 1) == 4 * n["head"]


def test_devices_are_found_by_name_and_unknown_ones_have_no_peak():
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("Some CPU") is None
