"""Quantisation with one scale for each column or for the matrix, in two launches: partial amax, then codes.

The first launch is left out where the amax is known. Codes may be written transposed. A byte at a time that takes
longer than the reading, so where it can four rows of codes become one row of words, and words are what is transposed.
"""

import torch
from torch import Tensor

from lq_kernels._launch import cdiv, launch, next_power_of_2
from lq_kernels._triton import tl, triton
from lq_kernels.element_types import (
    ELEMENT_TYPES,
    encode,
    fp8_values,
    fp8_words,
    has_ptx,
    magnitude_bits,
    scales,
)
from lq_kernels.rounding import random_words

_TILE = 8192  # values in a tile
_TILE_SIDE = 128  # along the rows of the codes: a whole cache line
_WARPS = 4
_PARTIALS = 512  # of one matrix: about as many programs as keep a large GPU busy
_PARTIALS_OF_COLUMN = 32
_PROGRAMS = 2048  # that write codes: twice what a large GPU holds at once

_TRITON_TYPES = {torch.int8: tl.int8, torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


@triton.jit
def _tile_offsets(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows (BLOCK_M, 1), columns (1, BLOCK_N) and mask of a tile; neighbours in a row of tiles follow each other."""
    strips = tl.cdiv(N, BLOCK_N)
    row = (tile // strips).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    column = (tile % strips).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return row, column, (row < M) & (column < N)


@triton.heuristics({"BY_COLUMN": lambda args: args["stride_partial"] != 0})
@triton.jit
def _partial_amax_kernel(
    x_ptr,
    partial_ptr,
    M,
    N,
    stride_xm,
    stride_xn,
    stride_partial,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BY_COLUMN: tl.constexpr,
):
    """Bits of the amax of every num_programs-th tile: one, or by column, with a multiple of cdiv(N, BLOCK_N) programs.

    By column a program's tiles lie below each other; partial is (programs // cdiv(N, BLOCK_N), N), else (programs,).
    """
    program = tl.program_id(0)
    strips = tl.cdiv(N, BLOCK_N)
    bits = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for tile in range(program, strips * tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        row, column, mask = _tile_offsets(tile, M, N, BLOCK_M, BLOCK_N)
        x = tl.load(x_ptr + row * stride_xm + column * stride_xn, mask=mask, other=0.0)
        bits = tl.maximum(bits, magnitude_bits(x))
    if BY_COLUMN:
        column = (program % strips).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        partial_ptr += (program // strips).to(tl.int64) * stride_partial
        tl.store(partial_ptr + column, tl.max(bits, axis=0), mask=column < N)
    else:
        tl.store(partial_ptr + program, tl.max(bits))


@triton.jit
def _fp8_row(
    x_ptr,
    row,
    column,
    mask,
    N,
    stride_xm,
    stride_xn,
    factor,
    quantizable,
    seed,
    element_type: tl.constexpr,
    LARGEST: tl.constexpr,
    BELOW_32_BITS: tl.constexpr,
):
    """`fp8_values` of rows (BLOCK_M, 1) of x."""
    x = tl.load(x_ptr + row * stride_xm + column * stride_xn, mask=mask, other=0.0)
    word = None if seed is None else random_words(seed, row * N + column, BELOW_32_BITS)
    return fp8_values(x, factor, quantizable, word, element_type, LARGEST)


@triton.heuristics(
    {
        "BY_COLUMN": lambda args: args["stride_partial"] != 0,
        "PARTIALS": lambda args: next_power_of_2(args["partials"]),
        "BELOW_32_BITS": lambda args: args["M"] * args["N"] * args["ROWS"] <= 2**32,
        "FP8_WORDS": lambda args: args["ROWS"] == 4 and args["element_type"] != tl.int8,
    }
)
@triton.jit
def _quantize_tile_kernel(
    x_ptr,
    partial_ptr,
    codes_ptr,
    scale_ptr,
    amax_ptr,
    seed_ptr,
    M,
    N,
    partials,
    stride_xm,
    stride_xn,
    stride_cm,
    stride_cn,
    stride_partial,
    element_type: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    PTX: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    PARTIALS: tl.constexpr,
    BELOW_32_BITS: tl.constexpr,
    FP8_WORDS: tl.constexpr,
):
    """Codes of every num_programs-th tile; each program reduces the partial amax of its columns, or all, for itself.

    Each of M rows is ROWS of x: where that is 4, codes are int32 and hold the first one in their lowest byte. By column
    the number of programs is a multiple of cdiv(N, BLOCK_N), so that the tiles of each lie below each other.
    partial is int32, the bits of float32, or one amax that is known, float32; amax (or None) takes that of a matrix.
    """
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    # The tiles that the amax was taken of last come first: they are still in the L2.
    last = tiles - 1 - tl.program_id(0)
    partial = tl.arange(0, PARTIALS)
    if BY_COLUMN:
        _, column, _ = _tile_offsets(last, M, N, BLOCK_M, BLOCK_N)
        partial_ptr += partial[:, None] * stride_partial + column
        bits = tl.load(partial_ptr, mask=(partial[:, None] < partials) & (column < N), other=0)
        bits = tl.max(bits.to(tl.int32, bitcast=True), axis=0, keep_dims=True)
        scale, factor, quantizable = scales(bits, LARGEST, SMALLEST_AMAX, POWER_OF_TWO)
        tl.store(scale_ptr + column, scale, mask=(column < N) & (tl.program_id(0) < tl.cdiv(N, BLOCK_N)))
    else:
        bits = tl.load(partial_ptr + partial, mask=partial < partials, other=0)
        bits = tl.max(bits.to(tl.int32, bitcast=True), axis=0, keep_dims=True)[None, :]
        scale, factor, quantizable = scales(bits, LARGEST, SMALLEST_AMAX, POWER_OF_TWO)
        one = tl.arange(0, 1)[None, :]
        tl.store(scale_ptr + one, scale, mask=tl.program_id(0) == 0)
        if amax_ptr is not None:
            tl.store(amax_ptr + one, bits.to(tl.float32, bitcast=True), mask=tl.program_id(0) == 0)
    seed = None if seed_ptr is None else tl.load(seed_ptr)
    for skipped in range(0, last + 1, tl.num_programs(0)):
        row, column, mask = _tile_offsets(last - skipped, M, N, BLOCK_M, BLOCK_N)
        if FP8_WORDS:
            a = _fp8_row(
                x_ptr,
                row * 4 + 0,
                column,
                mask,
                N,
                stride_xm,
                stride_xn,
                factor,
                quantizable,
                seed,
                element_type,
                LARGEST,
                BELOW_32_BITS,
            )
            b = _fp8_row(
                x_ptr,
                row * 4 + 1,
                column,
                mask,
                N,
                stride_xm,
                stride_xn,
                factor,
                quantizable,
                seed,
                element_type,
                LARGEST,
                BELOW_32_BITS,
            )
            c = _fp8_row(
                x_ptr,
                row * 4 + 2,
                column,
                mask,
                N,
                stride_xm,
                stride_xn,
                factor,
                quantizable,
                seed,
                element_type,
                LARGEST,
                BELOW_32_BITS,
            )
            d = _fp8_row(
                x_ptr,
                row * 4 + 3,
                column,
                mask,
                N,
                stride_xm,
                stride_xn,
                factor,
                quantizable,
                seed,
                element_type,
                LARGEST,
                BELOW_32_BITS,
            )
            written = fp8_words(a, b, c, d, element_type, PTX)
        else:
            packed = tl.zeros([BLOCK_M, BLOCK_N], tl.uint32)
            for i in tl.static_range(ROWS):
                x_row = row * ROWS + i
                x = tl.load(x_ptr + x_row * stride_xm + column * stride_xn, mask=mask, other=0.0)
                word = None if seed_ptr is None else random_words(seed, x_row * N + column, BELOW_32_BITS)
                codes = encode(x, factor, quantizable, word, element_type, LARGEST)
                packed |= codes.to(tl.uint8, bitcast=True).to(tl.uint32) << 8 * i
            written = packed.to(tl.int32, bitcast=True) if ROWS == 4 else codes
        tl.store(codes_ptr + row * stride_cm + column * stride_cn, written, mask=mask)


def launch_columns(x: Tensor, codes: Tensor, scale: Tensor, seed: Tensor | None, power_of_two: bool = False) -> None:
    """Fills codes (M, N), contiguous or the transpose of that, and scale, N values."""
    M, N = x.shape
    if x.numel() == 0:
        scale.zero_()
        return
    block_m, block_n = tile_shape(M, N, codes.stride(1) == 1)
    strips, bands = cdiv(N, block_n), cdiv(M, block_m)
    partials = min(bands, max(1, 2 * _PARTIALS // strips), _PARTIALS_OF_COLUMN)
    partial = x.new_empty(partials, N, dtype=torch.int32)
    _launch_partial_amax(x, partial, N, partials * strips, (block_m, block_n))
    launch_known(x, partial, codes, scale, seed, power_of_two)


def launch_matrix(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    seed: Tensor | None,
    power_of_two: bool = False,
    amax: Tensor | None = None,
) -> None:
    """Fills codes (M, N), contiguous or the transpose of that, and scale, one value.

    amax (1, 1) takes the amax, if it is given.
    """
    M, N = x.shape
    if x.numel() == 0:
        for value in (scale,) if amax is None else (scale, amax):
            value.zero_()
        return
    block_m, block_n = tile_shape(M, N, codes.stride(1) == 1)
    partials = min(cdiv(N, block_n) * cdiv(M, block_m), _PARTIALS)
    partial = x.new_empty(partials, dtype=torch.int32)
    _launch_partial_amax(x, partial, 0, partials, (block_m, block_n))
    launch_known(x, partial, codes, scale, seed, power_of_two, amax)


def _launch_partial_amax(x: Tensor, partial: Tensor, stride_partial: int, programs: int, tile: tuple[int, int]) -> None:
    launch(
        _partial_amax_kernel,
        programs,
        (x, partial),
        (*x.shape, *x.stride(), stride_partial),
        BLOCK_M=tile[0],
        BLOCK_N=tile[1],
        num_warps=_WARPS,
    )


def launch_known(
    x: Tensor,
    partial: Tensor,
    codes: Tensor,
    scale: Tensor,
    seed: Tensor | None,
    power_of_two: bool,
    amax: Tensor | None = None,
) -> None:
    """Fills what `launch_matrix` does; partial: bits of amax, int32, or float32; (P,), or (P, N) by column."""
    M, N = x.shape
    block_m, block_n = tile_shape(M, N, codes.stride(1) == 1)
    strips, bands = cdiv(N, block_n), cdiv(M, block_m)
    element, words = ELEMENT_TYPES[codes.dtype], 4 if takes_words(x, codes) else 1
    written = codes.t().view(torch.int32).t() if words == 4 else codes
    launch(
        _quantize_tile_kernel,
        strips * min(bands, cdiv(_PROGRAMS, strips)),
        (x, partial, written, scale, amax, seed),
        (*written.shape, len(partial), *x.stride(), *written.stride(), N if partial.ndim == 2 else 0),
        element_type=_TRITON_TYPES[codes.dtype],
        LARGEST=element.largest,
        SMALLEST_AMAX=element.smallest_amax,
        POWER_OF_TWO=power_of_two,
        BLOCK_M=block_m // words,
        BLOCK_N=block_n,
        ROWS=words,
        PTX=has_ptx(x.device),
        num_warps=_WARPS,
        enable_fp_fusion=False,  # the product is rounded before it is rounded to a code
    )


def takes_words(x: Tensor, codes: Tensor) -> bool:
    """Whether rows of x lie contiguous, columns of codes do, and those are a whole number of words."""
    M = codes.shape[0]
    return x.stride(1) == 1 and codes.stride() == (1, M) and M % 4 == 0


def tile_shape(M: int, N: int, rows_contiguous: bool) -> tuple[int, int]:
    """_TILE values, _TILE_SIDE of them along the rows of the codes; less of a side that is shorter."""
    side = _TILE_SIDE if rows_contiguous else _TILE // _TILE_SIDE
    block_n = min(side, next_power_of_2(N))
    block_m = min(_TILE // block_n, next_power_of_2(M))
    return block_m, min(_TILE // block_m, next_power_of_2(N))
