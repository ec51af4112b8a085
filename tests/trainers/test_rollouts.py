"""GRPO's and RLOO's samples: shared pictures, what is never sampled, what rewards see, pages, refusals."""

import logging
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOConfig, RLOOConfig

import modeling_qwenvl  # noqa: F401 (registers the model)
from processing.example import Example, RowError, Source
from tests.trainers.rollout_runs import (
    EVERY,
    FAMILIES,
    REWARD,
    G,
    OurGRPO,
    assert_close,
    examples,
    losses,
    settings,
    spread,
    weights,
)
from trainers.completion_logps import add_completion_head
from trainers.families import find_parts
from trainers.freezing import TrainedParts
from trainers.grpo import QwenVLGRPOTrainer
from trainers.reward_solution import text_of
from trainers.rewards import RewardTerm
from trainers.rloo import QwenVLRLOOTrainer
from trainers.rollouts import VISION_TOKENS, forbidden_token_ids, grouped, scoring_fields

# Together, not each: the quick suite trains by GRPO and RLOO in test_recipe_rollouts.
pytestmark = pytest.mark.slow
# Of a picture of 8 x 8 pixels; CLIP adds a class token.
PATCHES = {"qwen_vl": 4, "qwen2_vl": 16, "qwen2_5_vl": 16, "qwen3_vl": 16, "clip_qwen2": 5, "siglip_llama": 4}


class Counter:
    """Counts the patches that the tower's first block computes."""

    def __init__(self, model):
        self.patches = 0
        module = next(iter(find_parts(model).blocks[0].children()))
        self.handle = module.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        hidden = args[0] if args else next(iter(kwargs.values()))
        self.patches += hidden.shape[:-1].numel()


@pytest.mark.parametrize("trainer", [QwenVLGRPOTrainer, QwenVLRLOOTrainer])
@pytest.mark.parametrize("family", EVERY)
def test_a_frozen_tower_sees_each_picture_once_per_step_sampling_included(load, tmp_path, family, trainer):
    model, processor = load(family)
    counter = Counter(model)
    config = GRPOConfig if trainer is QwenVLGRPOTrainer else RLOOConfig
    arguments = settings(config, tmp_path, beta=0.1, max_steps=3)
    trainer(model, [REWARD], arguments, examples((1, 2, 0, 1, 1, 1)), processor).train()
    # Three steps of two prompts are all six prompts. Reference, old and new policy are scored too.
    assert counter.patches == 6 * PATCHES[family]


def test_a_tower_that_trains_sees_each_picture_once_to_sample_and_once_to_learn(load, tmp_path):
    model, processor = load("qwen2_5_vl")
    counter = Counter(model)
    trained = TrainedParts(("tower", "adapter", "language_model", "embeddings"))
    arguments = settings(GRPOConfig, tmp_path, max_steps=3)
    QwenVLGRPOTrainer(model, [REWARD], arguments, examples((1, 2, 0, 1, 1, 1)), processor, trained=trained).train()
    assert counter.patches == 2 * 6 * PATCHES["qwen2_5_vl"]


def test_pictures_are_preprocessed_once_per_step(load, tmp_path, monkeypatch):
    model, processor = load("qwen_vl")
    seen = []
    preprocess = type(processor.image_processor).preprocess

    def counting(self, images, *args, **kwargs):
        seen.extend(images)
        return preprocess(self, images, *args, **kwargs)

    monkeypatch.setattr(type(processor.image_processor), "preprocess", counting)
    QwenVLGRPOTrainer(model, [REWARD], settings(GRPOConfig, tmp_path, beta=0.1), examples(), processor).train()
    assert sum(len(entry) if isinstance(entry, list) else 1 for entry in seen) == 8


@pytest.mark.parametrize("trainer", [QwenVLGRPOTrainer, QwenVLRLOOTrainer])
@pytest.mark.parametrize("family", EVERY)
def test_rows_with_no_one_and_two_pictures_train_together(load, tmp_path, family, trainer):
    model, processor = load(family)
    config = GRPOConfig if trainer is QwenVLGRPOTrainer else RLOOConfig
    arguments = settings(config, tmp_path, per_device_train_batch_size=3 * G, gradient_accumulation_steps=1)
    before = weights(model)
    ours = trainer(model, [REWARD], arguments, examples((0, 1, 2, 2, 0, 1)), processor)
    ours.train()
    assert any(not torch.equal(before[name], p) for name, p in weights(model).items())
    assert len(losses(ours)) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_group_gets_the_same_samples_whoever_is_in_the_batch(load, tmp_path, family):
    """Always the likeliest token, so that only pictures and padding could make a difference."""
    model, processor = load(family)
    spoken = {}

    def listen(prompts, completions, **_):
        for prompt, completion in zip(prompts, completions, strict=True):
            spoken.setdefault(prompt[0]["content"][-1]["text"], set()).add(text_of(completion))
        return [0.0] * len(prompts)

    for size in (G, 6 * G):
        arguments = settings(
            GRPOConfig,
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=6 * G // size,
            max_steps=1,
            top_k=1,
        )
        term = RewardTerm("listen", function=listen)
        QwenVLGRPOTrainer(model, [term], arguments, examples((0, 1, 2, 2, 0, 1)), processor).train()
    assert len(spoken) == 6
    assert all(len(texts) == 1 for texts in spoken.values())


@pytest.mark.parametrize("layout", ["tree", "rows"])
@pytest.mark.parametrize("family", EVERY)
def test_what_is_sampled_as_likeliest_is_likeliest_where_it_is_scored(load, tmp_path, family, layout):
    model, processor = load(family)
    arguments = settings(GRPOConfig, tmp_path, per_device_train_batch_size=3 * G, top_k=1)
    rows = examples((0, 1, 2, 1, 1, 1))
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features), requires_grad=False)
    head.bias.data[forbidden_token_ids(model, processor)] = -1e4  # they may be likeliest, but are never sampled
    trainer = QwenVLGRPOTrainer(model, [REWARD], arguments, rows, processor, layout=layout)
    trainer.model.train()
    output = trainer._generate_and_score_completions([{"row": row} for row in (0, 1, 2) for _ in range(G)])
    add_completion_head(model, layout, outputs=("log_probs", "is_top1"))
    ids, mask = output["completion_ids"], output["completion_mask"]
    attention = torch.cat([output["prompt_mask"], mask], dim=1)
    input_ids = torch.cat([output["prompt_ids"], ids], dim=1)
    labels = input_ids.masked_fill(attention == 0, -100)
    labels[:, : -ids.shape[1]] = -100
    scored = model(
        input_ids=input_ids,
        attention_mask=attention,
        labels=labels,
        fused_lm_head=True,
        **scoring_fields(grouped(output["prompts"]), ids.device),
    )
    is_top1 = scored.is_top1[:, -ids.shape[1] :][mask.bool()]
    assert len(is_top1) > 3 * G
    assert is_top1.all()


def rollout(trainer):
    """Samples once for the first two rows."""
    trainer.model.train()
    return trainer._generate_and_score_completions([{"row": row} for row in (0, 0, 0, 1, 1, 1)])


@pytest.mark.parametrize("family", EVERY)
def test_tokens_of_vision_and_ids_without_text_are_never_sampled(load, tmp_path, family):
    model, processor = load(family)
    known = processor.tokenizer.get_vocab()
    forbidden = {known[token] for token in VISION_TOKENS if token in known}
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features), requires_grad=False)
    head.bias.data[sorted(forbidden)] = 1e4
    head.bias.data[len(processor.tokenizer) :] = 1e4
    assert forbidden
    assert len(head.bias) > len(processor.tokenizer)
    head.bias.data[200] = 1e4
    arguments = settings(GRPOConfig, tmp_path, generation_kwargs={"suppress_tokens": [200]})  # the user's own
    output = rollout(QwenVLGRPOTrainer(model, [REWARD], arguments, examples(), processor))
    sampled = set(output["completion_ids"][output["completion_mask"].bool()].tolist())
    assert sampled
    assert 200 not in sampled
    assert not sampled & forbidden
    assert max(sampled) < len(processor.tokenizer)


@pytest.mark.parametrize("family", EVERY)
def test_sampling_stops_at_the_end_token_of_the_chat_and_rewards_do_not_see_it(load, tmp_path, family):
    model, processor = load(family)
    model.generation_config.eos_token_id = processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features), requires_grad=False)
    head.bias.data[end] = 4.0
    texts = []
    term = RewardTerm(
        "listen", function=lambda completions, **_: [texts.append(text_of(c)) or 0.0 for c in completions]
    )
    arguments = settings(GRPOConfig, tmp_path, max_completion_length=60)
    output = rollout(QwenVLGRPOTrainer(model, [term], arguments, examples(), processor))
    lengths = output["completion_mask"].sum(dim=1)
    ids = output["completion_ids"]
    ended = [row for row in range(len(ids)) if lengths[row] < 60]
    assert len(ended) >= 4
    for row in ended:
        assert ids[row, lengths[row] - 1] == end
        assert end not in ids[row, : lengths[row] - 1]
    assert not any("<|im_end|>" in text for text in texts)


def test_rewards_see_the_tags_of_boxes_and_the_rows_columns(load, tmp_path):
    model, processor = load("qwen_vl")
    seen = {}
    box = processor.tokenizer.encode("<box>(0,0),(500,999)</box><|im_end|>")

    class Boxes(QwenVLGRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            return [list(box) for _ in prompt_ids], None

    def listen(**columns):
        seen.update(columns)
        return [0.0] * len(columns["completions"])

    rows = [
        Example(e.messages, kind="reward", solution=[0, 0, 8, 8], columns={"level": n}, task="where")
        for n, e in enumerate(examples((1, 2, 1)))
    ]
    terms = ["box_iou", RewardTerm("listen", function=listen)]
    trainer = Boxes(model, terms, settings(GRPOConfig, tmp_path), rows, processor)
    rollout(trainer)
    assert [text_of(c) for c in seen["completions"]] == ["<box>(0,0),(500,999)</box>"] * 6
    assert seen["level"] == [0, 0, 0, 1, 1, 1]
    assert seen["task"] == ["where"] * 6
    assert [len(shown) for shown in seen["pictures"]] == [1, 1, 1, 2, 2, 2]
    assert trainer._rewards[:, 0].tolist() == pytest.approx([4 * 8 / 64] * 6, abs=1e-2)  # half of the picture


def test_weights_of_rewards_follow_their_schedule(load, tmp_path):
    model, processor = load("qwen_vl")
    terms = [RewardTerm("spread", 1.0, final_weight=0.0, function=spread)]
    trainer = OurGRPO(model, terms, settings(GRPOConfig, tmp_path, max_steps=4), examples(), processor)
    used = []
    term = trainer._generate_and_score_completions

    def watch(inputs):
        output = term(inputs)
        used.append(trainer.reward_weights.tolist())
        return output

    trainer._generate_and_score_completions = watch
    trainer.train()
    assert used == [[1.0], [0.75], [0.5], [0.25]]


def test_evaluation_scores_held_out_rows_and_leaves_training_as_it_was(load, tmp_path):
    model, processor = load("qwen_vl")
    arguments = settings(
        GRPOConfig, tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=2 * G, max_steps=3
    )
    trainer = OurGRPO(model, [REWARD], arguments, examples(), processor, eval_dataset=examples((0, 1)))
    trainer.train()
    assert len(losses(trainer, "eval_reward")) == 3
    plain = OurGRPO(load("qwen_vl")[0], [REWARD], settings(GRPOConfig, tmp_path), examples(), processor)
    plain.train()
    assert_close(weights(model), weights(plain.model), atol=1e-6)


def test_a_group_without_spread_is_warned_about(load, tmp_path, caplog):
    model, processor = load("qwen_vl")
    term = RewardTerm("same", function=lambda completions, **_: [1.0] * len(completions))
    with caplog.at_level(logging.WARNING):
        OurGRPO(model, [term], settings(GRPOConfig, tmp_path, max_steps=2), examples(), processor).train()
    said = [record.message for record in caplog.records if "no spread" in record.message]
    assert len(said) == 1
    assert said[0].startswith("Step 1: 2 of 2 groups have no spread")


def test_completions_are_shown_with_picture_boxes_rewards_and_advantages(load, tmp_path):
    model, processor = load("qwen_vl")
    rows = [Example(e.messages, kind="reward", solution=[1, 1, 5, 5]) for e in examples((1, 1))]
    arguments = settings(GRPOConfig, tmp_path, log_completions=True, max_steps=1)
    terms = ["box_iou", REWARD]
    OurGRPO(model, terms, arguments, rows, processor).train()
    page = (tmp_path / "completions" / "step-000001.html").read_text()
    assert page.count("<img") == 2 * G
    assert page.count("<td>box_iou</td>") == page.count("<td>spread</td>") == 2 * G
    assert page.count("<td>advantage</td>") == 2 * G
    assert "How bright?" in page
    assert "<script" not in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"args": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": G}}, "hold whole groups"),
        ({"args": {"reward_weights": [1.0]}}, "stand in the RewardTerms"),
        ({"rewards": ["box_uio"]}, "did you mean 'box_iou'"),
        ({"rows": []}, "no rows to sample from"),
        ({"rows": examples((1,))}, "1 prompts do not fill a batch of 2"),
        ({"rows": [{"prompt": "?"}]}, "The dataset holds a dict"),
        ({"processor": SimpleNamespace()}, "cannot read boxes out of answers"),
        ({"rewards": ["box_iou"], "rows": [Example(examples()[0].messages, kind="reward", solution=[1, 2])]}, "boxes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_refused_before_anything_runs(load, tmp_path, change, message):
    model, processor = load("qwen_vl")
    with pytest.raises(ValueError, match=message):
        QwenVLGRPOTrainer(
            model,
            change.get("rewards", [REWARD]),
            settings(GRPOConfig, tmp_path, **change.get("args", {})),
            change.get("rows", examples()),
            change.get("processor", processor),
        )


def test_a_prompt_and_its_longest_completion_may_fill_max_length_and_no_more(load, tmp_path):
    model, processor = load("qwen_vl")
    trainer = OurGRPO(model, [REWARD], settings(GRPOConfig, tmp_path), examples(), processor)
    row = examples()[0]
    length = len(trainer._encode(row).input_ids)
    trainer.max_length = length + trainer.max_completion_length
    assert len(trainer._encode(row).input_ids) == length
    trainer.max_length -= 1
    with pytest.raises(ValueError, match=f"{length} tokens of prompt and .* are more than max_length"):
        trainer._encode(row)


def test_a_row_of_another_kind_is_refused_by_its_line(load, tmp_path):
    model, processor = load("qwen_vl")
    row = Example(
        [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}], source=Source("rows.jsonl", 17)
    )
    with pytest.raises(RowError, match=r"rows\.jsonl:17: kind 'sft'"):
        QwenVLGRPOTrainer(model, [REWARD], settings(GRPOConfig, tmp_path), [row], processor)


def test_a_row_with_a_video_is_refused_by_its_line(load, tmp_path):
    model, processor = load("qwen2_5_vl")
    content = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What happens?"}]
    row = Example([{"role": "user", "content": content}], kind="reward", solution="1", source=Source("rows.jsonl", 5))
    with pytest.raises(RowError, match=r"rows\.jsonl:5: the prompt holds a video, which rollouts cannot share"):
        QwenVLGRPOTrainer(model, [REWARD], settings(GRPOConfig, tmp_path), [row], processor)
