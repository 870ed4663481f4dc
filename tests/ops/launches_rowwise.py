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
from lq_kernels.rowwise_training import (
    dequantize_rowwise,
    quantize_rowwise_column_amax,
    quantize_tensorwise_amax,
    quantize_transposed,
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
    "rows and amax of columns": lambda: launch(quantize_rowwise_column_amax, meta(32768, 4096)),
    "rows and amax of columns, short": lambda: launch(quantize_rowwise_column_amax, meta(32768, 1024)),
    "rows and amax of columns, long": lambda: launch(quantize_rowwise_column_amax, meta(8192, 14336)),
    "rows and amax of columns, needs fp8": lambda: launch(quantize_rowwise_column_amax, meta(32768, 4096), E4M3),
    "rows and amax of columns, stochastic": lambda: stochastically(
        quantize_rowwise_column_amax, meta(32768, 4096), torch.int8
    ),
    "rows, powers of two": lambda: launch(quantize_rowwise, meta(32768, 4096), torch.int8, "nearest", None, True),
    "both ways": lambda: launch(quantize_tensorwise_amax, meta(4096, 14336), torch.int8, "nearest", None, False, True),
    "both ways, needs fp8": lambda: launch(
        quantize_tensorwise_amax, meta(4096, 14336), E5M2, "nearest", None, False, True
    ),
    "transposed, known amax": lambda: launch(
        quantize_transposed, meta(4096, 14336), meta(1, 1, dtype=torch.float32), torch.int8
    ),
    "transposed, known amax of columns, needs fp8": lambda: launch(
        quantize_transposed, meta(4096, 14336), meta(1, 14336, dtype=torch.float32), E4M3
    ),
    "codes of rows back to values": lambda: launch(
        dequantize_rowwise, meta(32768, 4096, dtype=torch.int8), meta(32768, 1, dtype=torch.float32), torch.bfloat16
    ),
}
