"""Launches of rowwise.py's kernels."""

import torch
from compile_only import LaunchTable, launch, meta
from lq_kernels.rowwise import (
    quantize_columnwise_transposed,
    quantize_rowwise,
    quantize_tensorwise,
    quantize_tensorwise_transposed,
)

LAUNCHES: LaunchTable = {
    "rows of 4096": lambda: launch(quantize_rowwise, meta(32768, 4096)),
    "rows of 1024": lambda: launch(quantize_rowwise, meta(32768, 1024, dtype=torch.float32)),
    "rows of 28672": lambda: launch(quantize_rowwise, meta(8192, 28672)),
    "rows too long for registers": lambda: launch(quantize_rowwise, meta(4096, 128256)),
    "rows, transposed": lambda: launch(quantize_rowwise, meta(4096, 4096).t()),
    "columns": lambda: launch(quantize_columnwise_transposed, meta(4096, 14336)),
    "columns of odd size": lambda: launch(quantize_columnwise_transposed, meta(83, 331, dtype=torch.float16)),
    "matrix": lambda: launch(quantize_tensorwise, meta(4096, 14336)),
    "matrix, transposed": lambda: launch(quantize_tensorwise_transposed, meta(4096, 14336)),
}
