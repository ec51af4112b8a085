"""Rewards for the form of a completion: thinking first, then one answer."""

import re
from collections.abc import Sequence
from typing import Any

from trainers.reward_solution import Completion, text_of

_FORM = re.compile(r"<think>(?P<thought>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")


def think_answer_format(completions: Sequence[Completion], **_: Any) -> list[float | None]:
    """1 for `<think>..</think><answer>..</answer>` and nothing around it, neither of them blank; else 0.

    A tag that appears a second time, anywhere, gives 0 (DeepSeek-R1, arXiv 2501.12948, section 2.2.2, asks for the
    form; that tags are counted is ours).

    Example:
        >>> think_answer_format([[{"content": "<think>2 or 3?</think><answer>3</answer>"}], [{"content": "3"}]])
        [1.0, 0.0]
    """
    return [float(_has_form(text_of(completion))) for completion in completions]


def _has_form(text: str) -> bool:
    match = _FORM.fullmatch(text.strip())
    return (
        match is not None
        and len(_TAG.findall(text)) == 4
        and bool(match["thought"].strip())
        and bool(match["answer"].strip())
    )
