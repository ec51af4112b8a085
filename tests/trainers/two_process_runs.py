"""What the tests on two processes share: how they are started, the families, and settings of a short run."""

import os
import subprocess
import sys
from pathlib import Path

FAMILIES = ("qwen_vl", "qwen2_5_vl")
SETTINGS = {
    "max_steps": 2, "gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 0.1, "logging_steps": 1,
    "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "report_to": "none", "tower_layer_decay": 1.0,
    "train_sampling_strategy": "sequential", "dataloader_pin_memory": False,
}  # fmt: skip


def launch(script, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
