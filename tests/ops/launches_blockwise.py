"""Launches of the kernels of blockwise.py and nearest.py."""

import torch
from compile_only import LaunchTable, launch, meta
from lq_kernels.blockwise import dequantize_blockwise, quantize_blockwise
from lq_kernels.codebooks import dynamic_map
from lq_kernels.nearest import dequantize_values, quantize_values

CODE = dynamic_map("dynamic").to("meta")


def quantized(block_size: int, rows: int = 4096, columns: int = 14336) -> tuple[torch.Tensor, ...]:
    codes = meta(rows, columns, dtype=torch.uint8)
    return codes, meta(-(-codes.numel() // block_size), dtype=torch.float32), CODE


LAUNCHES: LaunchTable = {
    "blocks of 256": lambda: launch(quantize_blockwise, meta(4096, 14336), CODE, 256),
    "blocks of 64": lambda: launch(quantize_blockwise, meta(4096, 14336, dtype=torch.float32), CODE, 64),
    "blocks of 100": lambda: launch(quantize_blockwise, meta(4096, 14336), CODE, 100),
    "blocks of 16384": lambda: launch(quantize_blockwise, meta(4096, 14336), CODE, 16384),
    "more blocks than 2^31 / 256": lambda: launch(quantize_blockwise, meta(1 << 19, 1 << 13), CODE, 256),
    "blocks of 256, back": lambda: launch(dequantize_blockwise, *quantized(256), 256, torch.bfloat16),
    "blocks of 100, back": lambda: launch(dequantize_blockwise, *quantized(100), 100, torch.float16),
    "more blocks than 2^31 / 256, back": lambda: launch(dequantize_blockwise, *quantized(256, 1 << 19, 1 << 13)),
    "values": lambda: launch(quantize_values, meta(4096, 14336), CODE),
    "values, back": lambda: launch(dequantize_values, meta(4096, 14336, dtype=torch.uint8), CODE, torch.bfloat16),
}
