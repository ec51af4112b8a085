"""Completions scored with shared pictures and prompts, against one row at a time through the plain model."""

import pytest
import torch

from trainers.completion_logps import add_completion_head
from trainers.families import find_parts

IMAGE_ID, START_ID, END_ID = 90, 91, 92
COMPLETIONS = ((5, 3), (2, 7, 4), (3,))  # lengths of the completions of each group
PICTURES = (1, 2, 0)  # of each group
PROMPTS = (3, 5, 7)  # text tokens of each prompt


@pytest.fixture
def groups(make_rows):
    """groups(family) -> per group: prompt ids, completions, and its pictures' tensors."""

    def _groups(family):
        generator = torch.Generator().manual_seed(11)

        def text(length):
            return torch.randint(3, IMAGE_ID, (length,), generator=generator)

        made = []
        for seed, (lengths, pictures, words) in enumerate(zip(COMPLETIONS, PICTURES, PROMPTS, strict=True)):
            shown = [torch.tensor([START_ID, *[IMAGE_ID] * 4, END_ID])] * pictures
            row = make_rows(family, 1, seed=seed, pictures=pictures)[0]
            tensors = {key: row[key] for key in ("pixel_values", "image_grid_thw") if key in row}
            made.append((torch.cat([text(2), *shown, text(words)]), [text(length) for length in lengths], tensors))
        return made

    return _groups


def batch_of(groups, left=False):
    rows, labels, group_of_row = [], [], []
    for number, (prompt, completions, _) in enumerate(groups):
        for completion in completions:
            rows.append(torch.cat([prompt, completion]))
            labels.append(torch.cat([torch.full_like(prompt, -100), completion]))
            group_of_row.append(number)
    side = "left" if left else "right"
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": pad(rows, batch_first=True, padding_value=0, padding_side=side),
        "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side),
        "labels": pad(labels, batch_first=True, padding_value=-100, padding_side=side),
        "group_of_row": torch.tensor(group_of_row),
        "num_pictures": torch.tensor([(prompt == START_ID).sum() for prompt, _, _ in groups]),
    }
    for key in {key for _, _, tensors in groups for key in tensors}:
        batch[key] = torch.cat([tensors[key] for _, _, tensors in groups if key in tensors])
    return batch


def plain_logps(model, groups):
    """Per completion, its tokens' log-probabilities, each row alone and without any padding."""
    result = []
    for prompt, completions, tensors in groups:
        for completion in completions:
            ids = torch.cat([prompt, completion])[None]
            extra = {"mm_token_type_ids": (ids == IMAGE_ID).int()} if "image_grid_thw" in tensors else {}
            logits = model(input_ids=ids, **tensors, **extra, use_cache=False).logits[0]
            logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
            result.append(logps[torch.arange(len(completion)), completion])
    return result


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("layout", ["rows", "tree"])
def test_logps_and_gradients_equal_those_of_rows_alone(build, groups, family, layout, left):
    model = build(family)
    made = groups(family)
    wanted = plain_logps(model, made)
    weights = torch.linspace(-1, 2, sum(len(row) for row in wanted))
    wanted_gradients = gradients(model, (torch.cat(wanted) * weights).sum())

    add_completion_head(model, layout)
    batch = batch_of(made, left)
    logps = model(**batch, fused_lm_head=True).log_probs
    is_scored = batch["labels"][:, 1:] != -100
    assert logps.shape == is_scored.shape
    assert not logps[~is_scored].any()
    torch.testing.assert_close(logps[is_scored], torch.cat(wanted), atol=1e-5, rtol=0)
    found = gradients(model, (logps[is_scored] * weights).sum())
    assert found.keys() == wanted_gradients.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("layout", ["rows", "tree"])
def test_each_picture_goes_through_the_tower_once(build, groups, family, layout):
    model = build(family)
    add_completion_head(model, layout)
    batch = batch_of(groups(family))
    seen = []
    blocks = find_parts(model).blocks
    blocks[0].register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0].shape), with_kwargs=True)
    model(**batch, fused_lm_head=True)
    patches_of_one = {"qwen_vl": 4, "llava": 5}.get(family, 16)  # LLaVA's CLIP adds a class token
    assert [shape[:-1].numel() for shape in seen] == [3 * patches_of_one]


def test_the_prompt_of_a_tree_runs_through_the_language_model_once(build, groups, family):
    model = build(family)
    add_completion_head(model, "tree")
    seen = []
    decoder = model.get_submodule("model.language_model")
    decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape), with_kwargs=True
    )
    model(**batch_of(groups(family)), fused_lm_head=True)
    # The longest: 2 + 2 x 6 + 5 of the prompt, and its completions without their last tokens.
    assert [tuple(shape[:2]) for shape in seen] == [(3, 19 + 1 + 6 + 3)]
