"""int32 sums of an int8 product back to values: the epilogue of `scaled_mm`, for sums that are there already.

    out = float32(total) * row_scale * column_scale + bias          (each step rounded to float32, then to out_dtype)

Source: LLM.int8(), section 3.1, https://arxiv.org/abs/2208.07339, whose 1 / 127^2 is part of the scales.
"""

import torch
from torch import Tensor

from lq_kernels._op import op
from lq_kernels._triton import tl, triton
from lq_kernels.scaled_mm_tile import scaled

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@op
def rescale_int32(
    total: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """total (M, N) int32 -> (M, N) in `out_dtype`: total * row_scale * column_scale + bias.

    row_scale (M, 1) or (1, 1), column_scale (1, N) or (1, 1), float32; bias (N,) float32, bfloat16, float16 or None;
    out_dtype float32, bfloat16 or float16. Any strides, any size, 0 included. A sum beyond 2^24 is rounded to float32
    first, to the nearest. ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    _check(total, row_scale, column_scale, bias, out_dtype)
    out = total.float() * row_scale * column_scale
    return (out if bias is None else out + bias.float()).to(out_dtype).contiguous()


@rescale_int32.fake
def _fake(
    total: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    _check(total, row_scale, column_scale, bias, out_dtype)
    return total.new_empty(total.shape, dtype=out_dtype)


def _check(total: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> None:
    if total.ndim != 2 or total.dtype != torch.int32:
        raise ValueError(f"rescale_int32 takes a matrix of int32, got {tuple(total.shape)} {total.dtype}")
    M, N = total.shape
    for name, scale, shape in (("row_scale", row_scale, (M, 1)), ("column_scale", column_scale, (1, N))):
        if scale.dtype != torch.float32 or scale.ndim != 2 or tuple(scale.shape) not in (shape, (1, 1)):
            raise ValueError(
                f"rescale_int32 takes {name} float32 of shape {shape} or (1, 1), got {tuple(scale.shape)} {scale.dtype}"
            )
    if bias is not None and (bias.shape != (N,) or bias.dtype not in _FLOATS):
        raise ValueError(f"rescale_int32 takes a float bias of shape {(N,)}, got {tuple(bias.shape)} {bias.dtype}")
    devices = {t.device for t in (total, row_scale, column_scale, bias) if t is not None}
    if len(devices) > 1:
        raise ValueError(
            f"rescale_int32 takes tensors of one device, got {sorted(map(str, devices))}: move them to one"
        )
    if out_dtype not in _FLOATS:
        raise TypeError(f"rescale_int32 returns float32, bfloat16 or float16, not {out_dtype}")


@triton.jit
def _rescale_kernel(
    total_ptr,
    row_scale_ptr,
    column_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    stride_tm,
    stride_tn,
    stride_row_scale: tl.constexpr,
    stride_column_scale: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    strips = tl.cdiv(N, BLOCK_N)
    # int64: row * stride passes 2^31 at 1M tokens x 4096
    row = (tl.program_id(0) // strips).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % strips).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < M)[:, None] & (column < N)[None, :]
    total = tl.load(total_ptr + row[:, None] * stride_tm + column[None, :] * stride_tn, mask=mask, other=0)
    out = scaled(
        total, row, column, M, N, row_scale_ptr, column_scale_ptr, bias_ptr, stride_row_scale, stride_column_scale
    )
    tl.store(out_ptr + row[:, None] * N + column[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


_BLOCK_M, _BLOCK_N = 16, 256


@rescale_int32.triton
def _launch(
    total: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    out = _fake(total, row_scale, column_scale, bias, out_dtype)
    M, N = out.shape
    if out.numel():
        _rescale_kernel[(triton.cdiv(M, _BLOCK_M) * triton.cdiv(N, _BLOCK_N),)](
            total,
            row_scale,
            column_scale,
            None if bias is None else bias.contiguous(),
            out,
            M,
            N,
            *total.stride(),
            row_scale.stride(0) if row_scale.shape[0] > 1 else 0,
            column_scale.stride(1) if column_scale.shape[1] > 1 else 0,
            BLOCK_M=_BLOCK_M,
            BLOCK_N=_BLOCK_N,
            enable_fp_fusion=False,  # each product and the sum are rounded, as in the reference
        )
    return out
