"""The configurations in examples/accelerate, read by accelerate itself. What they start needs GPUs and is not run."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "accelerate"
# File -> (engine, nodes, processes)
EXPECTED = {
    "ddp.yaml": ("MULTI_GPU", 1, 8),
    "ddp_two_nodes.yaml": ("MULTI_GPU", 2, 16),
    "fsdp2.yaml": ("FSDP", 1, 8),
    "fsdp2_two_nodes.yaml": ("FSDP", 2, 16),
    "zero2.yaml": ("DEEPSPEED", 1, 8),
    "zero3.yaml": ("DEEPSPEED", 1, 8),
}


def test_each_file_is_expected():
    assert {path.name for path in FOLDER.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_file(name):
    config = load_config_from_file(str(FOLDER / name))
    assert (config.distributed_type.value, config.num_machines, config.num_processes) == EXPECTED[name]
    if config.num_machines > 1:
        assert (config.main_process_ip, config.main_process_port) == ("10.0.0.1", 29500)


@pytest.mark.parametrize("name", ["fsdp2.yaml", "fsdp2_two_nodes.yaml"])
def test_every_key_of_the_fsdp_files_is_one_that_accelerate_launch_knows(name):
    config = load_config_from_file(str(FOLDER / name))
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert [key for key in config.fsdp_config if key not in known] == []
    assert config.fsdp_config["fsdp_version"] == 2
    assert config.fsdp_config["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"


@pytest.mark.parametrize(("name", "stage"), [("zero2.yaml", 2), ("zero3.yaml", 3)])
def test_every_key_of_the_deepspeed_files_is_one_that_accelerate_launch_knows(name, stage):
    config = load_config_from_file(str(FOLDER / name))
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert [key for key in config.deepspeed_config if key not in known] == []
    assert config.deepspeed_config["zero_stage"] == stage
    assert config.deepspeed_config["zero3_save_16bit_model"] is (stage == 3)
