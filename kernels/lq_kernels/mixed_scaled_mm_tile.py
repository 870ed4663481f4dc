"""The product of LLM.int8() for every GPU, stride and size: `scaled_mm_tile.py` with the outlier columns added."""

import torch
from torch import Tensor

from lq_kernels._triton import tl, triton
from lq_kernels.scaled_mm_tile import scale_strides, scaled, swizzled, tile_for

OUTLIERS = 16  # columns at a time: the least inner dimension of a 16-bit matrix unit


@triton.jit
def outlier_operands(
    x_ptr, b_ptr, columns_ptr, first, count, rows, columns, stride_xk, stride_bk, OUTLIERS: tl.constexpr
):
    """Outlier columns from `first` on, of x (BLOCK_M, OUTLIERS) and of the weight (OUTLIERS, BLOCK_N), 0 past the last.

    The pointers are to column 0: of the rows of x (BLOCK_M, 1), and of the rows of the weight (1, BLOCK_N).
    """
    lane = first + tl.arange(0, OUTLIERS)
    k = tl.load(columns_ptr + lane, mask=lane < count, other=0).to(tl.int64)
    x = tl.load(x_ptr + k[None, :] * stride_xk, mask=rows & (lane < count)[None, :], other=0.0)
    return x, tl.load(b_ptr + k[:, None] * stride_bk, mask=columns & (lane < count)[:, None], other=0)


@triton.jit
def add_outliers(
    out,
    x,
    codes,
    scale,
    x_ptr,
    b_ptr,
    columns_ptr,
    count,
    rows,
    columns,
    stride_xk,
    stride_bk,
    OUTLIERS: tl.constexpr,
):
    """out + x @ (codes * scale) over all outliers, the weight rounded to the type of x; x and codes are the first."""
    first = 0
    while first < count:
        out = tl.dot(x, (codes.to(tl.float32) * scale).to(x.dtype), out)
        first += OUTLIERS
        x, codes = outlier_operands(
            x_ptr, b_ptr, columns_ptr, first, count, rows, columns, stride_xk, stride_bk, OUTLIERS
        )
    return out


@triton.heuristics(
    {
        "EVEN_K": lambda args: args["K"] % args["BLOCK_K"] == 0,
        "FLOAT32": lambda args: args["x_ptr"].dtype == torch.float32,
    }
)
@triton.jit
def _mixed_scaled_mm_kernel(
    x_ptr,
    a_ptr,
    b_ptr,
    scale_a_ptr,
    scale_b_ptr,
    columns_ptr,
    count_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_scale_a: tl.constexpr,
    stride_scale_b: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    OUTLIERS: tl.constexpr,
    EVEN_K: tl.constexpr,
    FLOAT32: tl.constexpr,
):
    """A tile of out. Outliers of a 16-bit x go through the matrix unit, OUTLIERS at a time, those of float32 do not."""
    tile_m, tile_n = swizzled(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    # int64: row * stride passes 2^31 at 1M tokens x 4096
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    step = tl.full([], BLOCK_K, tl.int64)
    rows, columns = (row < M)[:, None], (column < N)[None, :]
    x_ptr += row[:, None] * stride_xm
    b_ptr += column[None, :] * stride_bn

    count = tl.load(count_ptr)
    if not FLOAT32:
        x, weight = outlier_operands(x_ptr, b_ptr, columns_ptr, 0, count, rows, columns, stride_xk, stride_bk, OUTLIERS)
    a_ptrs = a_ptr + row[:, None] * stride_am + k[None, :] * stride_ak
    b_ptrs = b_ptr + k[:, None] * stride_bk
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=rows, other=0)
            b = tl.load(b_ptrs, mask=columns, other=0)
        else:
            a = tl.load(a_ptrs, mask=rows & (start + k < K)[None, :], other=0)
            b = tl.load(b_ptrs, mask=columns & (start + k < K)[:, None], other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
        a_ptrs += step * stride_ak
        b_ptrs += step * stride_bk

    out = scaled(total, row, column, M, N, scale_a_ptr, scale_b_ptr, bias_ptr, stride_scale_a, stride_scale_b)
    if count > 0:
        scale = tl.load(scale_b_ptr + column * stride_scale_b, mask=column < N, other=0.0)[None, :]
        if FLOAT32:
            for i in range(0, count):
                outlier = tl.load(columns_ptr + i).to(tl.int64)
                weight = tl.load(b_ptr + outlier * stride_bk, mask=columns, other=0).to(tl.float32) * scale
                out += tl.load(x_ptr + outlier * stride_xk, mask=rows, other=0.0) * weight
        else:
            out = add_outliers(
                out,
                x,
                weight,
                scale,
                x_ptr,
                b_ptr,
                columns_ptr,
                count,
                rows,
                columns,
                stride_xk,
                stride_bk,
                OUTLIERS,
            )
    out_ptr += row[:, None] * N + column[None, :]
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), mask=rows & columns)


def launch_mixed_tiles(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    columns: Tensor,
    count: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """Fills out (M, N), contiguous and not empty."""
    (M, N), b = out.shape, weight_codes.t()
    # The outliers of a float32 x take as many registers as a second sum.
    tile = tile_for(codes, b, precise=x.dtype == torch.float32)
    _mixed_scaled_mm_kernel[(tile.count(M, N),)](
        x,
        codes,
        b,
        scale,
        weight_scale,
        columns,
        count,
        bias,
        out,
        M,
        N,
        x.shape[1],
        *x.stride(),
        *codes.stride(),
        *b.stride(),
        **scale_strides(scale, weight_scale.t()),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        GROUP_M=8,
        OUTLIERS=OUTLIERS,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,  # each product and the sum are rounded, as in the reference
    )
