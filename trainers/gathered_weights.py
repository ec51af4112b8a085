"""FSDP2's weights, whole on every process for as long as it samples.

FSDP collects the weights of a block from all processes whenever the block runs. While sampling, each process runs its
own blocks: it encodes its own pictures, if it has any, and stops when its own answers end. So the weights are
collected before, once instead of once per token, and for that time each process holds the whole model, as with TRL's
`ds3_gather_for_generation`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def gathered_weights(model: nn.Module, reshard_after_forward: bool) -> Iterator[None]:
    """Inside, the blocks of `model` (with its wrappers) run without asking other processes. All must enter together.

    Does nothing for a model that FSDP2 has not sharded.

    Args:
        reshard_after_forward: FSDP's setting, which holds again afterwards.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if sharded:
        # FSDP learns from the first forward pass which module is the outermost.
        device = next(model.parameters()).device
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(reshard_after_forward, recurse=False)
            module.reshard()
