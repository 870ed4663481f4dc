"""Launches of the quantisers' kernels; those that need fp8 fail on GPUs without it."""

import torch
from compile_only import LaunchTable, launch, meta
from lq_kernels.rowwise import (
    quantize_columnwise,
    quantize_columnwise_transposed,
    quantize_rowwise,
    quantize_tensorwise,
    quantize_tensorwise_transposed,
)
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def stochastically(op: object, x: Tensor, dtype: torch.dtype) -> None:
    launch(op, x, dtype, "stochastic", meta(1, dtype=torch.int64))


LAUNCHES: LaunchTable = {
    "rows of 4096": lambda: launch(quantize_rowwise, meta(32768, 4096)),
    "rows of 1024": lambda: launch(quantize_rowwise, meta(32768, 1024, dtype=torch.float32)),
    "rows of 28672": lambda: launch(quantize_rowwise, meta(8192, 28672)),
    "rows too long for registers": lambda: launch(quantize_rowwise, meta(4096, 128256)),
    "rows, transposed": lambda: launch(quantize_rowwise, meta(4096, 4096).t()),
    "rows, stochastic": lambda: stochastically(quantize_rowwise, meta(32768, 4096), torch.int8),
    "rows to e4m3, needs fp8": lambda: launch(quantize_rowwise, meta(32768, 4096), E4M3),
    "rows to e5m2, needs fp8": lambda: launch(quantize_rowwise, meta(32768, 4096), E5M2),
    "rows to e4m3, stochastic, needs fp8": lambda: stochastically(quantize_rowwise, meta(32768, 4096), E4M3),
    "columns": lambda: launch(quantize_columnwise, meta(4096, 14336)),
    "columns, transposed": lambda: launch(quantize_columnwise_transposed, meta(4096, 14336)),
    "columns, transposed, stochastic": lambda: stochastically(
        quantize_columnwise_transposed, meta(4096, 14336), torch.int8
    ),
    "columns, transposed, to e4m3, needs fp8": lambda: launch(quantize_columnwise_transposed, meta(4096, 14336), E4M3),
    "columns of odd size": lambda: launch(quantize_columnwise_transposed, meta(83, 331, dtype=torch.float16)),
    "matrix": lambda: launch(quantize_tensorwise, meta(4096, 14336)),
    "matrix to e5m2, stochastic, needs fp8": lambda: stochastically(quantize_tensorwise, meta(4096, 14336), E5M2),
    "matrix, transposed": lambda: launch(quantize_tensorwise_transposed, meta(4096, 14336)),
    "matrix, transposed, to e4m3, needs fp8": lambda: launch(quantize_tensorwise_transposed, meta(4096, 14336), E4M3),
}
