"""Log-probabilities of completions, in the model's forward: pictures encoded once, output rows only where scored.

`add_completion_head` puts this on a model, at the seam where TRL puts its own head: `model(..., fused_lm_head=True)`
gives per-token log-probabilities instead of logits. So TRL's trainers use it without knowing, and DDP and FSDP, which
wrap the model, see one forward of the whole model.

Shapes: N completions in rows of L tokens, G prompts ("groups"), K pictures and videos, S scored tokens, U hidden
states that predict them (in a tree the completions of a prompt share the first), E width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import islice
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from processing.chat_spans import IGNORE
from trainers.blank_pictures import blank_inputs, nothing_of
from trainers.completion_head import token_scores
from trainers.completion_layout import Layout, LayoutName, rows_layout, tree_layout
from trainers.families import find_parts
from trainers.picture_memory import PictureMemory
from trainers.shared_pictures import encode, pictures_of, spread
from trainers.tree_attention import check_tree, tree_mask


def add_completion_head(
    model: PreTrainedModel,
    layout: LayoutName = "tree",
    temperature: float = 1.0,
    outputs: tuple[str, ...] = ("log_probs",),
    memory: PictureMemory | None = None,
    encodes_always: bool = False,
) -> None:
    """Teaches `model` to score completions: `model(**batch, fused_lm_head=True)` with a `group_of_row` in the batch.

    Other calls go on to the forward that the model had.

    Args:
        model: without its wrappers (`trainers.families.unwrap`), so that all of them see one forward.
        layout: "tree" computes a prompt once, "rows" once per completion (trainers/completion_layout.py).
        temperature: what the logits are divided by.
        outputs: which fields of TRL's `FusedCausalLMOutput` are computed (trainers/completion_head.py).
        memory: shares encoded pictures with other models and passes.
        encodes_always: encode a blank picture, with weight 0, for a batch that has none (trainers/blank_pictures.py).

    The batch:
        input_ids, attention_mask: (N, L) long; each row a prompt and one completion, padded left or right.
        labels: (N, L) long; the token where its log-probability is wanted, -100 elsewhere.
        group_of_row: (N,) long; rows of one group have the same prompt and pictures. Groups are counted from 0.
        num_pictures: (G,) long; how many pictures each group has.
        pixel_values, image_grid_thw, ...: of the pictures, each once, group by group; left out where there are none.
        num_videos: (G,) long; how many videos each group has; left out where there are none, as their
        pixel_values_videos, video_grid_thw, and second_per_grid_ts (Qwen2.5-VL).

    Every field of the result is (N, L - 1) float32, as TRL has it: column t belongs to the token at t + 1, 0 where the
    label is -100.

    Raises ValueError for a tree and a model that would misread it, and in the forward for what
    `trainers.tree_attention.tree_mask` refuses.

    Example:
        >>> add_completion_head(model, "tree", outputs=("log_probs", "entropy"))
        >>> model(**batch, fused_lm_head=True).log_probs.shape  # two completions of up to 60 tokens
        torch.Size([2, 357])
    """
    if layout == "tree":
        check_tree(model)
    blank = blank_inputs(find_parts(model)) if encodes_always else {}
    settings = _Settings(layout, temperature, outputs, memory, blank)
    original = model.forward

    # With the model's signature, against which `generate` checks its arguments.
    @wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if fused_lm_head and "group_of_row" in kwargs:
            return _score(self, settings, **kwargs)
        return original(*args, **(kwargs | {"fused_lm_head": True} if fused_lm_head else kwargs))

    # On the instance: looked up on each call, through whatever wraps the model by then.
    model.forward = MethodType(forward, model)


@dataclass
class ScoredCompletions(FusedCausalLMOutput):
    """TRL's result, and with "state_values" among the outputs what `model.value_head` says of the states before the
    tokens."""

    state_values: Tensor | None = None


@dataclass(frozen=True)
class _Settings:
    layout: LayoutName
    temperature: float
    outputs: tuple[str, ...]
    memory: PictureMemory | None
    blank: dict[str, Tensor]


def _score(
    model: PreTrainedModel,
    settings: _Settings,
    *,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    group_of_row: Tensor,
    num_pictures: Tensor,
    num_videos: Tensor | None = None,
    **rest: Any,
) -> ScoredCompletions:
    inner = model.base_model
    pictures = pictures_of(rest)
    of_groups = _by_group(num_pictures, num_videos)
    of_rows = _in_order(of_groups, group_of_row.tolist())
    positions = _row_positions(inner, input_ids, attention_mask, labels, pictures, of_rows, rest)
    inputs: dict[str, Any] = {}
    if settings.layout == "tree":
        laid = tree_layout(input_ids, attention_mask, labels, group_of_row)
        shown = _in_order(of_groups, range(len(num_pictures)))
        inputs["attention_mask"] = tree_mask(model, laid)
    else:
        laid = rows_layout(attention_mask, labels)
        shown = of_rows
        inputs["attention_mask"] = attention_mask
    memory = settings.memory
    seen = pictures or {name: value.to(input_ids.device) for name, value in settings.blank.items()}
    encoded = encode(inner, seen) if memory is None else memory.encode(model, seen)
    if encoded is not None and pictures:
        inputs["mm_encoder_outputs"] = {kind: spread(encoded, indices) for kind, indices in shown.items() if indices}
    hidden_RTE = inner(
        input_ids=laid.gather(input_ids), position_ids=laid.gather(positions), use_cache=False, **inputs
    ).last_hidden_state
    if encoded is not None and not pictures:
        hidden_RTE = hidden_RTE + nothing_of(encoded).to(hidden_RTE.dtype)
    return _predictions(model, settings, hidden_RTE, laid, labels)


def _by_group(num_pictures: Tensor, num_videos: Tensor | None) -> dict[str, list[list[int]]]:
    """Which of the K pictures and videos each group shows, by kind: their indices, videos after all pictures."""
    counts = {"image": num_pictures.tolist(), "video": [] if num_videos is None else num_videos.tolist()}
    indices = iter(range(sum(counts["image"]) + sum(counts["video"])))
    return {kind: [list(islice(indices, count)) for count in of_kind] for kind, of_kind in counts.items()}


def _in_order(of_groups: dict[str, list[list[int]]], groups: Sequence[int]) -> dict[str, list[int]]:
    """Indices in the order in which rows of these groups show them, by kind."""
    return {
        kind: [index for group in groups for index in by_group[group]] if by_group else []
        for kind, by_group in of_groups.items()
    }


def _row_positions(
    inner: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    pictures: dict[str, Tensor],
    of_rows: dict[str, list[int]],
    batch: dict[str, Any],
) -> Tensor:
    """Positions that each token has in its own row: (N, L), or (3, N, L) where M-RoPE places pictures."""
    if "image_grid_thw" not in pictures:
        return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    is_prompt = labels == IGNORE
    is_picture = (input_ids == inner.config.image_token_id) & is_prompt
    is_video = (input_ids == inner.config.video_token_id) & is_prompt
    grid_K3 = pictures["image_grid_thw"]
    of_videos: dict[str, Tensor] = {}
    if of_rows["video"]:
        of_videos["video_grid_thw"] = grid_K3[of_rows["video"]]
        if "second_per_grid_ts" in batch:
            first = len(grid_K3) - len(batch["second_per_grid_ts"])
            of_videos["second_per_grid_ts"] = batch["second_per_grid_ts"][[k - first for k in of_rows["video"]]]
    positions, _ = inner.get_rope_index(
        input_ids,
        mm_token_type_ids=is_picture.int() + 2 * is_video.int(),
        image_grid_thw=grid_K3[of_rows["image"]],
        attention_mask=attention_mask,
        **of_videos,
    )
    return positions


def _predictions(
    model: PreTrainedModel, settings: _Settings, hidden_RTE: Tensor, layout: Layout, labels: Tensor
) -> ScoredCompletions:
    is_scored = labels[:, 1:] != IGNORE
    tokens_S = labels[:, 1:][is_scored]
    T = hidden_RTE.shape[1]
    places_U, index_S = (layout.predicting_2S[0] * T + layout.predicting_2S[1]).unique(return_inverse=True)
    hidden_UE = hidden_RTE.flatten(0, 1)[places_U]
    head = model.get_output_embeddings()
    of_tokens = tuple(name for name in settings.outputs if name != "state_values")
    values = token_scores(head, hidden_UE, index_S, tokens_S, settings.temperature, of_tokens)
    if "state_values" in settings.outputs:
        values["state_values"] = model.value_head(hidden_UE.float())[index_S, 0]
    # masked_scatter keeps the graph also where nothing is scored.
    per_token = {
        name: torch.zeros(is_scored.shape, dtype=value.dtype, device=value.device).masked_scatter(is_scored, value)
        for name, value in values.items()
    }
    loss = -per_token["log_probs"].sum() / is_scored.sum().clamp(min=1)
    return ScoredCompletions(loss=loss, label_mask=is_scored, **per_token)
