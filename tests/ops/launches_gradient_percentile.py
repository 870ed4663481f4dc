"""Launches of gradient_percentile.py's kernels."""

import torch
from compile_only import LaunchTable, launch, meta
from lq_kernels.gradient_percentile import record_gradient_norm


def _record(dtype: torch.dtype, step: int) -> None:
    history, result = meta(100, dtype=torch.float32), meta(3, dtype=torch.float32)
    launch(record_gradient_norm, meta(4096, 4096, dtype=dtype), history, result, step, 5)


LAUNCHES: LaunchTable = {
    "percentile of a gradient": lambda: _record(torch.bfloat16, 100),
    "percentile of the first gradient": lambda: _record(torch.float16, 1),
}
