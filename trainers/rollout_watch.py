"""What goes wrong silently when a model learns from its own answers: idle groups, answers that shrink."""

from collections import deque
from collections.abc import Sequence

WINDOW = 10  # batches of rollouts
COLLAPSED = 0.25  # of the length at the start


class RolloutWatch:
    """Told of every batch of rollouts, says in words what is wrong; each warning comes once until it has passed.

    Example:
        >>> watch = RolloutWatch()
        >>> watch.observe([[1.0, 1.0], [0.0, 1.0]], mean_length=40.0)
        ['1 of 2 groups have no spread: all completions got the same reward, so these prompts teach nothing. ...']
    """

    def __init__(self) -> None:
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._was_without_spread = False
        self._was_short = False

    def observe(self, rewards: Sequence[Sequence[float]], mean_length: float) -> list[str]:
        """rewards: per group, those of its completions. mean_length: tokens per completion."""
        said = []
        alike = sum(max(group) - min(group) < 1e-8 for group in rewards)
        if alike and not self._was_without_spread:
            said.append(
                f"{alike} of {len(rewards)} groups have no spread: all completions got the same reward, so these "
                "prompts teach nothing. If it stays so (frac_reward_zero_std), sample hotter or more, or leave out "
                "rows that are always right or always wrong."
            )
        self._was_without_spread = alike > 0
        if len(self._first) < WINDOW:
            self._first.append(mean_length)
        self._last.append(mean_length)
        before, now = sum(self._first) / len(self._first), sum(self._last) / len(self._last)
        is_short = len(self._last) == WINDOW and now < COLLAPSED * before
        if is_short and not self._was_short:
            said.append(
                f"Completions have shrunk from {before:.0f} to {now:.0f} tokens: the model may have found a short "
                "answer that pays. Look at the completions; 'too_short' is a reward against it."
            )
        self._was_short = is_short
        return said
