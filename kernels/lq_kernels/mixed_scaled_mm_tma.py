"""The product of LLM.int8() on Hopper: `scaled_mm_tma.py` with the outlier columns of a 16-bit x added to each tile.

A first kernel puts the outlier columns of x and of the weight, in the type of x, next to each other: gathered again by
every tile they took a third of its time. The first of them are loaded before the int8 loop of a tile. Outliers that
find no room, beyond _LIMIT, are gathered and added one by one.
"""

import torch
from torch import Tensor

from lq_kernels._triton import device_limits, tl, triton
from lq_kernels.mixed_scaled_mm_tile import OUTLIERS
from lq_kernels.scaled_mm_tile import scale_strides, scaled, swizzled
from lq_kernels.scaled_mm_tma import INT8_TILES, TmaTile, _descriptor, tma_tile_for


@triton.jit
def _outlier_columns_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    columns_ptr,
    count_ptr,
    near_x_ptr,
    near_weight_ptr,
    M,
    N,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_scale,
    stride_near_x,
    stride_near_w,
    ROWS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """near_x (LIMIT / OUTLIERS, M or more, OUTLIERS) and near_weight, as far as there are outliers; then zeros."""
    programs_of_x = tl.cdiv(M, ROWS)
    count = tl.load(count_ptr)
    for first in range(0, tl.minimum(count, LIMIT), OUTLIERS):
        lane = tl.arange(0, OUTLIERS)[None, :]
        k = tl.load(columns_ptr + first + lane, mask=first + lane < count, other=0).to(tl.int64)
        # int64: row * stride passes 2^31 at 1M tokens x 4096
        if tl.program_id(0) < programs_of_x:
            row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
            mask = (row < M) & (first + lane < count)
            x = tl.load(x_ptr + row * stride_xm + k * stride_xk, mask=mask, other=0.0)
            tl.store(near_x_ptr + tl.cast(first, tl.int64) * stride_near_x + row * OUTLIERS + lane, x, mask=row < M)
        else:
            row = (tl.program_id(0) - programs_of_x).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
            mask = (row < N) & (first + lane < count)
            codes = tl.load(weight_ptr + row * stride_wn + k, mask=mask, other=0).to(tl.float32)
            weight = codes * tl.load(scale_ptr + row * stride_scale, mask=row < N, other=0.0)
            near_w_ptr = near_weight_ptr + tl.cast(first, tl.int64) * stride_near_w + row * OUTLIERS + lane
            tl.store(near_w_ptr, weight.to(near_weight_ptr.dtype.element_ty), mask=row < N)


@triton.jit
def _add_far_outlier(
    out, k, x_ptr, weight_ptr, scale_ptr, rows, columns, stride_xm, stride_xk, stride_wn, stride_scale
):
    """out + column k of x times that of the weight; the pointers are to the first row of the tile."""
    row, column = tl.arange(0, out.shape[0]), tl.arange(0, out.shape[1])
    x = tl.load(x_ptr + k.to(tl.int64) * stride_xk + row.to(tl.int64) * stride_xm, mask=row < rows, other=0.0)
    codes = tl.load(weight_ptr + k + column.to(tl.int64) * stride_wn, mask=column < columns, other=0)
    scale = tl.load(scale_ptr + column.to(tl.int64) * stride_scale, mask=column < columns, other=0.0)
    weight = (codes.to(tl.float32) * scale).to(x.dtype).to(tl.float32)
    return out + x.to(tl.float32)[:, None] * weight[None, :]


@triton.jit
def _halves(x):
    """The left and the right columns."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def _store_halves(desc, m, n, x):
    left, right = _halves(x)
    desc.store([m, n], left.to(desc.dtype))
    desc.store([m, n + x.shape[1] // 2], right.to(desc.dtype))


@triton.jit
def _mixed_scaled_mm_tma_kernel(
    a_desc,
    b_desc,
    out_desc,
    near_x_ptr,
    near_weight_ptr,
    x_ptr,
    weight_ptr,
    columns_ptr,
    count_ptr,
    scale_a_ptr,
    scale_b_ptr,
    bias_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_scale_a: tl.constexpr,
    stride_scale_b: tl.constexpr,
    stride_near_x,
    stride_near_w,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    OUTLIERS: tl.constexpr,
    LIMIT: tl.constexpr,
    PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """a (M, K), b (N, K), x (M, K), weight the same as b; the result leaves in 2 or 4 column ranges of a tile."""
    count = tl.load(count_ptr)
    near = tl.minimum(count, LIMIT)
    near_x = tl.arange(0, BLOCK_M)[:, None] * OUTLIERS + tl.arange(0, OUTLIERS)[None, :]
    near_w = tl.arange(0, BLOCK_N)[None, :] * OUTLIERS + tl.arange(0, OUTLIERS)[:, None]
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = swizzled(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
        x = tl.load(near_x_ptr + m.to(tl.int64) * OUTLIERS + near_x, mask=near > 0, other=0.0)
        weight = tl.load(near_weight_ptr + n.to(tl.int64) * OUTLIERS + near_w, mask=near > 0, other=0.0)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for k in range(0, K, BLOCK_K):
            a = a_desc.load([m, k])
            b = b_desc.load([n, k])
            total = tl.dot(a, b.T, total, out_dtype=tl.int32)
        row, column = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        out = scaled(total, row, column, M, N, scale_a_ptr, scale_b_ptr, bias_ptr, stride_scale_a, stride_scale_b)
        first = tl.full([], 0, tl.int64)
        while first < near:
            out = tl.dot(x, weight, out)
            first += OUTLIERS
            next_x = near_x_ptr + first * stride_near_x + m.to(tl.int64) * OUTLIERS
            next_w = near_weight_ptr + first * stride_near_w + n.to(tl.int64) * OUTLIERS
            x = tl.load(next_x + near_x, mask=first < near, other=0.0)
            weight = tl.load(next_w + near_w, mask=first < near, other=0.0)
        while first < count:
            out = _add_far_outlier(
                out,
                tl.load(columns_ptr + first),
                x_ptr + m.to(tl.int64) * stride_xm,
                weight_ptr + n.to(tl.int64) * stride_wn,
                scale_b_ptr + n.to(tl.int64) * stride_scale_b,
                M - m,
                N - n,
                stride_xm,
                stride_xk,
                stride_wn,
                stride_scale_b,
            )
            first += 1
        if PARTS == 2:
            _store_halves(out_desc, m, n, out)
        else:
            left, right = _halves(out)
            _store_halves(out_desc, m, n, left)
            _store_halves(out_desc, m, n + BLOCK_N // 2, right)


TILES = tuple(tile for tile in INT8_TILES if tile.warps == 4)  # the others would spill

_LIMIT = 256  # outliers that have room
_ROWS = 64  # of a program that gathers outlier columns


def mixed_tile_for(x: Tensor, codes: Tensor, weight_codes: Tensor, out: Tensor) -> TmaTile | None:
    """As `tma_tile_for`; None for a float32 x, whose outliers do not go through matrix units."""
    tile = None if x.dtype == torch.float32 else tma_tile_for(codes, weight_codes.t(), out, precise=False)
    return tile if tile is None or tile in TILES else TILES[0]


def launch_mixed_tma(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    columns: Tensor,
    count: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tile: TmaTile,
) -> None:
    """Fills out (M, N), contiguous; codes and weight_codes are such that `mixed_tile_for` gave a tile."""
    (M, K), N = x.shape, len(weight_codes)
    tiles_m, tiles_n = triton.cdiv(M, tile.m), triton.cdiv(N, tile.n)
    # Whole tiles: what lies beyond M and N is read, and meets nothing but what is not written.
    near_x = x.new_empty(_LIMIT // OUTLIERS, tiles_m * tile.m, OUTLIERS)
    near_weight = x.new_empty(_LIMIT // OUTLIERS, tiles_n * tile.n, OUTLIERS)
    stride_scale_a, stride_scale_b = scale_strides(scale, weight_scale.t()).values()
    _outlier_columns_kernel[(triton.cdiv(M, _ROWS) + triton.cdiv(N, _ROWS),)](
        x,
        weight_codes,
        weight_scale,
        columns,
        count,
        near_x,
        near_weight,
        M,
        N,
        *x.stride(),
        weight_codes.stride(0),
        stride_scale_b,
        near_x.shape[1],
        near_weight.shape[1],
        ROWS=_ROWS,
        OUTLIERS=OUTLIERS,
        LIMIT=_LIMIT,
        enable_fp_fusion=False,
    )
    # Where loops are flattened int8 operands keep their place, and the outliers need more: the result gets less.
    parts = max(2, tile.parts_of(out.dtype) * (2 if tile.flatten else 1))
    limits = device_limits(x.device)
    resident = min(tile.programs, limits.shared_memory // _shared_memory(tile, out.dtype, parts)) or 1
    _mixed_scaled_mm_tma_kernel[(min(tiles_m * tiles_n, resident * limits.multiprocessors),)](
        _descriptor(codes, tile.m, tile.k),
        _descriptor(weight_codes, tile.n, tile.k),
        _descriptor(out, tile.m, tile.n // parts),
        near_x,
        near_weight,
        x,
        weight_codes,
        columns,
        count,
        scale,
        weight_scale,
        bias,
        M,
        N,
        K,
        *x.stride(),
        weight_codes.stride(0),
        stride_scale_a,
        stride_scale_b,
        near_x.shape[1],
        near_weight.shape[1],
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        GROUP_M=8,
        OUTLIERS=OUTLIERS,
        LIMIT=_LIMIT,
        PARTS=parts,
        FLATTEN=tile.flatten,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,  # each product and the sum are rounded, as in the reference
    )


def _shared_memory(tile: TmaTile, out: torch.dtype, parts: int) -> int:
    """Of a tile whose result leaves in `parts`, and of the outliers beside it."""
    result = tile.m * tile.n * out.itemsize
    return tile.shared_memory(out) - result // tile.parts_of(out) + result // parts + 2 * OUTLIERS * (tile.m + tile.n)
