"""Penalties for saying too much or the same again; all are 0 for a completion that does neither."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from trainers.reward_solution import Completion, prompt_text, text_of


def repetition(
    completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]], num_tokens: int = 8, **_: Any
) -> list[float | None]:
    """Minus the share of runs of `num_tokens` tokens that stood in the completion before; in (-1, 0].

    Tokens, not words: Chinese has no blanks, and eight are longer than what boxes and tags repeat by their form.

    Example, runs of two tokens, (1, 2) three times among five:
        >>> repetition([[]], [[1, 2, 1, 2, 1, 2]], num_tokens=2)
        [-0.6]
    """
    penalties: list[float | None] = []
    for ids in completion_ids:
        runs = Counter(tuple(ids[start : start + num_tokens]) for start in range(len(ids) - num_tokens + 1))
        total = sum(runs.values())
        penalties.append(-(total - len(runs)) / total if total > len(runs) else 0.0)
    return penalties


def overlong(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    longest: int = 256,
    soft: int = 64,
    **_: Any,
) -> list[float | None]:
    """0 up to `longest` - `soft` tokens, then falling in a line to -1 at `longest` (DAPO, arXiv 2503.14476, eq. 13).

    Example:
        >>> overlong([[], [], []], [[0] * 192, [0] * 224, [0] * 300])
        [0.0, -0.5, -1.0]
    """
    if not 0 < soft <= longest:
        raise ValueError(f"soft={soft} must lie between 1 and longest={longest}.")
    return [-min(1.0, max(0.0, (len(ids) - (longest - soft)) / soft)) for ids in completion_ids]


def too_short(
    completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]], shortest: int = 8, **_: Any
) -> list[float | None]:
    """0 from `shortest` tokens on, falling in a line to -1 for none: against answers that lose their reasoning.

    Example:
        >>> too_short([[], []], [[5, 5], [5] * 8])
        [-0.75, 0.0]
    """
    return [-max(0.0, 1 - len(ids) / shortest) for ids in completion_ids]


def prompt_copy(
    prompts: Sequence[Completion], completions: Sequence[Completion], num_words: int = 4, **_: Any
) -> list[float | None]:
    """Minus the share of the completion's runs of `num_words` words that stand in the prompt; in [-1, 0].

    Example:
        >>> prompt_copy([[{"content": "How many dogs do you see?"}]], [[{"content": "How many dogs do you see?"}]])
        [-1.0]
    """
    penalties: list[float | None] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        asked = set(_runs(prompt_text(prompt), num_words))
        said = _runs(text_of(completion), num_words)
        penalties.append(-sum(run in asked for run in said) / len(said) if said else 0.0)
    return penalties


def _runs(text: str, num_words: int) -> list[tuple[str, ...]]:
    words = text.casefold().split()
    return [tuple(words[start : start + num_words]) for start in range(len(words) - num_words + 1)]
