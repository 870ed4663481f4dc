"""Launches of the optimizers' kernels."""

import torch
from compile_only import LaunchTable, meta
from lq_kernels.multi_tensor import Batch
from lq_kernels.optimizer_8bit import Adam, launch_adam
from lq_kernels.optimizer_state import new_state
from lq_kernels.percentile_clipping import new_history


def _launch_adam(shapes: list[tuple[int, ...]], decoupled: bool, percentile: int | None) -> None:
    params = [meta(*shape) for shape in shapes]
    states = [new_state(param, param.ndim > 1) | new_history(param.device) for param in params]
    adam = Adam(1e-3, (0.9, 0.999), 1e-8, 0.01, decoupled, percentile=percentile)
    launch_adam(Batch(params, states, torch.bfloat16), params, adam)


LAUNCHES: LaunchTable = {
    "AdamW, 8-bit state, clipped": lambda: _launch_adam([(4096, 4096), (83, 331)], decoupled=True, percentile=5),
    "Adam, float32 state": lambda: _launch_adam([(4096,), (331,)], decoupled=False, percentile=None),
}
