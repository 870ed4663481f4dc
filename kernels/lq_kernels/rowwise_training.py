"""Quantisations of an operand that two products of a training step take, one along its rows, one along its columns.

    input        rows for the output,      columns for grad_weight
    weight       rows for the output,      columns for grad_input
    grad_output  rows for grad_input,      columns for grad_weight

8-bit matrix units want each operand contiguous along what is summed, so codes along columns are written transposed. The
first quantisation reads the operand anyway and leaves what the second needs: the amax, or its codes.

Codes and scales are those of rowwise.py to the bit, from arguments that mean the same.
"""

import torch
from torch import Tensor

from lq_kernels._launch import cdiv, launch
from lq_kernels._op import op
from lq_kernels._triton import tl, triton
from lq_kernels.element_types import ELEMENT_TYPES, require_element_type
from lq_kernels.rowwise import check, quantize_reference, quantize_rowwise, quantize_tensorwise
from lq_kernels.rowwise_rows import LONGEST_ROW_BY_COLUMN, launch_rows, launch_rows_column_amax
from lq_kernels.rowwise_tiles import launch_known, launch_matrix


@op
def quantize_rowwise_column_amax(
    x: Tensor,
    dtype: torch.dtype = torch.int8,
    rounding: str = "nearest",
    seed: Tensor | None = None,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, K) float -> `quantize_rowwise`'s codes (M, K) and scale (M, 1), and the amax of columns (1, K) float32."""
    check(x, dtype, rounding, seed, "quantize_rowwise_column_amax")
    codes, scale = quantize_rowwise.reference(x, dtype, rounding, seed, power_of_two)
    amax = x.abs().amax(dim=0, keepdim=True) if x.shape[0] else x.new_zeros(1, x.shape[1])
    return codes, scale, amax.float()


@quantize_rowwise_column_amax.fake
def _rowwise_fake(
    x: Tensor,
    dtype: torch.dtype = torch.int8,
    rounding: str = "nearest",
    seed: Tensor | None = None,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    check(x, dtype, rounding, seed, "quantize_rowwise_column_amax")
    M, K = x.shape
    scale, amax = (x.new_empty(shape, dtype=torch.float32) for shape in ((M, 1), (1, K)))
    return x.new_empty(M, K, dtype=dtype), scale, amax


@quantize_rowwise_column_amax.triton
def _launch_rowwise(
    x: Tensor,
    dtype: torch.dtype = torch.int8,
    rounding: str = "nearest",
    seed: Tensor | None = None,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, amax = _rowwise_fake(x, dtype, rounding, seed, power_of_two)
    require_element_type(dtype, x.device, "quantize_rowwise_column_amax")
    if x.numel() == 0:
        scale.zero_()
        amax.zero_()
    elif x.shape[1] <= LONGEST_ROW_BY_COLUMN:
        launch_rows_column_amax(x, codes, scale, amax.zero_().view(torch.int32), seed, power_of_two)
    else:
        launch_rows(x, codes, scale, seed, power_of_two)
        amax = x.abs().amax(dim=0, keepdim=True).float()
    return codes, scale, amax


@op
def quantize_tensorwise_amax(
    x: Tensor,
    dtype: torch.dtype = torch.int8,
    rounding: str = "nearest",
    seed: Tensor | None = None,
    power_of_two: bool = False,
    both: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (M, N) float -> `quantize_tensorwise`'s codes (M, N) and scale (1, 1), the amax (1, 1) float32, and
    with `both` the codes transposed, (N, M), contiguous; without it (0, 0)."""
    check(x, dtype, rounding, seed, "quantize_tensorwise_amax")
    codes, scale = quantize_tensorwise.reference(x, dtype, rounding, seed, power_of_two)
    amax = x.abs().amax().view(1, 1) if x.numel() else x.new_zeros(1, 1)
    transposed = codes.t().clone(memory_format=torch.contiguous_format) if both else codes.new_empty(0, 0)
    return codes, scale, amax.float(), transposed


@quantize_tensorwise_amax.fake
def _tensorwise_fake(
    x: Tensor,
    dtype: torch.dtype = torch.int8,
    rounding: str = "nearest",
    seed: Tensor | None = None,
    power_of_two: bool = False,
    both: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check(x, dtype, rounding, seed, "quantize_tensorwise_amax")
    M, N = x.shape
    scale, amax = (x.new_empty(1, 1, dtype=torch.float32) for _ in range(2))
    return x.new_empty(M, N, dtype=dtype), scale, amax, x.new_empty((N, M) if both else (0, 0), dtype=dtype)


@quantize_tensorwise_amax.triton
def _launch_tensorwise(
    x: Tensor,
    dtype: torch.dtype = torch.int8,
    rounding: str = "nearest",
    seed: Tensor | None = None,
    power_of_two: bool = False,
    both: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, scale, amax, transposed = _tensorwise_fake(x, dtype, rounding, seed, power_of_two, both)
    require_element_type(dtype, x.device, "quantize_tensorwise_amax")
    launch_matrix(x, codes, scale, seed, power_of_two, amax)
    if both and x.numel():
        launch_known(x, amax[0], transposed.t(), scale, seed, power_of_two)
    return codes, scale, amax, transposed


@op
def quantize_transposed(
    x: Tensor,
    amax: Tensor,
    dtype: torch.dtype = torch.int8,
    rounding: str = "nearest",
    seed: Tensor | None = None,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    """x (M, N) float, amax (1, N) or (1, 1) float32 -> codes (N, M), contiguous, scale (N, 1) or (1, 1) float32.

    With the amax that the ops above return, what `quantize_columnwise_transposed` and `quantize_tensorwise_transposed`
    give, from one reading of x. Values beyond amax are undefined.
    """
    check(x, dtype, rounding, seed, "quantize_transposed")
    _check_amax(x, amax)
    if x.numel() == 0:
        return x.new_empty(x.shape[::-1], dtype=dtype), amax.new_zeros(amax.shape[1], 1)
    codes, scale = quantize_reference(x, amax, dtype, seed, power_of_two)
    return codes.t().clone(memory_format=torch.contiguous_format), scale.reshape(-1, 1)


@quantize_transposed.fake
def _transposed_fake(
    x: Tensor,
    amax: Tensor,
    dtype: torch.dtype = torch.int8,
    rounding: str = "nearest",
    seed: Tensor | None = None,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    check(x, dtype, rounding, seed, "quantize_transposed")
    _check_amax(x, amax)
    return x.new_empty(x.shape[1], x.shape[0], dtype=dtype), amax.new_empty(amax.shape[1], 1)


@quantize_transposed.triton
def _launch_transposed(
    x: Tensor,
    amax: Tensor,
    dtype: torch.dtype = torch.int8,
    rounding: str = "nearest",
    seed: Tensor | None = None,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    codes, scale = _transposed_fake(x, amax, dtype, rounding, seed, power_of_two)
    require_element_type(dtype, x.device, "quantize_transposed")
    if x.numel() == 0:
        scale.zero_()
        return codes, scale
    known = amax.contiguous() if amax.shape[1] > 1 else amax[0]
    launch_known(x, known, codes.t(), scale, seed, power_of_two)
    return codes, scale


def _check_amax(x: Tensor, amax: Tensor) -> None:
    shapes = ((1, x.shape[-1]), (1, 1))
    if amax.dtype != torch.float32 or tuple(amax.shape) not in shapes or amax.device != x.device:
        raise ValueError(
            f"quantize_transposed takes amax float32 of shape {shapes[0]} or (1, 1) on {x.device}, "
            f"got {tuple(amax.shape)} {amax.dtype} on {amax.device}"
        )


@op
def dequantize_rowwise(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes (M, K) int8 or fp8, scale (M, 1) float32 -> codes * scale (M, K) in float32, rounded once to dtype.

    codes may have any strides; dtype is float32, bfloat16 or float16.
    """
    return _dequantize_fake(codes, scale, dtype).copy_(codes.float() * scale)


@dequantize_rowwise.fake
def _dequantize_fake(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if codes.ndim != 2 or codes.dtype not in ELEMENT_TYPES:
        known = ", ".join(map(str, ELEMENT_TYPES))
        raise TypeError(f"dequantize_rowwise takes a matrix of {known}, got {tuple(codes.shape)} {codes.dtype}")
    if scale.dtype != torch.float32 or tuple(scale.shape) != (codes.shape[0], 1) or scale.device != codes.device:
        raise ValueError(
            f"dequantize_rowwise takes a scale float32 of shape {(codes.shape[0], 1)} on {codes.device}, "
            f"got {tuple(scale.shape)} {scale.dtype} on {scale.device}"
        )
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"dequantize_rowwise returns float32, bfloat16 or float16, not {dtype}")
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


@triton.jit
def _dequantize_rowwise_kernel(
    codes_ptr, scale_ptr, out_ptr, M, K, stride_cm, stride_ck, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    strips = tl.cdiv(K, BLOCK_K)
    # int64: row * stride passes 2^31 at 1M tokens x 4096
    row = (tl.program_id(0) // strips).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    column = (tl.program_id(0) % strips).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    mask = (row < M) & (column < K)
    codes = tl.load(codes_ptr + row * stride_cm + column * stride_ck, mask=mask, other=0.0)
    out = codes.to(tl.float32) * tl.load(scale_ptr + row, mask=row < M, other=0.0)
    tl.store(out_ptr + row * K + column, out.to(out_ptr.dtype.element_ty), mask=mask)


_DEQUANTIZED = (8, 512)  # rows and columns of a tile


@dequantize_rowwise.triton
def _launch_dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    out = _dequantize_fake(codes, scale, dtype)
    require_element_type(codes.dtype, codes.device, "dequantize_rowwise")
    if out.numel():
        block_m, block_k = _DEQUANTIZED
        programs = cdiv(codes.shape[0], block_m) * cdiv(codes.shape[1], block_k)
        sizes = (*codes.shape, *codes.stride())
        launch(
            _dequantize_rowwise_kernel,
            programs,
            (codes, scale.contiguous(), out),
            sizes,
            BLOCK_M=block_m,
            BLOCK_K=block_k,
        )
    return out
