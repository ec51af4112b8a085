"""The order of prompts, decided by seed and epoch: TRL's forgets the epoch when a run is resumed."""

from trl.trainer.utils import RepeatSampler


class EpochRepeatSampler(RepeatSampler):
    """TRL's sampler, whose order can be had for any epoch; that of epoch 0 is TRL's.

    TRL's generator goes on from epoch to epoch, so that a run resumed in its second epoch would see the first one's
    order again.

    Example:
        >>> sampler = EpochRepeatSampler(range(3), mini_repeat_count=2, seed=0)
        >>> sampler.set_epoch(1)
        >>> list(sampler)
        [1, 1, 2, 2, 0, 0]
    """

    def set_epoch(self, epoch: int) -> None:
        """To be called before each epoch; accelerate does."""
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)
