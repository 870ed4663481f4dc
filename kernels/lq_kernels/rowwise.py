"""int8 quantisation with one scale for a row, a column or a whole matrix: x = codes * scale.

    amax  = max(|x|) over what shares the scale          (float32)
    scale = amax / 127
    codes = round_half_to_even(x * (127 / amax))         (product and quotient rounded to float32)

Source: LLM.int8(), section 3.1, https://arxiv.org/abs/2208.07339; the transposed forms: SwitchBack, section 2,
https://arxiv.org/abs/2304.13013. bitsandbytes returns amax where this returns amax / 127.

Every op takes x (M, N) float32, bfloat16 or float16 with any strides and any size, 0 included. What shares a scale is
  * all zeros, or with an amax below SMALLEST_AMAX: codes 0, scale 0;
  * not finite somewhere: codes 0, and the scale is NaN or infinite, so that codes * scale is NaN and the loss shows it.
Both backends give the same bits: the maximum does not depend on the order, and the quotients are IEEE divisions.
"""

import torch
from torch import Tensor

from lq_kernels._op import op
from lq_kernels._triton import tl, triton
from lq_kernels.rounding import int8_nearest

INT8_MAX = 127.0  # symmetric: -128 is never used

# From here 127 / amax is finite, amax / 127 is a normal number, and subnormal values of x get the code 0 whether or
# not a device flushes them to zero.
SMALLEST_AMAX = 2.0**-118

_INT8_MAX = tl.constexpr(INT8_MAX)
_SMALLEST_AMAX = tl.constexpr(SMALLEST_AMAX)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@op
def quantize_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) float -> codes (M, K) int8 in [-127, 127], scale (M, 1) float32."""
    _check(x, "quantize_rowwise")
    return _quantize(x, x.abs().amax(dim=1, keepdim=True) if x.shape[1] else x.new_zeros(x.shape[0], 1))


@quantize_rowwise.fake
def _quantize_rowwise_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    _check(x, "quantize_rowwise")
    return _empty(x.shape[0], x.shape[1], scales=x.shape[0], like=x)


@op
def quantize_columnwise_transposed(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, N) float -> codes (N, M) int8, contiguous, scale (N, 1) float32: `quantize_rowwise(x.t())`."""
    _check(x, "quantize_columnwise_transposed")
    return quantize_rowwise.reference(x.t())


@quantize_columnwise_transposed.fake
def _quantize_columnwise_transposed_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    _check(x, "quantize_columnwise_transposed")
    return _empty(x.shape[1], x.shape[0], scales=x.shape[1], like=x)


@op
def quantize_tensorwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, N) float -> codes (M, N) int8 in [-127, 127], scale (1, 1) float32."""
    _check(x, "quantize_tensorwise")
    return _quantize(x, x.abs().amax().view(1, 1) if x.numel() else x.new_zeros(1, 1))


@quantize_tensorwise.fake
def _quantize_tensorwise_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    _check(x, "quantize_tensorwise")
    return _empty(x.shape[0], x.shape[1], scales=1, like=x)


@op
def quantize_tensorwise_transposed(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, N) float -> codes (N, M) int8, contiguous, scale (1, 1) float32: `quantize_tensorwise(x.t())`."""
    _check(x, "quantize_tensorwise_transposed")
    return quantize_tensorwise.reference(x.t())


@quantize_tensorwise_transposed.fake
def _quantize_tensorwise_transposed_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    _check(x, "quantize_tensorwise_transposed")
    return _empty(x.shape[1], x.shape[0], scales=1, like=x)


def _quantize(x: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """codes and scale from the amax, which has a size of 1 in each dimension that shares a scale."""
    amax = amax.float()
    amax = torch.where(amax < SMALLEST_AMAX, 0.0, amax)
    quantizable = (amax > 0) & amax.isfinite()
    # full_like: torch computes `number / tensor` as reciprocal times number, which rounds twice.
    factor = torch.where(quantizable, torch.full_like(amax, INT8_MAX) / amax, 0.0)
    codes = torch.where(quantizable, (x.float() * factor).round_(), 0.0)
    return codes.to(torch.int8, memory_format=torch.contiguous_format), amax / INT8_MAX


def _empty(rows: int, columns: int, scales: int, like: Tensor) -> tuple[Tensor, Tensor]:
    return like.new_empty(rows, columns, dtype=torch.int8), like.new_empty(scales, 1, dtype=torch.float32)


def _check(x: Tensor, name: str) -> None:
    if x.ndim != 2:
        raise ValueError(f"{name} takes a matrix, got shape {tuple(x.shape)}: flatten it, x.reshape(-1, x.shape[-1])")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} takes float32, bfloat16 or float16, got {x.dtype}: cast it, x.float()")


@triton.jit
def _magnitude_bits(x):
    """|x| as the bits of a float32: they order like the values, infinity above those and NaN above infinity."""
    return tl.abs(x.to(tl.float32)).to(tl.int32, bitcast=True)


@triton.jit
def _scales(amax_bits):
    """The bits of amax -> scale, the factor that turns values into codes, and whether there is one."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    amax = tl.where(amax < _SMALLEST_AMAX, 0.0, amax)
    quantizable = (amax > 0) & (amax < float("inf"))
    factor = tl.div_rn(tl.full(amax.shape, _INT8_MAX, tl.float32), tl.where(quantizable, amax, 1.0))
    return tl.div_rn(amax, tl.full(amax.shape, _INT8_MAX, tl.float32)), factor, quantizable


@triton.jit
def _codes(x, factor, quantizable):
    return int8_nearest(tl.where(quantizable, x.to(tl.float32) * factor, 0.0))


@triton.heuristics({"WHOLE_ROW": lambda args: args["K"] <= args["BLOCK_K"]})
@triton.jit
def _rowwise_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    M,
    K,
    stride_xm,
    stride_xk,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
):
    """BLOCK_M rows per program; a row that fits into a tile is read once."""
    # int64: row * stride passes 2^31 at 1M tokens x 4096
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    column = tl.arange(0, BLOCK_K)[None, :].to(tl.int64)
    x_ptr += row * stride_xm
    codes_ptr += row * K
    rows = row < M
    if WHOLE_ROW:
        mask = rows & (column < K)
        x = tl.load(x_ptr + column * stride_xk, mask=mask, other=0.0)
        scale, factor, quantizable = _scales(tl.max(_magnitude_bits(x), axis=1, keep_dims=True))
        tl.store(codes_ptr + column, _codes(x, factor, quantizable), mask=mask)
    else:
        bits = tl.zeros([BLOCK_M, BLOCK_K], tl.int32)
        for start in range(0, K, BLOCK_K):
            mask = rows & (start + column < K)
            x = tl.load(x_ptr + (start + column) * stride_xk, mask=mask, other=0.0)
            bits = tl.maximum(bits, _magnitude_bits(x))
        scale, factor, quantizable = _scales(tl.max(bits, axis=1, keep_dims=True))
        for start in range(0, K, BLOCK_K):
            mask = rows & (start + column < K)
            x = tl.load(x_ptr + (start + column) * stride_xk, mask=mask, other=0.0)
            tl.store(codes_ptr + start + column, _codes(x, factor, quantizable), mask=mask)
    tl.store(scale_ptr + row, scale, mask=rows)


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
        bits = tl.maximum(bits, _magnitude_bits(x))
    if BY_COLUMN:
        column = (program % strips).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        partial_ptr += (program // strips).to(tl.int64) * stride_partial
        tl.store(partial_ptr + column, tl.max(bits, axis=0), mask=column < N)
    else:
        tl.store(partial_ptr + program, tl.max(bits))


@triton.heuristics(
    {
        "BY_COLUMN": lambda args: args["stride_partial"] != 0,
        "PARTIALS": lambda args: triton.next_power_of_2(args["partials"]),
    }
)
@triton.jit
def _quantize_tile_kernel(
    x_ptr,
    partial_ptr,
    codes_ptr,
    scale_ptr,
    M,
    N,
    partials,
    stride_xm,
    stride_xn,
    stride_cm,
    stride_cn,
    stride_partial,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """One tile per program; each reduces the partial amax of its columns, or all of them, for itself."""
    row, column, mask = _tile_offsets(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    partial = tl.arange(0, PARTIALS)
    if BY_COLUMN:
        partial_ptr += partial[:, None] * stride_partial + column
        bits = tl.load(partial_ptr, mask=(partial[:, None] < partials) & (column < N), other=0)
        scale, factor, quantizable = _scales(tl.max(bits, axis=0, keep_dims=True))
        tl.store(scale_ptr + column, scale, mask=(column < N) & (tl.program_id(0) < tl.cdiv(N, BLOCK_N)))
    else:
        bits = tl.load(partial_ptr + partial, mask=partial < partials, other=0)
        scale, factor, quantizable = _scales(tl.max(bits, axis=0, keep_dims=True)[None, :])
        tl.store(scale_ptr + tl.arange(0, 1)[None, :], scale, mask=tl.program_id(0) == 0)
    x = tl.load(x_ptr + row * stride_xm + column * stride_xn, mask=mask, other=0.0)
    tl.store(codes_ptr + row * stride_cm + column * stride_cn, _codes(x, factor, quantizable), mask=mask)


_LONGEST_ROW = 32768  # values that a program keeps in registers
_ROW_TILE = 4096  # values in a tile of short rows, and in one step along a row that is longer than _LONGEST_ROW
_TILE = 8192  # values in a two-dimensional tile
_TILE_SIDE = 128  # along the rows of the codes: a whole cache line
_WARPS = 8  # for a two-dimensional tile
_PARTIALS = 512  # of one matrix: about as many programs as keep a large GPU busy
_PARTIALS_OF_COLUMN = 32


@quantize_rowwise.triton
def _launch_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = _quantize_rowwise_fake(x)
    M, K = x.shape
    if M:
        block_k = triton.next_power_of_2(max(K, 1))
        block_k = block_k if block_k <= _LONGEST_ROW else _ROW_TILE
        block_m = max(1, _ROW_TILE // block_k)
        warps = min(max(4, block_k // 1024), 16)
        _rowwise_kernel[(triton.cdiv(M, block_m),)](
            x,
            codes,
            scale,
            M,
            K,
            *x.stride(),
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            num_warps=warps,
            enable_fp_fusion=False,  # the product is rounded before it is rounded to an integer
        )
    return codes, scale


@quantize_columnwise_transposed.triton
def _launch_columnwise_transposed(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = _quantize_columnwise_transposed_fake(x)
    _launch_tiles(x, codes.t(), scale, by_column=True)
    return codes, scale


@quantize_tensorwise.triton
def _launch_tensorwise(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = _quantize_tensorwise_fake(x)
    _launch_tiles(x, codes, scale, by_column=False)
    return codes, scale


@quantize_tensorwise_transposed.triton
def _launch_tensorwise_transposed(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = _quantize_tensorwise_transposed_fake(x)
    _launch_tiles(x, codes.t(), scale, by_column=False)
    return codes, scale


def _launch_tiles(x: Tensor, codes: Tensor, scale: Tensor, by_column: bool) -> None:
    """Fills codes, of the shape of x, and scale: one launch for the partial amax, one that quantises."""
    if x.numel() == 0:
        scale.zero_()
        return
    M, N = x.shape
    block_m, block_n = tile_shape(M, N, codes.stride(1) == 1)
    strips, bands = triton.cdiv(N, block_n), triton.cdiv(M, block_m)
    if by_column:
        partials = min(bands, max(1, 2 * _PARTIALS // strips), _PARTIALS_OF_COLUMN)
        partial, stride_partial, programs = x.new_empty(partials, N, dtype=torch.int32), N, partials * strips
    else:
        partials = min(bands * strips, _PARTIALS)
        partial, stride_partial, programs = x.new_empty(partials, dtype=torch.int32), 0, partials
    _partial_amax_kernel[(programs,)](
        x, partial, M, N, *x.stride(), stride_partial, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=_WARPS
    )
    _quantize_tile_kernel[(strips * bands,)](
        x,
        partial,
        codes,
        scale,
        M,
        N,
        partials,
        *x.stride(),
        *codes.stride(),
        stride_partial,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )


def tile_shape(M: int, N: int, rows_contiguous: bool) -> tuple[int, int]:
    """_TILE values, _TILE_SIDE of them along the rows of the codes; less of a side that is shorter."""
    side = _TILE_SIDE if rows_contiguous else _TILE // _TILE_SIDE
    block_n = min(side, triton.next_power_of_2(N))
    block_m = min(_TILE // block_n, triton.next_power_of_2(M))
    return block_m, min(_TILE // block_m, triton.next_power_of_2(N))
