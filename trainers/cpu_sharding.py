"""CpuShardingMixin: FSDP2 on CPUs, which accelerate leaves out, so that sharded training can be tested without GPUs.

accelerate 1.15 turns FSDP on for GPUs and their like only (AcceleratorState.__init__). On CPUs it takes the settings
and trains one whole copy per process instead, without a word.
"""

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import Trainer
from transformers.training_args import ParallelMode


class CpuShardingMixin(Trainer):
    """Put before a Trainer. With `args.fsdp` on several CPU processes it shards as it would on GPUs (slowly: gloo)."""

    is_fsdp_enabled: bool

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            if self.args.parallel_mode != ParallelMode.DISTRIBUTED or self.args.device.type != "cpu":
                raise ValueError(
                    f"FSDP was asked for, but accelerate did not turn it on for {self.args.world_size} "
                    f"{self.args.device.type} process(es): every one would hold the whole model. Start several with "
                    "torchrun, or set hardware.sharding to none (fsdp=None)."
                )
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            # In both places, as accelerate does: the second is where a new AcceleratorState reads it.
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True
