"""Quantisation with one scale for each row: a program keeps whole rows in registers and reads them once."""

from torch import Tensor

from lq_kernels._triton import tl, triton
from lq_kernels.element_types import ELEMENT_TYPES, encode, magnitude_bits, scales
from lq_kernels.rounding import random_words

_LONGEST_ROW = 32768  # values that a program keeps in registers
_ROW_TILE = 4096  # values in a tile of short rows, and in one step along a row that is longer than _LONGEST_ROW


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
        scale, factor, quantizable = scales(tl.max(magnitude_bits(x), axis=1, keep_dims=True), LARGEST, SMALLEST_AMAX)
        word = None if seed_ptr is None else random_words(seed, row * K + column, BELOW_32_BITS)
        tl.store(codes_ptr + row * K + column, encode(x, factor, quantizable, word, element_type, LARGEST), mask=mask)
    else:
        bits = tl.zeros([BLOCK_M, BLOCK_K], tl.int32)
        for start in range(0, K, BLOCK_K):
            mask = rows & (start + column < K)
            x = tl.load(x_ptr + (start + column) * stride_xk, mask=mask, other=0.0)
            bits = tl.maximum(bits, magnitude_bits(x))
        scale, factor, quantizable = scales(tl.max(bits, axis=1, keep_dims=True), LARGEST, SMALLEST_AMAX)
        for start in range(0, K, BLOCK_K):
            mask = rows & (start + column < K)
            x = tl.load(x_ptr + (start + column) * stride_xk, mask=mask, other=0.0)
            index = row * K + start + column
            word = None if seed_ptr is None else random_words(seed, index, BELOW_32_BITS)
            tl.store(codes_ptr + index, encode(x, factor, quantizable, word, element_type, LARGEST), mask=mask)
    tl.store(scale_ptr + row, scale, mask=rows)


def launch_rows(x: Tensor, codes: Tensor, scale: Tensor, seed: Tensor | None) -> None:
    """Fills codes (M, K), contiguous, and scale (M, 1)."""
    M, K = x.shape
    if M == 0:
        return
    element = ELEMENT_TYPES[codes.dtype]
    block_k = triton.next_power_of_2(max(K, 1))
    block_k = block_k if block_k <= _LONGEST_ROW else _ROW_TILE
    block_m = max(1, _ROW_TILE // block_k)
    _rowwise_kernel[(triton.cdiv(M, block_m),)](
        x,
        codes,
        scale,
        seed,
        M,
        K,
        *x.stride(),
        LARGEST=element.largest,
        SMALLEST_AMAX=element.smallest_amax,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=min(max(4, block_k // 1024), 16),
        enable_fp_fusion=False,  # the product is rounded before it is rounded to a code
    )
