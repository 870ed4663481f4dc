"""Quantisation with one scale for each row: a program keeps whole rows in registers and reads them once.

What these rows say about columns can be kept on the way, in registers too, for a later quantisation by column.
"""

from torch import Tensor

from lq_kernels._launch import cdiv, launch, next_power_of_2
from lq_kernels._triton import device_limits, tl, triton
from lq_kernels.element_types import ELEMENT_TYPES, encode, magnitude_bits, scales
from lq_kernels.rounding import random_words

_LONGEST_ROW = 32768  # values that a program keeps in registers
_ROW_TILE = 4096  # values in a tile of short rows, and in one step along a row that is longer than _LONGEST_ROW

# Of the kernel that keeps the amax of columns: longer rows would spill; programs for each multiprocessor; rows that a
# program reads ahead.
LONGEST_ROW_BY_COLUMN = 16384
_PROGRAMS_BY_COLUMN = 2
_STAGES = 4


@triton.heuristics(
    {
        "WHOLE_ROW": lambda args: args["K"] <= args["BLOCK_K"],
        "BELOW_32_BITS": lambda args: args["M"] * args["K"] <= 2**32,
    }
)
@triton.jit
def _rowwise_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    seed_ptr,
    M,
    K,
    stride_xm,
    stride_xk,
    LARGEST: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    BELOW_32_BITS: tl.constexpr,
):
    """BLOCK_M rows per program; a row that fits into a tile is read once."""
    # int64: row * stride passes 2^31 at 1M tokens x 4096
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    column = tl.arange(0, BLOCK_K)[None, :].to(tl.int64)
    x_ptr += row * stride_xm
    rows = row < M
    seed = None if seed_ptr is None else tl.load(seed_ptr)
    element_type: tl.constexpr = codes_ptr.dtype.element_ty
    if WHOLE_ROW:
        mask = rows & (column < K)
        x = tl.load(x_ptr + column * stride_xk, mask=mask, other=0.0)
        bits = tl.max(magnitude_bits(x), axis=1, keep_dims=True)
        scale, factor, quantizable = scales(bits, LARGEST, SMALLEST_AMAX, POWER_OF_TWO)
        word = None if seed_ptr is None else random_words(seed, row * K + column, BELOW_32_BITS)
        tl.store(codes_ptr + row * K + column, encode(x, factor, quantizable, word, element_type, LARGEST), mask=mask)
    else:
        bits = tl.zeros([BLOCK_M, BLOCK_K], tl.int32)
        for start in range(0, K, BLOCK_K):
            mask = rows & (start + column < K)
            x = tl.load(x_ptr + (start + column) * stride_xk, mask=mask, other=0.0)
            bits = tl.maximum(bits, magnitude_bits(x))
        bits = tl.max(bits, axis=1, keep_dims=True)
        scale, factor, quantizable = scales(bits, LARGEST, SMALLEST_AMAX, POWER_OF_TWO)
        for start in range(0, K, BLOCK_K):
            mask = rows & (start + column < K)
            x = tl.load(x_ptr + (start + column) * stride_xk, mask=mask, other=0.0)
            index = row * K + start + column
            word = None if seed_ptr is None else random_words(seed, index, BELOW_32_BITS)
            tl.store(codes_ptr + index, encode(x, factor, quantizable, word, element_type, LARGEST), mask=mask)
    tl.store(scale_ptr + row, scale, mask=rows)


@triton.heuristics({"BELOW_32_BITS": lambda args: args["M"] * args["K"] <= 2**32})
@triton.jit
def _rowwise_column_amax_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    amax_ptr,
    seed_ptr,
    M,
    K,
    stride_xm,
    stride_xk,
    LARGEST: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    BELOW_32_BITS: tl.constexpr,
):
    """Every num_programs-th BLOCK_M rows, which fit into a tile; amax (K,) int32, zeros before, takes float32 bits."""
    column = tl.arange(0, BLOCK_K)[None, :].to(tl.int64)
    column_bits = tl.zeros([BLOCK_M, BLOCK_K], tl.int32)
    seed = None if seed_ptr is None else tl.load(seed_ptr)
    element_type: tl.constexpr = codes_ptr.dtype.element_ty
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        # int64: row * stride passes 2^31 at 1M tokens x 4096
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        mask = (row < M) & (column < K)
        x = tl.load(x_ptr + row * stride_xm + column * stride_xk, mask=mask, other=0.0)
        bits = magnitude_bits(x)
        column_bits = tl.maximum(column_bits, bits)
        bits = tl.max(bits, axis=1, keep_dims=True)
        scale, factor, quantizable = scales(bits, LARGEST, SMALLEST_AMAX, POWER_OF_TWO)
        word = None if seed_ptr is None else random_words(seed, row * K + column, BELOW_32_BITS)
        tl.store(codes_ptr + row * K + column, encode(x, factor, quantizable, word, element_type, LARGEST), mask=mask)
        tl.store(scale_ptr + row, scale, mask=row < M)
    # A maximum of integers is the same in whatever order programs finish.
    bits = tl.max(column_bits, axis=0, keep_dims=True)
    tl.atomic_max(amax_ptr + column, bits, mask=(column < K) & (bits > 0), sem="relaxed")


def launch_rows(x: Tensor, codes: Tensor, scale: Tensor, seed: Tensor | None, power_of_two: bool = False) -> None:
    """Fills codes (M, K), contiguous, and scale (M, 1)."""
    M, K = x.shape
    if M == 0:
        return
    element = ELEMENT_TYPES[codes.dtype]
    block_k = next_power_of_2(max(K, 1))
    block_k = block_k if block_k <= _LONGEST_ROW else _ROW_TILE
    block_m = max(1, _ROW_TILE // block_k)
    launch(
        _rowwise_kernel,
        cdiv(M, block_m),
        (x, codes, scale, seed),
        (M, K, *x.stride()),
        LARGEST=element.largest,
        SMALLEST_AMAX=element.smallest_amax,
        POWER_OF_TWO=power_of_two,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=_warps(block_k),
        enable_fp_fusion=False,  # the product is rounded before it is rounded to a code
    )


def launch_rows_column_amax(
    x: Tensor, codes: Tensor, scale: Tensor, amax: Tensor, seed: Tensor | None, power_of_two: bool
) -> None:
    """Fills codes (M, K), contiguous, scale (M, 1) and amax (K,) int32, zeros before: float32's bits.

    K is at most LONGEST_ROW_BY_COLUMN.
    """
    M, K = x.shape
    element = ELEMENT_TYPES[codes.dtype]
    block_k = next_power_of_2(K)
    block_m = max(1, _ROW_TILE // block_k)
    programs = _PROGRAMS_BY_COLUMN * device_limits(x.device).multiprocessors
    launch(
        _rowwise_column_amax_kernel,
        min(programs, cdiv(M, block_m)),
        (x, codes, scale, amax, seed),
        (M, K, *x.stride()),
        LARGEST=element.largest,
        SMALLEST_AMAX=element.smallest_amax,
        POWER_OF_TWO=power_of_two,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        STAGES=_STAGES,
        num_warps=_warps(block_k),
        enable_fp_fusion=False,
    )


def _warps(block_k: int) -> int:
    return min(max(4, block_k // 1024), 16)
