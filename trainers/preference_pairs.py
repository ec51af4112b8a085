"""Preference Examples -> a prompt with two completions, chosen and rejected; pictures are decoded once for both."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from processing.chat_spans import ANSWERS, IGNORE
from processing.example import Example, Message, RowError
from processing.length import Draft, LengthPolicy, Step
from processing.pictures import ANYTHING, PictureLimits, picture_size
from processing.supervision import Supervision
from processing.videos import Clip, open_clip
from trainers.completion_batch import CompletionGroup


class PreferencePairs:
    """Turns preference Examples into pairs. Labels come from the text's spans: the answer and its end token.

    Args:
        processor: as `processing.supervision.Supervision` takes it, at the resolution of the run.
        max_length: tokens of prompt and longer answer, pictures included; None: any. Pictures of longer pairs shrink
            until both answers fit. Neither a prompt nor an answer is ever cut.
        limits: which pictures may be loaded, and from where.

    Raises:
        RowError: (when called) names the row: not a preference row, too long, a weight that no loss would read, ...

    Example:
        >>> pair = PreferencePairs(processor)(example)
        >>> [processor.decode(completion) for completion in pair.completions]
        ['Ada.<|im_end|>', 'Bob.<|im_end|>']
    """

    def __init__(self, processor: Any, max_length: int | None = None, limits: PictureLimits = ANYTHING) -> None:
        self.processor = processor
        self.max_length = max_length
        self.limits = limits

    def __call__(self, example: Example) -> CompletionGroup:
        try:
            return self._pair(example)
        except RowError:
            raise
        except ValueError as error:
            raise RowError(example.source, str(error)) from error

    def check(self, example: Example) -> None:
        """RowError for a row that is no preference row, or says what no preference loss reads."""
        try:
            _both(example)
        except ValueError as error:
            raise RowError(example.source, str(error)) from error

    def fits(self, example: Example) -> bool:
        """Whether both answers fit `max_length`, by shrinking pictures if need be; pictures are not decoded."""
        supervise = self._supervision(self.processor, ("shrink", "drop"))
        try:
            return all(supervise.measure(answered) is not None for answered in _both(example))
        except ValueError as error:
            raise RowError(example.source, str(error)) from error

    def _pair(self, example: Example) -> CompletionGroup:
        sizes = [picture_size(picture, self.limits) for picture in example.pictures]
        both = _both(example)
        clips = [open_clip(part, self.limits) for part in example.videos]
        as_it_is, fitting = self._supervision(self.processor), self._supervision(self.processor, ("shrink", "raise"))
        longer = max(both, key=lambda answered: _plan(as_it_is, answered, sizes, clips).length)
        # Both answers are read with the pictures that leave room for the longer one.
        fitted = self._supervision(_plan(fitting, longer, sizes, clips).processor, ("raise",))
        encoded = fitted(longer)
        assert encoded is not None  # "raise" decides
        drafts = [_plan(fitted, answered, sizes, clips) for answered in both]
        starts, rows = [], []
        for name, draft in zip(("chosen", "rejected"), drafts, strict=True):
            labels = torch.tensor(draft.encoded.labels)
            scored = (labels != IGNORE).nonzero()[:, 0]
            if set(draft.encoded.weights) - {0.0, 1.0}:
                raise ValueError(f"{name} has loss weights, which no preference loss reads: leave weight out")
            starts.append(int(scored[0]))
            # What the template writes after the end token is neither read nor scored.
            rows.append((torch.tensor(draft.encoded.input_ids)[: scored[-1] + 1], labels[: scored[-1] + 1]))
        prompts = [ids[:start] for (ids, _), start in zip(rows, starts, strict=True)]
        if not torch.equal(*prompts):
            raise ValueError("the chat template writes other prompts before chosen than before rejected")
        return CompletionGroup(
            prompt_P=prompts[0],
            completions=tuple(ids[start:] for (ids, _), start in zip(rows, starts, strict=True)),
            labels=tuple(labels[start:] for (_, labels), start in zip(rows, starts, strict=True)),
            vision=encoded.vision,
            num_pictures=example.num_pictures,
            num_videos=len(clips),
            source=example.source,
        )

    def _supervision(self, processor: Any, steps: tuple[Step, ...] = ()) -> Supervision:
        length = LengthPolicy(self.max_length, steps) if steps and self.max_length is not None else None
        return Supervision(processor, length, rule=ANSWERS, limits=self.limits)


def _plan(supervise: Supervision, example: Example, sizes: Sequence[tuple[int, int]], clips: Sequence[Clip]) -> Draft:
    plan = supervise.plan(example, sizes, clips)
    assert plan is not None  # none of these policies drops
    return plan[0]


def _both(example: Example) -> tuple[Example, Example]:
    """The conversation with the chosen and with the rejected answer; only that answer is trained."""
    if not isinstance(example, Example) or example.kind != "preference":
        what = f"kind {example.kind!r}" if isinstance(example, Example) else type(example).__name__
        raise ValueError(f"preference training needs rows with chosen and rejected, this is a row of {what}")
    if example.weight != 1.0:
        raise ValueError(f"the row has weight {example.weight}, which no preference loss reads: leave it out")
    assert example.chosen is not None
    assert example.rejected is not None
    prompt: list[Message] = [
        {**message, "train": False} if message["role"] == "assistant" else message for message in example.messages
    ]

    def with_answer(answer: Sequence[Message]) -> Example:
        return replace(example, kind="sft", messages=[*prompt, *answer], chosen=None, rejected=None)

    return with_answer(example.chosen), with_answer(example.rejected)
