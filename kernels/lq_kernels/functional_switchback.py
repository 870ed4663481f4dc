"""What bitsandbytes had for SwitchBack until 0.49, by its names: int8 codes with plain maxima, and their products.

    codes = round(x * (127 / absmax)), ties to even        x = codes * absmax / 127

absmax is that of a row, a column or the whole matrix, in the dtype of x, exact. A zero row has absmax 0 and codes 0.
Source: https://arxiv.org/abs/2304.13013, section 2
"""

import torch
from torch import Tensor

from lq_kernels import rowwise
from lq_kernels.functional_arguments import absmax_of, check_dtype, check_float, check_stats, scale_of
from lq_kernels.scaled_mm import scaled_mm


def quantize_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, N) float -> codes (M, N) int8, the absmax of its rows (M,)."""
    check_float(x, "quantize_rowwise")
    return _with_absmax(x, *rowwise.quantize_rowwise(x))


def quantize_columnwise_and_transpose(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, N) float -> codes (N, M) int8, contiguous, the absmax of the columns of x (N,)."""
    check_float(x, "quantize_columnwise_and_transpose")
    return _with_absmax(x, *rowwise.quantize_columnwise_transposed(x))


def quantize_global(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, N) float -> codes (M, N) int8, the absmax of all of x (1,)."""
    check_float(x, "quantize_global")
    return _with_absmax(x, *rowwise.quantize_tensorwise(x))


def quantize_global_transpose(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, N) float -> codes (N, M) int8, contiguous, the absmax of all of x (1,)."""
    check_float(x, "quantize_global_transpose")
    return _with_absmax(x, *rowwise.quantize_tensorwise_transposed(x))


def dequantize_rowwise(x: Tensor, state_x: Tensor, out_dtype: torch.dtype = torch.float16) -> Tensor:
    """x (M, N) int8, state_x (M,) float -> x * state_x / 127 of its row; the product is float32, rounded once."""
    check_dtype(x, torch.int8, "x")
    check_stats(state_x.float(), len(x), "state_x")
    return (x.float() * scale_of(state_x)).to(out_dtype)


def int8_matmul_rowwise_dequantize(
    a: Tensor,
    b: Tensor,
    state_x: Tensor,
    state_w: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """a (M, K) int8 @ b (K, N) int8 * state_x (M,) / 127 * state_w (N,) / 127 + bias (N,) -> (M, N) in out_dtype.

    b may be a transposed view. Sums are int32, all else float32, rounded once.
    """
    return _product(a, b, state_x, state_w, bias, out_dtype, states_w=b.shape[-1])


def int8_matmul_mixed_dequantize(
    a: Tensor,
    b: Tensor,
    state_x: Tensor,
    state_w: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """`int8_matmul_rowwise_dequantize` with one state_w (1,) for all of b."""
    return _product(a, b, state_x, state_w, bias, out_dtype, states_w=1)


def _with_absmax(x: Tensor, codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return codes, absmax_of(scale, x.dtype).to(x.dtype)


def _product(
    a: Tensor,
    b: Tensor,
    state_x: Tensor,
    state_w: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    states_w: int,
) -> Tensor:
    check_dtype(a, torch.int8, "a")
    check_dtype(b, torch.int8, "b")
    check_stats(state_x.float(), a.shape[0], "state_x")
    check_stats(state_w.float(), states_w, "state_w")
    return scaled_mm(a, b, scale_of(state_x), scale_of(state_w).t(), bias, out_dtype)
