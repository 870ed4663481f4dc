"""One matrix quantised by row and by column for LLM.int8(), its outlier columns left out of both.

Outliers, row codes and the list of columns are those of outliers.py; the column codes follow the same formula on the
transpose. x is read twice: once for the row codes and the amax of columns, once for the column codes.

Source: LLM.int8(), section 3, https://arxiv.org/abs/2208.07339
"""

import torch
from torch import Tensor

from lq_kernels._op import op
from lq_kernels._triton import tl, triton
from lq_kernels.element_types import INT8, encode, scales
from lq_kernels.outliers import (
    check_outliers,
    chunk_of,
    inlier_amax,
    launch_rows,
    list_columns,
    quantize_rowwise_outliers,
)

_LARGEST, _SMALLEST_AMAX = tl.constexpr(INT8.largest), tl.constexpr(INT8.smallest_amax)


@op
def double_quantize(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x (M, K) float -> row codes (M, K), column codes (K, M), row scale (M, 1), column scale (K, 1), columns, count.

    All but the column codes and their scale are what `quantize_rowwise_outliers` returns. The column codes are those of
    x.t(), contiguous, with a scale for each column of x, and 0 in outlier columns: an operand of the weight gradient,
    to which the outlier columns of x contribute in floats. Inputs and errors are the same.
    """
    check_outliers(x, threshold, "double_quantize")
    codes, scale, columns, count = quantize_rowwise_outliers.reference(x, threshold)
    outlier = x.abs().float() >= threshold
    inliers = x.masked_fill(outlier.any(dim=0), 0.0)
    column_codes, column_scale = INT8.quantize(inliers.t(), inlier_amax(x.t(), outlier.t()), None)
    return codes, column_codes, scale, column_scale, columns, count


@double_quantize.fake
def _double_quantize_fake(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_outliers(x, threshold, "double_quantize")
    M, K = x.shape
    column_codes, column_scale = x.new_empty(K, M, dtype=torch.int8), x.new_empty(K, 1, dtype=torch.float32)
    columns, count = x.new_empty(K, dtype=torch.int32), x.new_empty(1, dtype=torch.int32)
    codes, scale = x.new_empty(M, K, dtype=torch.int8), x.new_empty(M, 1, dtype=torch.float32)
    return codes, column_codes, scale, column_scale, columns, count


@triton.jit
def _column_codes_kernel(
    x_ptr,
    codes_ptr,
    column_codes_ptr,
    column_scale_ptr,
    found_ptr,
    column_amax_ptr,
    columns_ptr,
    count_ptr,
    K,
    stride_xm,
    stride_xk,
    stride_ck,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The first program lists the outlier columns; the others quantise tiles and clear the row codes in them.

    Their number is a multiple of cdiv(K, BLOCK_K): the tiles of each lie below each other, and its columns stay the
    same. A pointer to int32 takes ROWS = 4 rows of column codes at a time, the first in the lowest byte: words are
    faster to transpose than bytes.
    """
    if tl.program_id(0) == 0:
        list_columns(found_ptr, columns_ptr, count_ptr, K, CHUNK)
    else:
        program, strips = tl.program_id(0) - 1, tl.cdiv(K, BLOCK_K)
        column = (program % strips).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        found = tl.load(found_ptr + column, mask=column < K, other=0) > 0
        any_found = tl.max(found.to(tl.int32)) > 0
        amax_bits = tl.load(column_amax_ptr + column, mask=column < K, other=0)
        scale, factor, quantizable = scales(amax_bits, _LARGEST, _SMALLEST_AMAX)
        tl.store(column_scale_ptr + column, scale, mask=(column < K) & (program < strips))
        bands = tl.cdiv(stride_ck, BLOCK_M)
        for skipped in range(program // strips, bands, (tl.num_programs(0) - 1) // strips):
            # What was read last is still in the L2.
            word = tl.cast(bands - 1 - skipped, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
            packed = tl.zeros([BLOCK_M, BLOCK_K], tl.uint32)
            mask = (word < stride_ck) & (column < K)
            for i in tl.static_range(ROWS):
                x = tl.load(x_ptr + (word * ROWS + i) * stride_xm + column * stride_xk, mask=mask, other=0.0)
                codes = encode(x, factor, quantizable & (found == 0), None, tl.int8, _LARGEST)
                packed |= codes.to(tl.uint8, bitcast=True).to(tl.uint32) << 8 * i
            column_codes = packed.to(column_codes_ptr.dtype.element_ty, bitcast=ROWS == 4)
            tl.store(column_codes_ptr + column * stride_ck + word, column_codes, mask=mask)
            if any_found:
                for i in tl.static_range(ROWS):
                    zeros = tl.zeros([BLOCK_M, BLOCK_K], tl.int8)
                    tl.store(codes_ptr + (word * ROWS + i) * K + column, zeros, mask=mask & found)


_TILE = 8192  # values
_TILE_ROWS = 128  # a whole cache line of column codes
_PROGRAMS = 2048  # about: some tiles for each
_WARPS = 4


@double_quantize.triton
def _launch(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    codes, column_codes, scale, column_scale, columns, count = _double_quantize_fake(x, threshold)
    M, K = x.shape
    found, column_amax = torch.zeros(2, K, dtype=torch.int32, device=x.device)
    launch_rows(x, threshold, codes, scale, found, column_amax)
    if M == 0:
        column_scale.zero_()  # of columns without a program
    rows = 4 if M and M % 4 == 0 else 1
    block_m = min(_TILE_ROWS, triton.next_power_of_2(max(M, 1))) // rows
    block_k = min(_TILE // _TILE_ROWS, triton.next_power_of_2(max(K, 1)))
    block_k = block_k if rows == 4 else max(1, block_k // 2)  # a byte takes the register of a word
    strips, bands = triton.cdiv(K, block_k), triton.cdiv(M // rows, block_m)
    programs = min(bands, triton.cdiv(_PROGRAMS, max(strips, 1))) * strips
    _column_codes_kernel[(1 + programs,)](
        x,
        codes,
        column_codes.view(torch.int32) if rows == 4 else column_codes,
        column_scale,
        found,
        column_amax,
        columns,
        count,
        K,
        *x.stride(),
        M // rows,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        ROWS=rows,
        CHUNK=chunk_of(K),
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
    return codes, column_codes, scale, column_scale, columns, count
