"""One stream from several sources: its proportions, its ends, its shards over ranks and workers, and resuming it."""

from collections import Counter
from itertools import islice

import pytest
from torch.utils.data import DataLoader

from processing.mixing import Mixture

A = [f"a{number}" for number in range(23)]
B = [f"b{number}" for number in range(7)]


class Stream:
    """Rows that can be iterated again, but have neither length nor index; counts how often it was gone through."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


SOURCES = {"lists": {"a": A, "b": B}, "streams": {"a": Stream(A), "b": Stream(B)}}


def mixture(kind="lists", weights=(3, 1), **settings) -> Mixture:
    return Mixture(SOURCES[kind], dict(zip("ab", weights, strict=True)), **settings)


@pytest.mark.parametrize("kind", SOURCES)
def test_once_gives_every_row_once(kind):
    assert sorted(mixture(kind)) == sorted(A + B)


@pytest.mark.parametrize("kind", SOURCES)
def test_first_ends_with_the_first_source_that_is_used_up_and_repeats_nothing(kind):
    rows = list(mixture(kind, weights=(1, 1), stop="first"))
    assert len(rows) == len(set(rows))
    assert set(B) < set(rows)
    assert not set(A) <= set(rows)


@pytest.mark.parametrize("kind", SOURCES)
def test_all_ends_when_each_was_used_up_and_goes_through_the_shorter_again(kind):
    counts = Counter(mixture(kind, weights=(1, 1), stop="all"))
    assert set(counts) == {*A, *B}
    assert all(counts[row] == 1 for row in A)
    assert min(counts[row] for row in B) >= 2
    assert max(counts[row] for row in B) - min(counts[row] for row in B) <= 1


def test_weights_are_proportions():
    many = {"text": range(10_000), "image": range(10_000, 20_000)}
    drawn = list(islice(Mixture(many, {"text": 1, "image": 4}, seed=5), 5000))
    assert sum(row < 10_000 for row in drawn) == pytest.approx(1000, abs=100)  # 3.5 standard deviations


def test_without_weights_sources_are_drawn_in_proportion_to_their_lengths():
    many = {"a": range(1000), "b": range(1000, 5000)}
    first = list(islice(Mixture(many, seed=1), 1000))
    assert sum(row < 1000 for row in first) == pytest.approx(200, abs=50)
    with pytest.raises(ValueError, match="length of b is not known: give weights"):
        Mixture({"a": A, "b": Stream(B)})


def test_a_seed_and_an_epoch_decide_the_order_and_lists_are_shuffled():
    def order(seed, epoch):
        mixed = mixture(seed=seed)
        mixed.set_epoch(epoch)
        return list(mixed)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert [row for row in order(1, 0) if row in A] != A
    assert [row for row in mixture("streams") if row in A] == A


def test_a_list_is_shuffled_anew_in_each_epoch_and_each_time_it_is_gone_through():
    twice = list(islice(Mixture({"a": A, "b": range(9999)}, {"a": 9999, "b": 1}, stop="all"), 2 * len(A) + 5))
    rows = [row for row in twice if row in A]
    assert sorted(rows[: len(A)]) == sorted(A)
    assert rows[: len(A)] != rows[len(A) : 2 * len(A)]
    alone = Mixture({"a": A})
    first = list(alone)
    alone.set_epoch(1)
    assert sorted(first) == sorted(alone)
    assert first != list(alone)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("stop", ["once", "first", "all"])
def test_ranks_have_the_rows_of_the_stream_in_turn(kind, stop):
    whole = list(mixture(kind, stop=stop))
    for rank in range(3):
        assert list(mixture(kind, stop=stop, rank=rank, world_size=3)) == whole[rank::3]


@pytest.mark.parametrize("kind", SOURCES)
def test_workers_and_ranks_together_have_every_row_once(kind):
    seen = []
    for rank in range(2):
        loader = DataLoader(mixture(kind, rank=rank, world_size=2), batch_size=4, num_workers=2, collate_fn=list)
        seen += [row for batch in loader for row in batch]
    assert sorted(seen) == sorted(A + B)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("stop", ["once", "all"])
@pytest.mark.parametrize("num_rows", [0, 1, 11, 29])
def test_a_stream_resumes_where_its_state_was_taken(kind, stop, num_rows):
    running = mixture(kind, stop=stop, seed=7, rank=0, world_size=1)
    running.set_epoch(2)
    rows = iter(running)
    before = list(islice(rows, num_rows))
    state = running.state_dict()
    after = list(rows)

    resumed = mixture(kind, stop=stop, seed=7)
    resumed.load_state_dict(state)
    assert list(resumed) == after
    fresh = mixture(kind, stop=stop, seed=7)
    fresh.set_epoch(2)
    assert before + after == list(fresh)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("num_batches", [1, 2, 5])
def test_a_data_loader_with_workers_resumes_with_the_same_batches(num_workers, num_batches):
    def loader(mixed):
        return DataLoader(mixed, batch_size=2, num_workers=num_workers, collate_fn=list)

    straight = mixture(seed=3, rank=1, world_size=2)
    batches = list(loader(straight))
    resumed = mixture(seed=3, rank=1, world_size=2)
    resumed.load_state_dict(straight.state_dict(num_batches=num_batches, batch_size=2))
    again = list(loader(resumed))
    if num_workers < 2:
        assert again == batches[num_batches:]
    else:  # the last, shorter batches of the workers may come in another order
        whole = [batch for batch in batches if len(batch) == 2]
        assert again[: len(whole) - num_batches] == whole[num_batches:]
        assert sorted(map(tuple, again)) == sorted(map(tuple, batches[num_batches:]))


def test_a_new_epoch_after_resuming_starts_at_its_start():
    resumed = mixture()
    resumed.load_state_dict({"epoch": 0, "seed": 0, "num_batches": 9, "batch_size": 1})
    resumed.set_epoch(0)  # as accelerate does before the first iteration
    assert len(list(resumed)) == 30 - 9
    resumed.set_epoch(1)
    assert len(list(resumed)) == 30


def test_rows_of_other_consumers_are_not_fetched():
    fetched = []

    class Rows:
        def __len__(self):
            return 12

        def __getitem__(self, index):
            fetched.append(index)
            return index

    assert len(list(Mixture({"a": Rows()}, {"a": 1}, rank=1, world_size=4))) == 3
    assert len(fetched) == 3


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (({},), "at least one source"),
        ((SOURCES["lists"], {"a": 1}), r"weights are for \['a'\], sources are \['a', 'b'\]"),
        ((SOURCES["lists"], {"a": 1, "b": 0}), r"must be above 0 .*\{'b': 0\}"),
        (({"a": A, "b": []},), r"must be above 0 .*\{'b': 0\}"),
        ((SOURCES["lists"], {"a": 1, "b": float("nan")}), "must be above 0"),
    ],
)
def test_wrong_sources_and_weights_are_refused(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        Mixture(*arguments)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="stop is 'twice'; known are once, first, all"):
        mixture(stop="twice")
    with pytest.raises(ValueError, match="rank is 3"):
        mixture(rank=3, world_size=3)
    with pytest.raises(ValueError, match="seed 1, this one has seed 0"):
        mixture().load_state_dict(mixture(seed=1).state_dict())
    with pytest.raises(ValueError, match="'a' has no rows, or cannot be iterated twice"):
        list(Mixture({"a": iter(A[:1]), "b": B}, {"a": 1, "b": 1}, stop="all"))
