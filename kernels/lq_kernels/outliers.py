"""int8 operands of LLM.int8(): columns with an outlier leave the codes and are listed, to be multiplied in floats.

    outlier        = |x| >= threshold                                        (a NaN is none, an infinity always is one)
    outlier column = a column with an outlier
    amax           = max(|x|) over a row without its outliers
    codes          = round_half_to_even(x * (127 / amax)), 0 in outlier columns;    scale = amax / 127

Where amax is too small or a NaN, codes and scale are those of rowwise.py: a scale of 0, or one of NaN that shows. An
infinity poisons no scale. It is an outlier and reaches the result by way of its column, as an infinity or a NaN.

The list needs no host: columns (K,) int32 holds the outlier columns first, ascending, and K, which is no column, in
every other place; count (1,) int32 says how many they are. Reference and kernels agree to the bit: maxima and marks
do not depend on the order of programs.

Source: LLM.int8(), section 3.2, https://arxiv.org/abs/2208.07339
"""

from ctypes import c_float

import torch
from torch import Tensor

from lq_kernels._op import op
from lq_kernels._triton import device_limits, tl, triton
from lq_kernels.element_types import INT8, encode, magnitude_bits, scales

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST, _SMALLEST_AMAX = tl.constexpr(INT8.largest), tl.constexpr(INT8.smallest_amax)


@op
def quantize_rowwise_outliers(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (M, K) float -> codes (M, K) int8, scale (M, 1) float32, columns (K,) int32, count (1,) int32.

    x is float32, bfloat16 or float16, of any strides and any size, 0 included; it is compared with the threshold in
    float32. ValueError: a threshold that is not above 0. Without a threshold use `quantize_rowwise`.
    """
    check_outliers(x, threshold, "quantize_rowwise_outliers")
    outlier = x.abs().float() >= threshold
    in_column = outlier.any(dim=0)
    codes, scale = INT8.quantize(x.masked_fill(in_column, 0.0), inlier_amax(x, outlier), None)
    column = torch.arange(len(in_column), dtype=torch.int32, device=x.device)
    columns = torch.where(in_column, column, len(in_column)).sort().values
    return codes, scale, columns, in_column.sum(dtype=torch.int32).view(1)


@quantize_rowwise_outliers.fake
def _quantize_rowwise_outliers_fake(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_outliers(x, threshold, "quantize_rowwise_outliers")
    M, K = x.shape
    codes, scale = x.new_empty(M, K, dtype=torch.int8), x.new_empty(M, 1, dtype=torch.float32)
    return codes, scale, x.new_empty(K, dtype=torch.int32), x.new_empty(1, dtype=torch.int32)


def inlier_amax(x: Tensor, outlier: Tensor) -> Tensor:
    """(M, 1): of each row, without its outliers."""
    return x.masked_fill(outlier, 0.0).abs().amax(dim=1, keepdim=True) if x.shape[1] else x.new_zeros(x.shape[0], 1)


def check_outliers(x: Tensor, threshold: float, name: str) -> None:
    if x.ndim != 2:
        raise ValueError(f"{name} takes a matrix, got shape {tuple(x.shape)}: flatten it, x.reshape(-1, x.shape[-1])")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} takes float32, bfloat16 or float16, got {x.dtype}: cast it, x.float()")
    if not threshold > 0:
        raise ValueError(f"{name} takes a threshold above 0, got {threshold}: quantize_rowwise knows no outliers")


@triton.jit
def _inliers(x, threshold):
    """x as float32 with 0 for outliers, and |x|. A NaN is no outlier: no comparison with it holds."""
    x = x.to(tl.float32)
    return tl.where(tl.abs(x) >= threshold, 0.0, x), tl.abs(x)


@triton.jit
def _mark(found_ptr, column, K, threshold, largest):
    """Marks the columns with an outlier among the largest values.

    All programs store the same 1. Many stores to one address take long, so a mark that is seen is not made again.
    """
    found_ptrs = found_ptr + column + tl.zeros(largest.shape, tl.int32)
    outlier = (largest >= threshold) & (column < K)
    found = tl.load(found_ptrs, mask=outlier, other=1)
    tl.store(found_ptrs, 1, mask=outlier & (found == 0))


@triton.jit
def _raise_amax(amax_ptr, column, bits):
    """The amax of columns to that of these rows: a maximum of integers, whatever the order of programs.

    Beyond the last column the bits are 0.
    """
    bits = tl.max(bits, axis=0, keep_dims=True)
    tl.atomic_max(amax_ptr + column, bits, mask=bits > 0, sem="relaxed")


@triton.heuristics(
    {
        "WHOLE_ROW": lambda args: args["K"] <= args["BLOCK_K"],
        "BY_COLUMN": lambda args: args["column_amax_ptr"] is not None,
    }
)
@triton.jit
def _outlier_rows_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    found_ptr,
    column_amax_ptr,
    threshold,
    M,
    K,
    stride_xm,
    stride_xk,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    BY_COLUMN: tl.constexpr,
):
    """Codes with 0 for outliers, scales, marks of outlier columns and, if asked for, the amax of columns.

    Each program takes every num_programs-th BLOCK_M rows; rows that fit into a tile are read once, and what they say
    about columns is kept in registers. STAGES rows are read at a time.
    """
    column = tl.arange(0, BLOCK_K)[None, :].to(tl.int64)
    most = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    column_bits = tl.zeros([BLOCK_M, BLOCK_K], tl.int32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        # int64: row * stride passes 2^31 at 1M tokens x 4096
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        rows = row < M
        if WHOLE_ROW:
            mask = rows & (column < K)
            x = tl.load(x_ptr + row * stride_xm + column * stride_xk, mask=mask, other=0.0)
            x, largest = _inliers(x, threshold)
            most = tl.maximum(most, largest)
            bits = magnitude_bits(x)
            if BY_COLUMN:
                column_bits = tl.maximum(column_bits, bits)
            scale, factor, quantizable = scales(tl.max(bits, axis=1, keep_dims=True), _LARGEST, _SMALLEST_AMAX)
            codes = encode(x, factor, quantizable, None, tl.int8, _LARGEST)
            tl.store(codes_ptr + row * K + column, codes, mask=mask)
        else:
            row_bits = tl.zeros([BLOCK_M, BLOCK_K], tl.int32)
            for start in range(0, K, BLOCK_K):
                mask = rows & (start + column < K)
                x = tl.load(x_ptr + row * stride_xm + (start + column) * stride_xk, mask=mask, other=0.0)
                x, largest = _inliers(x, threshold)
                _mark(found_ptr, start + column, K, threshold, largest)
                bits = magnitude_bits(x)
                row_bits = tl.maximum(row_bits, bits)
                if BY_COLUMN:
                    _raise_amax(column_amax_ptr, start + column, bits)
            scale, factor, quantizable = scales(tl.max(row_bits, axis=1, keep_dims=True), _LARGEST, _SMALLEST_AMAX)
            for start in range(0, K, BLOCK_K):
                mask = rows & (start + column < K)
                x = tl.load(x_ptr + row * stride_xm + (start + column) * stride_xk, mask=mask, other=0.0)
                x, _ = _inliers(x, threshold)
                codes = encode(x, factor, quantizable, None, tl.int8, _LARGEST)
                tl.store(codes_ptr + row * K + start + column, codes, mask=mask)
        tl.store(scale_ptr + row, scale, mask=rows)
    if WHOLE_ROW:
        _mark(found_ptr, column, K, threshold, most)
        if BY_COLUMN:
            _raise_amax(column_amax_ptr, column, column_bits)


@triton.jit
def list_columns(found_ptr, columns_ptr, count_ptr, K, CHUNK: tl.constexpr):
    """columns and count from the marks; by one program."""
    lane = tl.arange(0, CHUNK)
    count = 0
    for start in range(0, K, CHUNK):
        found = tl.load(found_ptr + start + lane, mask=start + lane < K, other=0)
        tl.store(columns_ptr + count + tl.cumsum(found) - 1, start + lane, mask=found > 0)
        count += tl.sum(found)
    for start in range(0, K, CHUNK):
        place = start + lane
        tl.store(columns_ptr + place, tl.zeros_like(lane) + K, mask=(place >= count) & (place < K))
    tl.store(count_ptr, count)


@triton.jit
def _clear_columns_kernel(
    codes_ptr,
    found_ptr,
    columns_ptr,
    count_ptr,
    M,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The first program lists the outlier columns; each other clears those of BLOCK_K in BLOCKS * BLOCK_M rows."""
    if tl.program_id(0) == 0:
        list_columns(found_ptr, columns_ptr, count_ptr, K, CHUNK)
    else:
        strip, band = (tl.program_id(0) - 1) % tl.cdiv(K, BLOCK_K), (tl.program_id(0) - 1) // tl.cdiv(K, BLOCK_K)
        column = strip.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        found = tl.load(found_ptr + column, mask=column < K, other=0) > 0
        if tl.max(found.to(tl.int32)) > 0:
            for block in range(band * BLOCKS, (band + 1) * BLOCKS):
                row = tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
                tl.store(codes_ptr + row * K + column, tl.zeros([BLOCK_M, BLOCK_K], tl.int8), mask=(row < M) & found)


_LONGEST_ROW = 16384  # values that a program keeps in registers, beside as many maxima of columns
_ROW_TILE = 4096  # values in a tile of rows
_LONG_ROW_STEP = 256  # along rows that are longer than _LONGEST_ROW
_STAGES = 3  # rows in flight and in work, for each program
_PROGRAMS = 16  # for each multiprocessor, at most: each marks its columns
_PROGRAMS_BY_COLUMN = 4  # for each multiprocessor, at most: each adds its maximum to that of every column
_BAND = 1024  # rows in which a program clears columns
_STRIP = 32  # of these columns: those that share a sector of memory
_CLEARED = 4096  # codes at a time
_CHUNK = 2048  # marks that are listed at a time
_WARPS = 8  # to list or clear


@quantize_rowwise_outliers.triton
def _launch(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, scale, columns, count = _quantize_rowwise_outliers_fake(x, threshold)
    M, K = x.shape
    found = torch.zeros(K, dtype=torch.int32, device=x.device)
    launch_rows(x, threshold, codes, scale, found)
    # The elements that are outliers have the code 0 already: of one row these are its outlier columns.
    tiles = triton.cdiv(K, _STRIP) * triton.cdiv(M, _BAND) if M > 1 else 0
    _clear_columns_kernel[(1 + tiles,)](
        codes,
        found,
        columns,
        count,
        M,
        K,
        BLOCK_M=_CLEARED // _STRIP,
        BLOCK_K=_STRIP,
        BLOCKS=_BAND * _STRIP // _CLEARED,
        CHUNK=chunk_of(K),
        num_warps=_WARPS,
    )
    return codes, scale, columns, count


def chunk_of(K: int) -> int:
    """The marks that a program lists at a time."""
    return min(_CHUNK, triton.next_power_of_2(max(K, 1)))


def launch_rows(
    x: Tensor, threshold: float, codes: Tensor, scale: Tensor, found: Tensor, column_amax: Tensor | None = None
) -> None:
    """Fills codes (but leaves the inliers of outlier columns in them), scale and marks, and the amax of columns.

    found and column_amax are (K,) int32, zeros before; column_amax takes the bits of float32.
    """
    M, K = x.shape
    if M == 0:
        return
    block_k = triton.next_power_of_2(max(K, 1))
    block_k = block_k if block_k <= _LONGEST_ROW else _LONG_ROW_STEP
    block_m = max(1, _ROW_TILE // block_k)
    programs = (_PROGRAMS if column_amax is None else _PROGRAMS_BY_COLUMN) * device_limits(x.device).multiprocessors
    _outlier_rows_kernel[(min(programs, triton.cdiv(M, block_m)),)](
        x,
        codes,
        scale,
        found,
        column_amax,
        c_float(threshold).value,  # what the reference compares with, whatever a GPU makes of a Python number
        M,
        K,
        *x.stride(),
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        STAGES=_STAGES,
        num_warps=min(max(4, block_k // 1024), 16),
        enable_fp_fusion=False,  # the product is rounded before it is rounded to an integer
    )
