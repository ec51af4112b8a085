"""Stage trainers: answers, figures and the feature cache inside a run."""

import json

import pytest
import torch
from PIL import Image

from modeling_qwenvl.modeling_qwenvl import QwenVLForConditionalGeneration
from processing.example import Example, Source
from processing.processing_qwenvl import QwenVLProcessor
from trainers.arguments import StageArguments
from trainers.evaluation import GenerationEvaluation
from trainers.sft import QwenVLSFTTrainer


def where(number):
    picture = Image.new("RGB", (40, 20), (60 * number, 20, 20))
    return Example(
        [
            {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Where?"}]},
            {"role": "assistant", "content": [{"type": "box", "bbox": [4, 2, 20, 10 + number], "label": "it"}]},
        ],
        task="referring_grounding",
        source=Source("rows.jsonl", number),
    )


@pytest.fixture
def trainer(model_folder, tmp_path):
    """Two epochs over three rows, one row a step, asking two held-out ones after each."""

    def make(**settings):
        args = StageArguments(
            tmp_path / "run", num_train_epochs=2, per_device_train_batch_size=1, learning_rate=1e-3, logging_steps=3,
            eval_strategy="epoch", save_strategy="no", use_cpu=True, **settings,
        )  # fmt: skip
        folder = model_folder("qwen_vl")
        return QwenVLSFTTrainer(
            QwenVLForConditionalGeneration.from_pretrained(folder),
            args,
            train_dataset=[where(number) for number in range(3)],
            eval_dataset=[where(3)],
            processing_class=QwenVLProcessor.from_pretrained(folder),
            generation=GenerationEvaluation([where(3), where(4)], max_new_tokens=5, num_drawn=1),
        )

    return make


def test_each_evaluation_logs_scores_and_writes_the_answers_and_a_drawing(trainer, tmp_path):
    trained = trainer()
    trained.train()
    evaluations = [log for log in trained.state.log_history if "eval_loss" in log]
    assert [log["step"] for log in evaluations] == [3, 6]
    assert all("eval_referring_grounding/box_f1_at_0.5" in log for log in evaluations)
    folder = tmp_path / "run" / "answers"
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-000003-00.png", "step-000003.jsonl", "step-000006-00.png", "step-000006.jsonl",
    ]  # fmt: skip
    records = [json.loads(line) for line in (folder / "step-000006.jsonl").read_text().splitlines()]
    assert [record["where"] for record in records] == ["rows.jsonl:3", "rows.jsonl:4"]
    assert records[1]["true_boxes"] == [[4, 2, 20, 14]]


def test_the_best_model_can_be_chosen_by_a_score_of_its_answers(trainer):
    settings = {"metric_for_best_model": "eval_referring_grounding/unparsable", "greater_is_better": False}
    trained = trainer(**settings)
    trained.train()
    assert trained.state.best_metric in (0.0, 0.5, 1.0)


def test_drawings_reach_tensorboard(trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trained = trainer(report_to="tensorboard")
    trained.train()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [board] = {path.parent for path in (tmp_path / "board").rglob("events*")}
    events = EventAccumulator(str(board)).Reload()
    assert events.Tags()["images"] == ["answers/0"]
    assert "eval/referring_grounding/box_f1_at_0.5" in events.Tags()["scalars"]


def test_a_log_line_says_rates_shares_and_each_parts_gradient(trainer):
    trained = trainer()
    trained.train()
    lines = [log for log in trained.state.log_history if "loss" in log]
    assert len(lines) == 2
    for line in lines:
        assert line["tokens_per_second"] > 0
        assert line["pictures_per_second"] > 0
        assert line["padding_share"] == 0  # one row a step
        assert 0 < line["supervised_share"] < 1
        assert line["grad_norm_adapter"] > 0
        assert line["grad_norm_language_model"] > 0
        assert "grad_norm_tower" not in line


def test_a_run_ends_with_the_same_weights_whether_it_is_asked_or_not(trainer):
    asked, left_alone = trainer(), trainer()
    left_alone.generation = left_alone.eval_dataset = None
    left_alone.args.eval_strategy = "no"
    for trained in (asked, left_alone):
        trained.train()
    assert not any("eval_loss" in log for log in left_alone.state.log_history)
    for name, weight in asked.model.state_dict().items():
        assert torch.equal(weight, left_alone.model.state_dict()[name]), name


def test_with_a_feature_cache_a_run_ends_with_the_same_weights(trainer, tmp_path):
    plain = trainer()
    plain.train()
    cached = trainer(feature_cache_dir=str(tmp_path / "features"))
    cached.train()
    # 3 rows missed once; hit in the second epoch; the row of both evaluations missed once, hit once.
    assert (cached.feature_cache.misses, cached.feature_cache.hits) == (4, 4)
    for (name, expected), (_, found) in zip(
        plain.model.named_parameters(), cached.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=name)


def test_a_chat_model_is_saved_with_the_stop_words_of_the_chat(trainer, tmp_path):
    trained = trainer(max_steps=1)
    stops = trained.processing_class.stop_token_ids
    trained.train()
    trained.save_model(tmp_path / "saved")
    assert QwenVLForConditionalGeneration.from_pretrained(tmp_path / "saved").generation_config.eos_token_id == stops
