"""Launches of the kernels of LLM.int8()."""

import torch
from compile_only import LaunchTable, launch, meta
from lq_kernels.double_quantize import double_quantize
from lq_kernels.mixed_scaled_mm import mixed_scaled_mm
from lq_kernels.outliers import quantize_rowwise_outliers
from lq_kernels.rescale_int32 import rescale_int32


def _mixed(M: int, K: int, N: int, dtype: torch.dtype = torch.float16, out_dtype: torch.dtype | None = None) -> None:
    x, codes = meta(M, K, dtype=dtype), meta(M, K, dtype=torch.int8)
    scale, weight_scale = meta(M, 1, dtype=torch.float32), meta(N, 1, dtype=torch.float32)
    columns, count = meta(K, dtype=torch.int32), meta(1, dtype=torch.int32)
    weight = meta(N, K, dtype=torch.int8), weight_scale
    launch(mixed_scaled_mm, x, codes, scale, *weight, columns, count, meta(N, dtype=dtype), out_dtype or dtype)


LAUNCHES: LaunchTable = {
    "outliers": lambda: launch(quantize_rowwise_outliers, meta(32768, 4096, dtype=torch.float16), 6.0),
    "outliers, rows of 1024": lambda: launch(quantize_rowwise_outliers, meta(32768, 1024, dtype=torch.float32), 6.0),
    "outliers, rows of 14336": lambda: launch(quantize_rowwise_outliers, meta(8192, 14336), 6.0),
    "outliers, long rows": lambda: launch(quantize_rowwise_outliers, meta(8192, 28672), 6.0),
    "outliers, one row": lambda: launch(quantize_rowwise_outliers, meta(1, 4096), 6.0),
    "outliers, both ways": lambda: launch(double_quantize, meta(32768, 4096, dtype=torch.float16), 6.0),
    "outliers, both ways, rows of 14336": lambda: launch(double_quantize, meta(8192, 14336), 6.0),
    "outliers, both ways, long rows": lambda: launch(double_quantize, meta(83, 28672, dtype=torch.float32), 6.0),
    "mixed product": lambda: _mixed(32768, 4096, 16384),
    "mixed product, bfloat16": lambda: _mixed(32768, 4096, 16384, torch.bfloat16),
    "mixed product, float32": lambda: _mixed(32768, 4096, 16384, torch.float32),
    "mixed product, few tiles": lambda: _mixed(1024, 1024, 1024),
    "mixed product, very few tiles": lambda: _mixed(16, 4096, 4096),
    "mixed product of odd size": lambda: _mixed(8192, 4100, 14336, torch.float32),
    "mixed product to float32": lambda: _mixed(32768, 4096, 16384, out_dtype=torch.float32),
    "mixed product of a short K": lambda: _mixed(32768, 1024, 4096),
    "sums, rescaled": lambda: launch(
        rescale_int32,
        meta(8192, 4096, dtype=torch.int32),
        meta(8192, 1, dtype=torch.float32),
        meta(1, 4096, dtype=torch.float32),
        meta(4096),
        torch.bfloat16,
    ),
}
