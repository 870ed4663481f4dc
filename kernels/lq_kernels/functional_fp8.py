"""bitsandbytes' simulated fp8 products, which it has removed, by its names; a block never crosses a row."""

import torch
from torch import Tensor

from lq_kernels import simulated_fp8
from lq_kernels.functional_arguments import written_without_gradient


def matmul_fp8_mixed(
    A: Tensor,
    B: Tensor,
    fw_code: Tensor,
    bw_code: Tensor,
    out: Tensor | None = None,
    bsz: int = -1,
    bsz2: int = -1,
) -> Tensor:
    """A (..., K) @ B (K, N) -> (..., N): A and the gradient in blocks of bsz and bsz2, B with one scale.

    -1 is the smallest power of two from 64 to 4096 that is at least K, or N. For what is rounded where, in forward and
    in backward, see simulated_fp8.py. `out` is written and returned, without gradients.
    """
    if 0 in (bsz, bsz2):
        raise ValueError(f"bsz must be -1 or a number of values, got {bsz} and {bsz2}")
    block_a, block_grad = (None if size == -1 else size for size in (bsz, bsz2))
    forward, backward = _on(A, fw_code), _on(A, bw_code)
    result = simulated_fp8.matmul_fp8_mixed(A, B, forward, backward, block_a, block_grad, by_row=True)
    return written_without_gradient(result, out, "matmul_fp8_mixed")


def matmul_fp8_global(
    A: Tensor,
    B: Tensor,
    fw_code: Tensor,
    bw_code: Tensor,
    out: Tensor | None = None,
    bsz: int = -1,
    bsz2: int = -1,
) -> Tensor:
    """A (..., K) @ B (K, N) -> (..., N) with one scale each for A, B and the gradient; bsz and bsz2 are not read."""
    result = simulated_fp8.matmul_fp8_global(A, B, _on(A, fw_code), _on(A, bw_code))
    return written_without_gradient(result, out, "matmul_fp8_global")


def _on(A: Tensor, code: Tensor) -> Tensor:
    return code.to(A.device, torch.float32)
