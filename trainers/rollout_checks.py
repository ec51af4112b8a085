"""What rollouts cannot be made of, refused before anything runs: rows, processors, arguments."""

from collections.abc import Sequence
from typing import Any

from processing.document_parsing import check_markup
from processing.example import Example, RowError
from processing.grounding_mixin import GroundingMixin
from trainers.reward_solution import read_solution


def check_rows(examples: Sequence[Any], reads_solutions: bool) -> None:
    """Refuses (ValueError) what cannot be sampled and scored, by row.

    reads_solutions: whether a reward of the table compares with `solution`, which then must be of a kind it knows.
    """
    if not examples:
        raise ValueError("There are no rows to sample from: give Examples of kind 'reward'.")
    for example in examples:
        if not isinstance(example, Example):
            raise ValueError(
                f"The dataset holds a {type(example).__name__}: it must be a list of Examples of kind 'reward' "
                "(processing.rows.read_rows makes them of rows with problem and solution)."
            )
        if example.kind != "reward" or example.style != "chat":
            raise RowError(example.source, f"kind {example.kind!r} and style {example.style!r}: need 'reward', 'chat'")
        if example.weight != 1.0:
            raise RowError(
                example.source, f"weight {example.weight:g} has no meaning for sampled answers: leave it out"
            )
        if example.videos:
            raise RowError(
                example.source, "the prompt holds a video, which rollouts cannot share: give its frames as pictures"
            )
        if reads_solutions:
            try:
                solution = read_solution(example.solution)
            except ValueError as error:
                raise RowError(example.source, str(error)) from error
            if solution.html is not None:
                check_markup(solution.html, f"{example.source.where}: solution")


def check_processor(processor: Any) -> None:
    """Refuses (ValueError) a processor that cannot read boxes back."""
    if not isinstance(processor, GroundingMixin):
        raise ValueError(
            f"{type(processor).__name__} cannot read boxes out of answers: load it with "
            "processing.processing_families.load_processor."
        )


def check_arguments(args: Any, num_prompts: int) -> None:
    """Refuses (ValueError) TRL's arguments that do not fit whole groups, or rows of the dataset."""
    if args.per_device_train_batch_size % args.num_generations:
        raise ValueError(
            f"per_device_train_batch_size={args.per_device_train_batch_size} completions do not hold whole groups of "
            f"num_generations={args.num_generations}: a group stays in one micro-batch, so make it a multiple (and "
            "gradient_accumulation_steps smaller)."
        )
    prompts_per_batch = args.generation_batch_size // args.num_generations
    if num_prompts < prompts_per_batch:
        raise ValueError(
            f"{num_prompts} prompts do not fill a batch of {prompts_per_batch}, and TRL leaves out what does not: "
            "give more rows, or lower per_device_train_batch_size or gradient_accumulation_steps."
        )
    if args.reward_weights is not None:
        raise ValueError("reward_weights: weights and schedules stand in the RewardTerms.")
    if args.remove_unused_columns:
        raise ValueError("remove_unused_columns=True would drop the rows' numbers: leave it.")
