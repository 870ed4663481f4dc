"""Launches of the kernels of blockwise_4bit.py and nested_scales.py."""

import torch
from compile_only import LaunchTable, launch, meta
from lq_kernels.blockwise_4bit import dequantize_4bit, quantize_4bit
from lq_kernels.nested_scales import (
    dequantize_4bit_double,
    dequantize_scales,
    quantize_4bit_double,
    quantize_scales,
)

WEIGHT = [14336, 4096]


def _packed(rows: int, columns: int) -> torch.Tensor:
    return meta((rows * columns + 1) // 2, 1, dtype=torch.uint8)


def _nested(blocks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return meta(blocks, dtype=torch.uint8), meta(-(-blocks // 256), dtype=torch.float32), meta(dtype=torch.float32)


def _dequantize(dtype: torch.dtype, quant_type: str, block_size: int, shape: list[int]) -> None:
    scale = meta(-(-shape[0] * shape[1] // block_size), dtype=torch.float32)
    launch(dequantize_4bit, _packed(*shape), scale, block_size, quant_type, shape, dtype)


def _dequantize_double(dtype: torch.dtype) -> None:
    nested = _nested(WEIGHT[0] * WEIGHT[1] // 64)
    launch(dequantize_4bit_double, _packed(*WEIGHT), *nested, 64, "nf4", WEIGHT, dtype)


LAUNCHES: LaunchTable = {
    "nf4": lambda: launch(quantize_4bit, meta(*WEIGHT), 64, "nf4"),
    "nf4, float32, long blocks": lambda: launch(quantize_4bit, meta(*WEIGHT, dtype=torch.float32), 4096, "nf4"),
    "nf4 of odd size": lambda: launch(quantize_4bit, meta(83, 331), 64, "nf4"),
    "fp4, float16, short blocks": lambda: launch(quantize_4bit, meta(*WEIGHT, dtype=torch.float16), 32, "fp4"),
    "nf4, back": lambda: _dequantize(torch.bfloat16, "nf4", 64, WEIGHT),
    "nf4 of odd size, back": lambda: _dequantize(torch.float16, "nf4", 4096, [83, 331]),
    "fp4, back to float32": lambda: _dequantize(torch.float32, "fp4", 32, WEIGHT),
    "nf4, scales quantised": lambda: launch(quantize_4bit_double, meta(*WEIGHT), 64, "nf4"),
    "nf4, scales quantised, back": lambda: _dequantize_double(torch.bfloat16),
    "scales": lambda: launch(quantize_scales, meta(917_504, dtype=torch.float32)),
    "scales, back": lambda: launch(dequantize_scales, *_nested(917_504)),
}
