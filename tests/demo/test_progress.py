"""What the demonstration's bars know of a stage."""

from rich.progress import Progress
from transformers import TrainerControl, TrainerState, TrainingArguments

from examples.handwriting.progress import StageProgress, Watch


def test_a_stage_counts_the_tokens_of_its_steps_and_keeps_losses_and_scores_apart(tmp_path):
    watch = Watch(Progress(), "stage 2", total=3)
    told = StageProgress(watch, num_tokens=[5, 7, 11])
    args, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerControl()
    for step in (1, 2):
        told.on_step_end(args, TrainerState(global_step=step), control)
    told.on_log(args, TrainerState(global_step=2), control, {"loss": 1.5})
    told.on_log(args, TrainerState(global_step=2), control, {"eval_loss": 2.5, "eval_reading/exact_match": 0.75})
    assert watch.num_tokens == 12
    assert watch.losses == [(2, 1.5)]
    assert watch.asked == [(2, {"eval_loss": 2.5, "eval_reading/exact_match": 0.75})]
