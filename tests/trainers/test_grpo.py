"""GRPO and RLOO on shared prompts give TRL's losses and weights; sampling, rewards, resuming and pages."""

import logging
import zlib
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

import modeling_qwenvl  # noqa: F401 (registers the model)
from processing.example import Example, RowError, Source
from processing.processing_families import load_processor
from trainers.completion_logps import add_completion_head
from trainers.families import find_parts
from trainers.freezing import TrainedParts, freeze
from trainers.grpo import QwenVLGRPOTrainer
from trainers.reward_solution import text_of
from trainers.rewards import RewardTerm
from trainers.rloo import QwenVLRLOOTrainer
from trainers.rollouts import VISION_TOKENS, forbidden_token_ids, grouped, scoring_fields

FAMILIES = ["qwen_vl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
COMPOSED = ["clip_qwen2", "siglip_llama"]
EVERY = FAMILIES + COMPOSED
# Together, not each: the quick suite trains by GRPO and RLOO in test_recipe_rollouts.
pytestmark = pytest.mark.slow
PARTS = TrainedParts(("adapter", "language_model", "embeddings"))
G = 3
# Of a picture of 8 x 8 pixels; CLIP adds a class token.
PATCHES = {"qwen_vl": 4, "qwen2_vl": 16, "qwen2_5_vl": 16, "qwen3_vl": 16, "clip_qwen2": 5, "siglip_llama": 4}


def picture(grey):
    return Image.new("RGB", (8, 8), (grey,) * 3)


def examples(pictures=(1, 2, 1, 1, 2, 1)):
    """Prompts of different lengths with so many pictures each."""
    rows = []
    for number, count in enumerate(pictures):
        shown = [{"type": "image", "image": picture(40 * number + 20 * index)} for index in range(count)]
        content = [*shown, {"type": "text", "text": "How bright" + "?" * number}]
        message = {"role": "user", "content": content}
        rows.append(Example([message], kind="reward", solution=str(number), source=Source("rows.jsonl", number + 1)))
    return rows


def as_stock_rows(rows):
    prompts = [[{"role": "user", "content": row.messages[0]["content"][-1]["text"]}] for row in rows]
    return Dataset.from_dict({"prompt": prompts, "images": [row.pictures for row in rows]})


def fixed_completions(prompt_ids, end):
    """Per row 1 to 7 letters, two of three times with an end, decided by the prompt and the place in its group."""
    made = []
    for place, ids in enumerate(prompt_ids):
        seed = zlib.crc32(f"{len(ids)} {place % G}".encode())
        made.append([65 + (seed >> shift) % 23 for shift in range(1 + seed % 7)] + [end] * (seed % 3 > 0))
    return made


class Injected:
    """In front of a trainer: completions that both sides write alike."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        made = fixed_completions(prompt_ids, self._tokenizer.convert_tokens_to_ids("<|im_end|>"))
        return (made, None) if isinstance(self, GRPOTrainer) else made


class StockGRPO(Injected, GRPOTrainer):
    pass


class OurGRPO(Injected, QwenVLGRPOTrainer):
    pass


class StockRLOO(Injected, RLOOTrainer):
    pass


class OurRLOO(Injected, QwenVLRLOOTrainer):
    pass


PAIRS = {"grpo": (GRPOConfig, StockGRPO, OurGRPO), "rloo": (RLOOConfig, StockRLOO, OurRLOO)}


def spread(completion_ids, **_):
    """A reward that every completion gets another value of."""
    return [sum(ids) % 17 / 17 + len(ids) / 10 for ids in completion_ids]


REWARD = RewardTerm("spread", function=spread)


def settings(config, folder, **given):
    defaults = {
        "per_device_train_batch_size": G,
        "gradient_accumulation_steps": 2,
        "num_generations": G,
        "max_completion_length": 9,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-4,  # so that a gradient of 1e-8 is not blown up to a full step
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "activation_checkpointing": False,
        "disable_tqdm": True,
    }
    return config(str(folder), **{**defaults, **given})


@pytest.fixture
def load(model_folder):
    def _load(family):
        folder = model_folder(family)
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32), load_processor(folder)

    return _load


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_close(ours, stock, atol=1e-5):
    assert ours.keys() == stock.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], stock[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def losses(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def train_both(load, tmp_path, family, algorithm, **given):
    config, stock_class, our_class = PAIRS[algorithm]
    layout, rows = given.pop("layout", "tree"), examples()
    model, processor = load(family)
    processor.tokenizer.padding_side = "left"  # TRL pads mm_token_type_ids as the tokenizer does
    processor.tokenizer.eos_token = "<|im_end|>"
    freeze(model, PARTS)
    stock = stock_class(
        model, spread, settings(config, tmp_path, **given), as_stock_rows(rows), processing_class=processor
    )
    stock.train()
    ours = our_class(load(family)[0], [REWARD], settings(config, tmp_path, **given), rows, processor, layout=layout)
    start = weights(ours.model)
    ours.train()
    moved = max((ours.model.get_parameter(n) - p).abs().max().item() for n, p in start.items())
    assert moved > 1e-3
    return ours, stock


@pytest.mark.parametrize("algorithm", PAIRS)
@pytest.mark.parametrize("family", EVERY)
def test_losses_and_weights_are_those_of_trl_on_the_same_completions(load, tmp_path, family, algorithm):
    ours, stock = train_both(load, tmp_path, family, algorithm)
    assert losses(ours) == pytest.approx(losses(stock), abs=1e-5)
    assert losses(ours, "reward") == pytest.approx(losses(stock, "reward"), abs=1e-5)
    # A mean over micro-batches, into which TRL shuffles other completions.
    assert losses(ours, "entropy") == pytest.approx(losses(stock, "entropy"), abs=1e-3)
    assert_close(weights(ours.model), weights(stock.model))


@pytest.mark.parametrize(
    "given",
    [
        {"beta": 0.1},
        {"num_iterations": 2, "max_steps": 4},
        {"loss_type": "grpo"},
        {"layout": "rows"},
        {"temperature": 0.7},
        {"mask_truncated_completions": True},
        {"per_device_train_batch_size": 2 * G, "gradient_accumulation_steps": 1},
        {"activation_checkpointing": True},
    ],
    ids=str,
)
# TRL 1.16 calls transformers' old names for checkpointing.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_every_setting_gives_what_trl_gives(load, tmp_path, algorithm, given):
    if algorithm == "rloo" and "loss_type" in given:
        given = {"normalize_advantages": True}
    ours, stock = train_both(load, tmp_path, "qwen2_5_vl", algorithm, **given)
    assert losses(ours) == pytest.approx(losses(stock), abs=1e-5)
    assert_close(weights(ours.model), weights(stock.model))
    if given.get("beta"):
        assert losses(ours, "kl") == pytest.approx(losses(stock, "kl"), abs=5e-4)  # as the entropy above
        assert losses(ours, "kl")[-1] != 0


@pytest.mark.parametrize("family", EVERY)
def test_lora_with_a_reference_gives_what_trl_gives(load, tmp_path, family):
    def wrapped():
        model, processor = load(family)
        torch.manual_seed(0)
        regex = r"model\.language_model\..*\.(q|v)_proj"
        return get_peft_model(model, LoraConfig(r=2, target_modules=regex, init_lora_weights=False)), processor

    given = {"beta": 0.1, "max_steps": 3}
    model, processor = wrapped()
    processor.tokenizer.padding_side = "left"
    processor.tokenizer.eos_token = "<|im_end|>"
    stock = StockGRPO(
        model, spread, settings(GRPOConfig, tmp_path, **given), as_stock_rows(examples()), processing_class=processor
    )
    stock.train()
    model, processor = wrapped()
    ours = OurGRPO(model, [REWARD], settings(GRPOConfig, tmp_path, **given), examples(), processor)
    ours.train()
    assert losses(ours) == pytest.approx(losses(stock), abs=1e-5)
    assert losses(ours, "kl")[-1] > 0
    assert_close(weights(ours.model), weights(stock.model))


@pytest.mark.parametrize(("family", "beta"), [("qwen2_5_vl", 0.0), ("qwen2_5_vl", 0.1), ("qwen_vl", 0.1)])
def test_lora_on_a_4_bit_model_trains_only_the_adapter_in_its_own_dtype(load, model_folder, tmp_path, family, beta):
    model = AutoModelForImageTextToText.from_pretrained(
        model_folder(family),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["model.visual", "model.adapter", "lm_head"],
        ),
        device_map="cpu",
    )
    regex = r"model\.language_model\..*\.(q|v)_proj"
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=regex))
    arguments = settings(GRPOConfig, tmp_path, beta=beta)
    trainer = QwenVLGRPOTrainer(wrapped, [REWARD], arguments, examples((0, 1, 2)), load(family)[1])
    before = weights(wrapped)
    trainer.train()
    changed = {name for name, p in wrapped.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert all(".lora_" in name and ".default." in name for name in changed)
    assert {wrapped.get_parameter(name).dtype for name in changed} == {torch.float32}


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


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_stopped(load, tmp_path, algorithm):
    config, trainer = {"grpo": (GRPOConfig, QwenVLGRPOTrainer), "rloo": (RLOOConfig, QwenVLRLOOTrainer)}[algorithm]

    def run(folder, resume=None):
        model, processor = load("qwen2_5_vl")
        arguments = settings(config, folder, max_steps=4, save_strategy="steps", save_steps=2, beta=0.1)
        ours = trainer(model, [REWARD], arguments, examples(), processor)
        ours.train(resume)
        return weights(model)

    straight = run(tmp_path / "a")
    assert_close(run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-2")), straight, atol=0)


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
