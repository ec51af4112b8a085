"""The table of round-trip errors."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks/box_round_trip.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("box_round_trip", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_has_each_family_within_the_contract_and_worse_without(benchmark, tmp_path, capsys):
    benchmark.main(samples=150, seed=1, output=tmp_path / "new" / "table.md")
    rows = [line.strip("| ").split(" | ") for line in (tmp_path / "new" / "table.md").read_text().splitlines()[2:]]
    assert "600 coordinates per row" in capsys.readouterr().out
    largest = {"qwenvl": 1, "qwen2_vl": 1, "qwen2_5_vl": 0.5, "qwen3_vl": 0.5}
    assert [row[0] for row in rows] == list(largest)
    for family, _, contract, down, plain in rows:
        worst, mean = (float(value) for value in contract.split(", "))
        _, mean_down, shift_down = (float(value) for value in down.split(", "))
        assert 0 < mean < worst <= largest[family] + 0.001
        assert mean_down > 1.3 * mean
        assert shift_down == pytest.approx(-mean_down), "rounding down moves every box up and left"
        assert float(plain) > 50
