"""LLM.int8() as one differentiable product, under bitsandbytes' names: matmul(A, B) = A @ B.t() + bias.

    forward       A by row times B by row in int8; with a threshold, columns of A that hold an outlier in floats
    grad of A     grad @ dequantised B, in the dtype of grad
    grad of B     grad by column times A by column in int8, with the scales of those columns; with a threshold in floats

Source: https://arxiv.org/abs/2208.07339. bitsandbytes since 0.45 scales the gradient of B by the wrong statistics, and
keeps the codes of an older weight while its gradient is there; here a weight that trains is quantised every time.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lq_kernels.functional_arguments import (
    absmax_of,
    check_threshold,
    refuse_second_gradient,
    rows_of,
    scale_of,
    written_without_gradient,
)
from lq_kernels.mixed_scaled_mm import mixed_scaled_mm
from lq_kernels.outliers import quantize_rowwise_outliers
from lq_kernels.rowwise import quantize_columnwise_transposed, quantize_rowwise
from lq_kernels.scaled_mm import scaled_mm

_SUMMED_AT_ONCE = 1 << 16  # tokens in one int32 sum, which takes at most LARGEST_K of them


@dataclass
class MatmulLtState:
    """What `matmul` keeps of a weight between calls: nothing while it trains, its codes once it is frozen.

    has_fp16_weights: the weight is a float tensor that may train. Else `matmul` reads CB (N, K) int8 and SCB (N,)
    float32, the row maxima, and fills them from the weight when they are missing. `threshold` is that of outliers, 0
    for none. `idx`, `is_training` and `use_pool` are there for code that sets them; nothing reads them.
    """

    CB: Tensor | None = None
    SCB: Tensor | None = None
    idx: Tensor | None = None
    threshold: float = 0.0
    has_fp16_weights: bool = True
    is_training: bool = True
    use_pool: bool = False

    def reset_grads(self) -> None:
        """Forgets the codes, so that the next product quantises its weight again."""
        self.CB = self.SCB = self.idx = None


def matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """A (..., K) @ B (N, K).t() + bias (N,) -> (..., N) in A's dtype, multiplied in int8.

    A, B and bias are float32, bfloat16 or float16; gradients reach all three. With `state.has_fp16_weights` false B is
    frozen and read as `state.CB` and `state.SCB`. A threshold above 0 goes into the state. `out` is written and
    returned, without gradients. An empty A gives an empty result. Nothing waits for the device.
    """
    state = MatmulLtState() if state is None else state
    check_threshold(threshold)
    state.threshold = threshold or state.threshold
    if A.shape[-1] != B.shape[1]:
        raise ValueError(f"matmul takes A (..., K) and B (N, K), got {tuple(A.shape)} and {tuple(B.shape)}")
    return written_without_gradient(_Int8Matmul.apply(A, B, bias, state), out, "matmul")


class _Int8Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, bias: Tensor | None, state: MatmulLtState) -> Tensor:
        rows = rows_of(A)
        codes_b, scale_b = _weight_codes(B, state)
        if state.threshold > 0:
            codes, scale, columns, count = quantize_rowwise_outliers(rows, state.threshold)
            out = mixed_scaled_mm(rows, codes, scale, codes_b, scale_b, columns, count, bias, A.dtype)
        else:
            codes, scale = quantize_rowwise(rows)
            out = scaled_mm(codes, codes_b.t(), scale, scale_b.t(), bias, A.dtype)
        ctx.trains = state.has_fp16_weights and ctx.needs_input_grad[1]
        ctx.shape, ctx.dtypes = A.shape, (A.dtype, B.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(codes_b, scale_b, *_kept_of_input(rows, state.threshold, ctx.trains))
        return out.view(*A.shape[:-1], len(codes_b))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_gradient("matmul")
        codes_b, scale_b, *kept = ctx.saved_tensors
        dtype_a, dtype_b, dtype_bias = ctx.dtypes
        rows = rows_of(grad)
        grad_a = grad_b = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = (codes_b.float() * scale_b).to(rows.dtype)
            grad_a = (rows @ weight).to(dtype_a).view(ctx.shape)
        if ctx.trains:
            grad_b = _grad_weight(rows, kept).to(dtype_b)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(dim=0, dtype=torch.float32).to(dtype_bias)
        return grad_a, grad_b, grad_bias, None


def _weight_codes(B: Tensor, state: MatmulLtState) -> tuple[Tensor, Tensor]:
    """codes (N, K) int8 and scale (N, 1) float32 of B, or those that the state keeps of a frozen one."""
    if state.has_fp16_weights:
        return quantize_rowwise(B)
    if state.CB is None and B.is_floating_point():
        codes, scale = quantize_rowwise(B)
        state.CB, state.SCB = codes, absmax_of(scale, B.dtype)
    if state.CB is None or state.SCB is None:
        raise ValueError("a frozen weight in int8 needs state.CB, its codes, and state.SCB, their row maxima")
    return state.CB, scale_of(state.SCB)


def _kept_of_input(rows: Tensor, threshold: float, trains: bool) -> tuple[Tensor, ...]:
    """What the gradient of B needs: codes and scales by column, or with outliers A itself."""
    if not trains:
        return ()
    return (rows,) if threshold > 0 else quantize_columnwise_transposed(rows)


def _grad_weight(grad: Tensor, kept: list[Tensor]) -> Tensor:
    """grad.t() @ A, (N, K), float32 or in the dtype of A."""
    if len(kept) == 1:
        return grad.t().to(kept[0].dtype) @ kept[0]
    codes, scale = quantize_columnwise_transposed(grad)
    codes_a, scale_a = kept
    parts = [
        scaled_mm(codes[:, tokens], codes_a[:, tokens].t(), scale, scale_a.t(), None, torch.float32)
        for tokens in _slices(codes.shape[1])
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)


def _slices(tokens: int) -> list[slice]:
    return [slice(start, start + _SUMMED_AT_ONCE) for start in range(0, max(tokens, 1), _SUMMED_AT_ONCE)]
