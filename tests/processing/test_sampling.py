"""Batches of similar length, of one modality, or packed; the same on every rank, another each epoch."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from processing.sampling import LengthBatchSampler, PackedBatchSampler

LENGTHS = [(index * 37) % 101 + 1 for index in range(103)]


def flat(batches):
    return [index for batch in batches for index in batch]


def test_batches_hold_examples_of_similar_length():
    sampler = LengthBatchSampler(LENGTHS, batch_size=7, window=100)
    spread = [max(LENGTHS[i] for i in batch) - min(LENGTHS[i] for i in batch) for batch in sampler]
    assert len(spread) == 15
    assert max(spread) <= 7  # sorted, 7 neighbours of 103 lengths in 1 ... 101
    assert sorted(flat(sampler)) == list(range(103))


def test_batches_hold_one_modality():
    groups = ["image" if index % 3 else "text" for index in range(103)]
    sampler = LengthBatchSampler(LENGTHS, batch_size=5, groups=groups)
    assert all(len({groups[index] for index in batch}) == 1 for batch in sampler)
    assert sorted(flat(sampler)) == list(range(103))


def test_a_seed_and_an_epoch_decide_everything():
    def order(seed, epoch, cls=LengthBatchSampler):
        sampler = cls(LENGTHS, 101, seed=seed) if cls is PackedBatchSampler else cls(LENGTHS, 5, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    for cls in (LengthBatchSampler, PackedBatchSampler):
        assert order(1, 0, cls) == order(1, 0, cls)
        assert order(1, 0, cls) != order(1, 1, cls)
        assert order(1, 0, cls) != order(2, 0, cls)


def test_an_epoch_is_shuffled_not_sorted():
    lengths = [max(LENGTHS[i] for i in batch) for batch in LengthBatchSampler(LENGTHS, 5, window=100)]
    assert lengths != sorted(lengths)


@pytest.mark.parametrize("make", [
    lambda **ranks: LengthBatchSampler(LENGTHS, 5, **ranks),
    lambda **ranks: PackedBatchSampler(LENGTHS, 101, **ranks),
])  # fmt: skip
def test_ranks_share_the_batches_without_repeating_one(make):
    world_size = 4
    ranks = [make(rank=rank, world_size=world_size) for rank in range(world_size)]
    for epoch in (0, 3):
        for sampler in ranks:
            sampler.set_epoch(epoch)
        given_out = [list(sampler) for sampler in ranks]
        everything = ranks[0].all_batches()
        assert {len(batches) for batches in given_out} == {len(everything) // world_size} == {len(ranks[0])}
        seen = flat(batch for batches in given_out for batch in batches)
        assert len(seen) == len(set(seen))
        left_out = len(everything) % world_size
        assert len(flat(everything)) - len(seen) == len(flat(everything[len(everything) - left_out :]))


@settings(max_examples=25)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=50), st.integers(1, 13), st.integers(0, 3))
def test_every_example_is_in_one_packed_row(lengths, window, seed):
    tasks = [index % 3 for index in range(len(lengths))]
    sampler = PackedBatchSampler(lengths, 20, tasks, window=window, seed=seed)
    assert sorted(flat(sampler)) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in batch) <= 20 for batch in sampler)
    assert all(len({tasks[index] for index in batch}) == 1 for batch in sampler)


def test_a_data_loader_takes_the_batches():
    sampler = PackedBatchSampler(LENGTHS, 101, seed=3)
    loaded = list(DataLoader(range(103), batch_sampler=sampler, collate_fn=list))
    assert loaded == list(sampler)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="3 lengths but 2 groups"):
        LengthBatchSampler([1, 2, 3], 2, groups=["a", "b"])
    with pytest.raises(ValueError, match="rank is 2, it must be in"):
        PackedBatchSampler([1], 2, rank=2, world_size=2)
    with pytest.raises(ValueError, match="batch_size is 0"):
        LengthBatchSampler([1], 0)
    with pytest.raises(ValueError, match="tokens, a packed row holds 2"):
        list(PackedBatchSampler([1, 3], 2))
