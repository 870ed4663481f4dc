"""Launches of the kernels of gemv_4bit.py, small_batch_4bit.py and requantize_4bit.py."""

from functools import partial

import torch
from compile_only import LaunchTable, launch, meta
from lq_kernels.gemv_4bit import gemv_4bit
from lq_kernels.requantize_4bit import requantize_4bit
from lq_kernels.small_batch_4bit import small_batch_4bit

BF16, FP16 = torch.bfloat16, torch.float16


def _weight(N: int, K: int, block_size: int = 64, quant_type: str = "nf4") -> tuple[object, ...]:
    packed = meta((N * K + 1) // 2, 1, dtype=torch.uint8)
    return packed, meta(-(-N * K // block_size), dtype=torch.float32), block_size, quant_type, [N, K]


def _gemv(N: int, K: int, dtype: torch.dtype = BF16, bias: torch.Tensor | None = None) -> None:
    launch(gemv_4bit, meta(1, K, dtype=dtype), *_weight(N, K), bias)


def _small_batch(M: int, N: int = 14336, K: int = 4096, dtype: torch.dtype = BF16, block_size: int = 64) -> None:
    launch(small_batch_4bit, meta(M, K, dtype=dtype), *_weight(N, K, block_size, "fp4"), meta(N, dtype=dtype))


def _requantize(dtype: torch.dtype, transposed: bool, shape: tuple[int, int] = (14336, 4096)) -> None:
    launch(requantize_4bit, *_weight(*shape), dtype, transposed)


LAUNCHES: LaunchTable = {
    "one row by nf4": lambda: _gemv(14336, 4096),
    "one row by nf4 of odd size": lambda: _gemv(331, 83, torch.float32, meta(331)),
    **{f"{M} rows by 4 bits": partial(_small_batch, M) for M in (1, 8, 16, 32, 64, 128)},
    "16 rows by 4 bits, long K": lambda: _small_batch(16, 4096, 14336),
    "16 rows by 4 bits, float16": lambda: _small_batch(16, dtype=FP16),
    "16 rows by 4 bits of odd size": lambda: _small_batch(16, 331, 192, block_size=128),
    "128 rows by 4 bits of odd size": lambda: _small_batch(128, 331, 192),
    "nf4 to int8": lambda: _requantize(torch.int8, False),
    "nf4 to int8, transposed": lambda: _requantize(torch.int8, True),
    "nf4 to int8 of odd size": lambda: _requantize(torch.int8, True, (331, 192)),
    "nf4 to e4m3, needs fp8": lambda: _requantize(torch.float8_e4m3fn, False),
    "nf4 to e4m3, transposed, needs fp8": lambda: _requantize(torch.float8_e4m3fn, True),
}
