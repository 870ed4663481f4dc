"""Frozen layers under DistributedDataParallel, which has a copy of the model in each process.

At its start DDP sends parameters and buffers of rank 0 to the others, integers as integers; and buffers again before
every forward pass, for running statistics. Buffers of frozen layers (the nested scales of double
quantisation) never change, so they are taken out of that and sent once.
"""

from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor, nn

from lq_plugin.layers.frozen import FrozenWeight

_IGNORED = "_ddp_params_and_buffers_to_ignore"  # what DDP and Lightning's validation read


def leave_frozen_buffers_out(model: nn.Module) -> None:
    """Has DDP pass over the buffers of frozen layers, beside what it passes over already."""
    names = [name for name, _ in _frozen_buffers(model)]
    if names:
        setattr(model, _IGNORED, sorted({*getattr(model, _IGNORED, ()), *names}))


def send_frozen_buffers(model: nn.Module) -> None:
    """Every rank calls it: buffers of frozen layers become those of rank 0."""
    sent = [dist.broadcast(buffer, 0, async_op=True) for _, buffer in _frozen_buffers(model)]
    for work in sent:
        work.wait()


def _frozen_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each once; names as in model.named_buffers()."""
    weights = (module for module in model.modules() if isinstance(module, FrozenWeight))
    frozen = {id(buffer) for weight in weights for buffer in weight._buffers.values()}
    return ((name, buffer) for name, buffer in model.named_buffers() if id(buffer) in frozen)
