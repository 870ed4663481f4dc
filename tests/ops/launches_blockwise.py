"""Launches of blockwise.py's kernels."""

import torch
from compile_only import LaunchTable, launch, meta
from lq_kernels.blockwise import dequantize_blockwise, quantize_blockwise
from lq_kernels.codebooks import dynamic_map

LAUNCHES: LaunchTable = {
    "blocks of 256": lambda: launch(quantize_blockwise, meta(4096, 14336), dynamic_map("dynamic").to("meta"), 256),
    "blocks of 256, back": lambda: launch(
        dequantize_blockwise,
        meta(4096, 4096, dtype=torch.uint8),
        meta(65536, dtype=torch.float32),
        dynamic_map("dynamic").to("meta"),
        256,
        torch.bfloat16,
    ),
}
