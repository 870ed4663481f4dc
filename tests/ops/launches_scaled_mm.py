"""Launches of the scaled product's kernels; those that need fp8 fail on GPUs without it."""

import torch
from compile_only import LaunchTable, launch, meta
from lq_kernels.scaled_mm import int8_mm, scaled_mm

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Types = tuple[torch.dtype, torch.dtype]

INT8: Types = (torch.int8, torch.int8)


def _product(M: int, K: int, N: int, types: Types = INT8, transposed: bool = True, accumulation: str = "fast") -> None:
    a = meta(M, K, dtype=types[0])
    b = meta(N, K, dtype=types[1]).t() if transposed else meta(K, N, dtype=types[1])
    scale_a, scale_b = meta(M, 1, dtype=torch.float32), meta(1, N, dtype=torch.float32)
    launch(scaled_mm, a, b, scale_a, scale_b, meta(N), torch.bfloat16, accumulation)


def _sums(M: int, K: int, N: int) -> None:
    launch(int8_mm, meta(M, K, dtype=torch.int8), meta(N, K, dtype=torch.int8).t())


LAUNCHES: LaunchTable = {
    "product": lambda: _product(32768, 4096, 16384),
    "product of a short K": lambda: _product(32768, 768, 3072),
    "product, few tiles": lambda: _product(1024, 1024, 1024),
    "product, very few tiles": lambda: _product(16, 4096, 4096),
    "product of odd size": lambda: _product(8192, 4100, 14336),
    "product, unaligned": lambda: _product(8192, 4096, 14337),
    "product, rows of b contiguous": lambda: _product(8192, 4096, 4096, transposed=False),
    "sums": lambda: _sums(8192, 4096, 14336),
    "sums of odd size": lambda: _sums(8192, 4100, 14336),
    "product of e4m3, needs fp8": lambda: _product(32768, 4096, 16384, (E4M3, E4M3)),
    "product of e4m3 and e5m2, needs fp8": lambda: _product(1024, 1024, 1024, (E4M3, E5M2)),
    "product of e5m2, needs fp8": lambda: _product(32768, 4096, 16384, (E5M2, E5M2)),
    "precise product, needs fp8": lambda: _product(32768, 4096, 16384, (E5M2, E4M3), accumulation="precise"),
    "product of e4m3, very few tiles, needs fp8": lambda: _product(16, 4096, 4096, (E4M3, E4M3)),
    "product of e5m2 and e4m3 of odd size, needs fp8": lambda: _product(8192, 4100, 14336, (E5M2, E4M3)),
    "precise product of odd size, needs fp8": lambda: _product(8192, 4100, 14336, (E5M2, E4M3), accumulation="precise"),
    "precise product, unaligned, needs fp8": lambda: _product(8192, 4096, 14337, (E4M3, E4M3), accumulation="precise"),
    "product of e4m3, rows of b contiguous, needs fp8": lambda: _product(
        8192, 4096, 4096, (E4M3, E4M3), transposed=False
    ),
}
