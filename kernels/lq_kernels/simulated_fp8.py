"""Matrix products with simulated fp8: operands rounded to a code book of 256 values, multiplied in their own dtype.

                   mixed                                       global
    output         blocks(a, fw) @ tensor(b, fw)               tensor(a, fw) @ tensor(b, fw)
    gradient of a  blocks(grad, bw) @ tensor(b, fw).t()        tensor(grad, bw) @ tensor(b, fw).t()
    gradient of b  a.t() @ grad                                tensor(a, fw).t() @ tensor(grad, bw)

where blocks and tensor are the operations of fake_quantize.py. With `create_fp8_map` of 4 + 3 bits for fw and 5 + 2 for
bw these are bitsandbytes' E4M3 and E5M2, which are not OCP's: for those, and for speed, use `scaled_mm`.

Source: bitsandbytes before 0.50, research.autograd; the method: https://arxiv.org/abs/2304.13013, section 2.2
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lq_kernels.fake_quantize import LARGEST_BLOCK, fake_quantize_blockwise, fake_quantize_tensorwise

_SMALLEST_BLOCK = 64


def simulated_block_size(features: int) -> int:
    """The smallest power of two in 64 .. 4096 that is at least `features`, or 4096: bitsandbytes' rule.

    Flat blocks of that size are rows of a matrix with so many columns only where `features` is such a power itself.
    """
    if features < 1:
        raise ValueError(f"a block size needs at least one feature, got {features}")
    return min(max(_SMALLEST_BLOCK, 1 << (features - 1).bit_length()), LARGEST_BLOCK)


def matmul_fp8_mixed(
    a: Tensor,
    b: Tensor,
    fw_code: Tensor,
    bw_code: Tensor,
    block_size_a: int | None = None,
    block_size_grad: int | None = None,
    by_row: bool = False,
) -> Tensor:
    """a (..., K) @ b (K, N) -> (..., N): a and the gradient of the result in blocks, b with one scale.

    a has two dimensions or more and the dtype of b: float32, bfloat16 or float16. The codes are (256,) float32,
    ascending, on their device. Blocks are flat, or with `by_row` never cross a row of a or of the gradient; None takes
    their size by `simulated_block_size` of K and of N. Gradients reach a and b, but have none themselves:
    create_graph=True is a RuntimeError. Any size, 0 included. Nothing waits for the device.
    """
    _check(a, b, "matmul_fp8_mixed")
    K, N = b.shape
    input_blocks = _Blocks(block_size_a or simulated_block_size(max(K, 1)), by_row)
    return _Mixed.apply(
        a, b, fw_code, bw_code, input_blocks, _Blocks(block_size_grad or simulated_block_size(max(N, 1)), by_row)
    )


def matmul_fp8_global(a: Tensor, b: Tensor, fw_code: Tensor, bw_code: Tensor) -> Tensor:
    """a (..., K) @ b (K, N) -> (..., N) with one scale for a, one for b and one for the gradient of the result.

    Operands, codes and gradients as in `matmul_fp8_mixed`.
    """
    _check(a, b, "matmul_fp8_global")
    return _Global.apply(a, b, fw_code, bw_code)


def _check(a: Tensor, b: Tensor, name: str) -> None:
    if a.ndim < 2 or b.ndim != 2 or a.shape[-1] != b.shape[0]:
        raise ValueError(f"{name} takes a (..., K) of two dimensions or more and b (K, N), got {a.shape} and {b.shape}")
    if a.dtype != b.dtype:
        raise TypeError(f"{name} takes operands of one dtype, got {a.dtype} and {b.dtype}: cast one of them")


def _refuse_second_gradient(name: str) -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name} has no gradient of its gradient, and create_graph=True asks for one: multiply in 16 bits where a "
            "gradient penalty goes through"
        )


@dataclass(frozen=True)
class _Blocks:
    size: int
    by_row: bool

    def round(self, x: Tensor, code: Tensor) -> Tensor:
        return fake_quantize_blockwise(x, code, self.size, x.shape[-1] if self.by_row else x.numel())


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, fw_code: Tensor, bw_code: Tensor, input_blocks: _Blocks, grad_blocks: _Blocks
    ) -> Tensor:
        rounded_b = fake_quantize_tensorwise(b, fw_code)
        ctx.save_for_backward(a, rounded_b, bw_code)
        ctx.grad_blocks = grad_blocks
        return input_blocks.round(a, fw_code) @ rounded_b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_gradient("matmul_fp8_mixed")
        a, rounded_b, bw_code = ctx.saved_tensors
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = ctx.grad_blocks.round(grad, bw_code) @ rounded_b.t()
        if ctx.needs_input_grad[1]:
            grad_b = a.flatten(0, -2).t() @ grad.flatten(0, -2)
        return grad_a, grad_b, None, None, None, None


class _Global(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, fw_code: Tensor, bw_code: Tensor) -> Tensor:
        rounded_b = fake_quantize_tensorwise(b, fw_code)
        ctx.save_for_backward(a, rounded_b, fw_code, bw_code)
        return fake_quantize_tensorwise(a, fw_code) @ rounded_b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_gradient("matmul_fp8_global")
        a, rounded_b, fw_code, bw_code = ctx.saved_tensors
        grad_a = grad_b = None
        grad = fake_quantize_tensorwise(grad, bw_code)
        if ctx.needs_input_grad[0]:
            grad_a = grad @ rounded_b.t()
        if ctx.needs_input_grad[1]:
            grad_b = fake_quantize_tensorwise(a, fw_code).flatten(0, -2).t() @ grad.flatten(0, -2)
        return grad_a, grad_b, None, None
