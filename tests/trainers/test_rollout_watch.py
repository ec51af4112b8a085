"""What a run that learns from its own answers is warned about, and when."""

from trainers.rollout_sampler import EpochRepeatSampler
from trainers.rollout_watch import RolloutWatch

SPREAD = [[0.0, 1.0], [0.5, 0.25]]


def test_groups_without_spread_are_counted_and_said_once_until_it_has_passed():
    watch = RolloutWatch()
    alike = [[1.0, 1.0], [0.5, 0.25], [0.0, 0.0]]
    (said,) = watch.observe(alike, 40.0)
    assert said.startswith("2 of 3 groups have no spread")
    assert watch.observe(alike, 40.0) == []
    assert watch.observe(SPREAD, 40.0) == []
    assert len(watch.observe(alike, 40.0)) == 1


def test_completions_that_shrink_below_a_quarter_are_said_once():
    watch = RolloutWatch()
    assert [watch.observe(SPREAD, 40.0) for _ in range(10)] == [[]] * 10
    said = [message for _ in range(20) for message in watch.observe(SPREAD, 8.0)]
    assert len(said) == 1
    assert said[0].startswith("Completions have shrunk from 40 to ")


def test_completions_that_halve_or_start_short_are_fine():
    watch = RolloutWatch()
    assert not any(watch.observe(SPREAD, length) for length in [40.0] * 10 + [20.0] * 30)
    assert not any(RolloutWatch().observe(SPREAD, 2.0) for _ in range(30))


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone():
    def order(seed, epoch, passes_before=0):
        sampler = EpochRepeatSampler(range(17), mini_repeat_count=2, batch_size=17, seed=seed)
        for _ in range(passes_before):
            list(sampler)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(3, 1) == order(3, 1, passes_before=2)
    assert order(3, 1) != order(3, 2)
    assert order(3, 1)[::2] == order(3, 1)[1::2]
    assert sorted(set(order(3, 1))) == list(range(17))
