"""Launches of scaled_mm.py's kernels."""

import torch
from compile_only import LaunchTable, launch, meta
from lq_kernels.scaled_mm import scaled_mm


def _product(M: int, K: int, N: int, transposed: bool = True) -> None:
    a = meta(M, K, dtype=torch.int8)
    b = meta(N, K, dtype=torch.int8).t() if transposed else meta(K, N, dtype=torch.int8)
    scale_a, scale_b = meta(M, 1, dtype=torch.float32), meta(1, N, dtype=torch.float32)
    launch(scaled_mm, a, b, scale_a, scale_b, meta(N), torch.bfloat16)


LAUNCHES: LaunchTable = {
    "product": lambda: _product(32768, 4096, 16384),
    "product, few tiles": lambda: _product(1024, 1024, 1024),
    "product, very few tiles": lambda: _product(16, 4096, 4096),
    "product of odd size": lambda: _product(8192, 4100, 14336),
    "product, rows of b contiguous": lambda: _product(8192, 4096, 4096, transposed=False),
}
