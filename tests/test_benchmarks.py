"""What the benchmark of a fine-tuning step says holds, as far as a busy machine can tell: operations, not seconds."""

import pytest

from benchmarks.sft_step import Case, floor, operations

CASE = Case("qwen2_5_vl", tower_trains=False, vocabulary=4096)


@pytest.mark.slow
def test_a_step_takes_at_most_a_tenth_more_operations_than_it_must():
    least = floor(CASE)
    assert least <= operations("ours", CASE) <= 1.1 * least
