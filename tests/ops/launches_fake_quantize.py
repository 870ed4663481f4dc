"""Launches of fake_quantize.py's kernels."""

import torch
from compile_only import LaunchTable, launch, meta
from lq_kernels.fake_quantize import fake_quantize_blockwise, fake_quantize_tensorwise


def _blocks(shape: tuple[int, int], block_size: int, row_length: int, dtype: torch.dtype = torch.bfloat16) -> None:
    code = meta(256, dtype=torch.float32)
    launch(fake_quantize_blockwise, meta(*shape, dtype=dtype), code, block_size, row_length)


LAUNCHES: LaunchTable = {
    "simulated fp8, flat blocks": lambda: _blocks((8192, 1024), 1024, 8192 * 1024),
    "simulated fp8, blocks of rows": lambda: _blocks((8192, 768), 1024, 768, torch.float16),
    "simulated fp8, parts of rows": lambda: _blocks((83, 5000), 4096, 5000, torch.float32),
    "simulated fp8, matrix": lambda: launch(fake_quantize_tensorwise, meta(4096, 4096), meta(256, dtype=torch.float32)),
}
