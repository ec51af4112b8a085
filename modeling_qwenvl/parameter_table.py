"""How many parameters each part of a model has, and how many of them are trained."""

from transformers import PreTrainedModel


def parameter_counts(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(all, trainable) parameters by part: vision tower, adapter, language model, total. Tied tensors count once."""
    parts = {"vision tower": "visual.", "adapter": "adapter.", "language model": ""}
    counts = {part: [0, 0] for part in [*parts, "total"]}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("model.")
        part = next(part for part, prefix in parts.items() if name.startswith(prefix))
        for key in (part, "total"):
            counts[key][0] += parameter.numel()
            counts[key][1] += parameter.numel() if parameter.requires_grad else 0
    return {part: (count, trainable) for part, (count, trainable) in counts.items()}


def parameter_table(model: PreTrainedModel) -> str:
    """The counts as lines of text.

    Example:
        >>> with torch.device("meta"):
        ...     print(parameter_table(QwenVLForConditionalGeneration(QwenVLConfig())))
        part                  parameters         trainable
        vision tower       1,842,770,688     1,842,770,688
        adapter               92,839,936        91,791,360
        language model     7,721,324,544     7,721,324,544
        total              9,656,935,168     9,655,886,592
    """
    lines = [f"{'part':14}  {'parameters':>16}  {'trainable':>16}"]
    lines += [f"{part:14}  {n:16,}  {trainable:16,}" for part, (n, trainable) in parameter_counts(model).items()]
    return "\n".join(lines)
