"""A run that is killed at any moment, in the midst of a save too, ends as one that never was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KILLED_RUNS = '''
"""Trains once without a stop; then again and again in child processes that are killed, until one reaches the end."""

import json, os, random, signal, sys
from pathlib import Path

sys.path[:0] = [{root!r}, {tests!r}]
import conftest, torch
from trainers.arguments import StageArguments
from trainers.multitask import QwenVLMultiTaskTrainer
from transformers import TrainerCallback, set_seed

torch.set_num_threads(1)
conftest._text["attention_dropout"] = 0.3  # so that the state of the random generators matters
STEPS = 14


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class Watch(TrainerCallback):
    """Writes every loss down at once, and kills the process at the end of a step."""

    def __init__(self, folder, kill_at_step):
        self.folder, self.kill_at_step = folder, kill_at_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            with open(self.folder.with_suffix(".losses"), "a") as file:
                print(json.dumps([state.global_step, logs["loss"]]), file=file)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.kill_at_step:
            kill()


def kill_at_event(folder, number):
    """Kills the process when it opens, renames or deletes for the `number`-th time in `folder`."""
    left = [number]

    def hook(event, arguments):
        events = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")
        if event in events and str(arguments[0]).startswith(str(folder)):
            left[0] -= 1
            if left[0] == 0:
                kill()

    sys.addaudithook(hook)


def train(folder, kill_at_step=None, kill_event=None):
    """In a child of its own; returns whether it came to the end."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return False
        assert status == 0, status
        return True
    try:
        set_seed(0)
        model = conftest.BUILDERS["qwen2_5_vl"]()
        rows = [conftest._row("qwen2_5_vl", seed, 5 + 3 * (seed % 4), pictures=1) for seed in range(12)]
        args = StageArguments(
            str(folder), max_steps=STEPS, per_device_train_batch_size=1, gradient_accumulation_steps=2,
            learning_rate=1e-2, logging_steps=1, save_steps=2, save_total_limit=2, use_cpu=True, disable_tqdm=True,
            report_to="none",
        )
        if kill_event:
            kill_at_event(folder, kill_event)
        trainer = QwenVLMultiTaskTrainer(
            model, args, train_dataset=rows, data_collator=conftest._collate, callbacks=[Watch(folder, kill_at_step)]
        )
        trainer.train(resume_from_checkpoint="auto")
        torch.save(model.state_dict(), folder.with_suffix(".pt"))
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


here = Path({output!r})
assert train(here / "straight")
dice = random.Random(20231)
killed = here / "killed"
kills = 0
while kills < 10:
    # By turns soon after the last checkpoint, and in the midst of reading or writing one (some tens of events each).
    done = max([0, *(int(path.name.split("-")[1]) for path in killed.glob("checkpoint-*"))])
    if kills % 2:
        ended = train(killed, kill_event=dice.randint(1, 70))
    else:
        ended = train(killed, kill_at_step=min(done + dice.randint(1, 3), STEPS))
    if ended:
        break
    kills += 1
else:
    assert train(killed)
print("kills:", kills)
'''


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_equals_one_that_never_was(tmp_path):
    tests = Path(__file__).parent
    script = tmp_path / "run.py"
    script.write_text(KILLED_RUNS.format(root=str(tests.parents[1]), tests=str(tests), output=str(tmp_path)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.rsplit("kills:", 1)[1]) >= 6
    assert "the run was stopped while writing it" in done.stderr  # one of the kills fell into a save

    straight, killed = (
        [json.loads(line) for line in (tmp_path / f"{name}.losses").read_text().splitlines()]
        for name in ("straight", "killed")
    )
    assert [step for step, _ in straight] == list(range(1, 15))
    assert {tuple(entry) for entry in killed} == {tuple(entry) for entry in straight}
    weights = torch.load(tmp_path / "straight.pt"), torch.load(tmp_path / "killed.pt")
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
