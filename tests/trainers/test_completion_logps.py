"""Completions scored with shared pictures and prompts, against one row at a time through the plain model."""

import pytest
import torch

from trainers.completion_logps import add_completion_head
from trainers.families import find_parts

IMAGE_ID, START_ID, END_ID, VIDEO_ID = 90, 91, 92, 93
COMPLETIONS = ((5, 3), (2, 7, 4), (3,))  # lengths of the completions of each group
PICTURES = (1, 2, 0)  # of each group
PROMPTS = (3, 5, 7)  # text tokens of each prompt


@pytest.fixture(params=["qwen_vl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "clip_qwen2", "siglip_llama"])
def family(request):
    return request.param


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
            has_grid = {"image_grid_thw", "video_grid_thw"} & tensors.keys()
            types = (ids == IMAGE_ID).int() + 2 * (ids == VIDEO_ID).int()
            extra = {"mm_token_type_ids": types} if has_grid else {}
            logits = model(input_ids=ids, **tensors, **extra, use_cache=False).logits[0]
            logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
            result.append(logps[torch.arange(len(completion)), completion])
    return result


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_to_rows_alone(model, made, batch, layout):
    """Log-probabilities and gradients. Returns the shapes of what the tower's first block saw in the scoring pass."""
    wanted = plain_logps(model, made)
    weights = torch.linspace(-1, 2, sum(len(row) for row in wanted))
    wanted_gradients = gradients(model, (torch.cat(wanted) * weights).sum())

    add_completion_head(model, layout)
    seen = []
    first = find_parts(model).blocks[0]
    first.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0].shape), with_kwargs=True)
    logps = model(**batch, fused_lm_head=True).log_probs
    is_scored = batch["labels"][:, 1:] != -100
    assert logps.shape == is_scored.shape
    assert not logps[~is_scored].any()
    torch.testing.assert_close(logps[is_scored], torch.cat(wanted), atol=1e-5, rtol=0)
    found = gradients(model, (logps[is_scored] * weights).sum())
    assert found.keys() == wanted_gradients.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], atol=1e-5, rtol=1e-5, msg=name)
    return seen


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("layout", ["rows", "tree"])
def test_logps_and_gradients_equal_those_of_rows_alone(build, groups, family, layout, left):
    made = groups(family)
    assert_equal_to_rows_alone(build(family), made, batch_of(made, left), layout)


@pytest.mark.parametrize("layout", ["rows", "tree"])
def test_each_picture_goes_through_the_tower_once(build, groups, family, layout):
    model = build(family)
    add_completion_head(model, layout)
    batch = batch_of(groups(family))
    seen = []
    blocks = find_parts(model).blocks
    blocks[0].register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0].shape), with_kwargs=True)
    model(**batch, fused_lm_head=True)
    # CLIP adds a class token.
    patches_of_one = {"qwen_vl": 4, "llava": 5, "clip_qwen2": 5, "siglip_llama": 4}.get(family, 16)
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


@pytest.mark.parametrize("layout", ["rows", "tree"])
def test_tokens_that_are_not_scored_are_read_all_the_same(build, groups, layout):
    model = build("qwen2_5_vl")
    made = groups("qwen2_5_vl")
    wanted = torch.cat(plain_logps(model, made))
    add_completion_head(model, layout)
    batch = batch_of(made)
    is_scored = batch["labels"] != -100
    order = is_scored.long().cumsum(1)
    # Of the first row not its first two tokens, of the third not its only two, of the fourth not one in the middle.
    left_out = torch.zeros_like(is_scored)
    left_out[0] = order[0] <= 2
    left_out[2] = True
    left_out[3] = order[3] == 3
    left_out &= is_scored
    assert left_out.sum().item() == 2 + 2 + 1
    batch["labels"] = batch["labels"].masked_fill(left_out, -100)
    logps = model(**batch, fused_lm_head=True).log_probs
    stays = ~left_out[is_scored]
    torch.testing.assert_close(logps[is_scored[:, 1:]][stays], wanted[stays], atol=1e-5, rtol=0)
    assert not logps[left_out[:, 1:]].any()


@pytest.mark.parametrize("layout", ["rows", "tree"])
def test_nothing_scored_gives_zeros_that_still_have_a_graph(build, groups, layout):
    model = build("qwen_vl")
    add_completion_head(model, layout)
    batch = batch_of(groups("qwen_vl"))
    batch["labels"].fill_(-100)
    logps = model(**batch, fused_lm_head=True).log_probs
    assert not logps.any()
    logps.sum().backward()


def test_a_tree_of_different_prompts_is_refused(build, groups):
    model = build("qwen_vl")
    add_completion_head(model, "tree")
    batch = batch_of(groups("qwen_vl"))
    batch["input_ids"][1, 0] += 1
    with pytest.raises(ValueError, match="Rows 0 and 1 belong to group 0, but their prompts of 11 tokens differ"):
        model(**batch, fused_lm_head=True)


def test_a_tree_under_flash_attention_is_refused_and_rows_are_not_asked(build, groups):
    model = build("qwen2_5_vl")
    add_completion_head(model, "tree")
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' attention does not take: load the model with"):
        model(**batch_of(groups("qwen2_5_vl")), fused_lm_head=True)


def test_under_eager_attention_a_tree_is_the_same(build, groups):
    model = build("qwen2_5_vl")
    made = groups("qwen2_5_vl")
    wanted = torch.cat(plain_logps(model, made))
    model.set_attn_implementation("eager")
    add_completion_head(model, "tree")
    batch = batch_of(made)
    logps = model(**batch, fused_lm_head=True).log_probs
    torch.testing.assert_close(logps[batch["labels"][:, 1:] != -100], wanted, atol=1e-5, rtol=0)


def test_other_calls_go_the_way_they_went(build, make_rows, collate):
    model = build("qwen2_5_vl")
    batch = collate(make_rows("qwen2_5_vl", 2))
    before = model(**batch).loss
    add_completion_head(model, "tree")
    assert torch.equal(model(**batch).loss, before)


def with_videos(made, family):
    """The groups of `groups`, the first with a video of 4 frames before its picture, the last with two more."""
    generator = torch.Generator().manual_seed(13)
    result = []
    for (prompt, completions, tensors), lengths in zip(made, ((4,), (), (2, 6)), strict=True):
        tensors, shown = dict(tensors), []
        for frames in lengths:
            # Of 4 x 4 patches; Qwen3-VL has every frame on its own.
            frame = [START_ID, *[VIDEO_ID] * 4, END_ID]
            whole = [START_ID, *[VIDEO_ID] * 4 * (frames // 2), END_ID]
            shown.append(torch.tensor(frame * (frames // 2) if family == "qwen3_vl" else whole))
        if lengths:
            grid = torch.tensor([[frames // 2, 4, 4] for frames in lengths])
            tensors["pixel_values_videos"] = torch.randn(int(grid.prod(1).sum()), 24, generator=generator)
            tensors["video_grid_thw"] = grid
            if family == "qwen2_5_vl":
                tensors["second_per_grid_ts"] = torch.tensor([1.5, 0.5][: len(lengths)])
        result.append((torch.cat([prompt[:2], *shown, prompt[2:]]), completions, tensors))
    return result


@pytest.mark.parametrize("layout", ["rows", "tree"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_videos_are_shared_as_pictures_are(build, groups, family, layout):
    model = build(family)
    made = with_videos(groups(family), family)
    batch = batch_of(made) | {"num_pictures": torch.tensor(PICTURES), "num_videos": torch.tensor([1, 0, 2])}
    seen = assert_equal_to_rows_alone(model, made, batch, layout)
    assert [shape[:-1].numel() for shape in seen] == [16 * (3 + 2 + 1 + 3)]  # pictures, and pairs of frames


@pytest.mark.parametrize("layout", ["rows", "tree"])
def test_logits_are_divided_by_the_temperature_and_the_loss_is_the_mean_over_scored_tokens(build, groups, layout):
    model = build("qwen2_5_vl")
    prompt, completions, _ = groups("qwen2_5_vl")[1]
    text = prompt[prompt < IMAGE_ID]  # without its pictures
    wanted = []
    for completion in completions:
        logits = model(input_ids=torch.cat([text, completion])[None], use_cache=False).logits[0, len(text) - 1 : -1]
        wanted.append((logits / 0.5).log_softmax(-1)[torch.arange(len(completion)), completion])
    add_completion_head(model, layout, temperature=0.5)
    scored = model(**batch_of([(text, completions, {})]), fused_lm_head=True)
    for found, expected in zip(scored.log_probs, wanted, strict=True):
        torch.testing.assert_close(found[found != 0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(scored.loss, -torch.cat(wanted).mean(), atol=1e-5, rtol=0)
    assert scored.label_mask.sum() == 2 + 7 + 4
