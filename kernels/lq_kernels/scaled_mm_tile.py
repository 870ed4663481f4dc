"""The scaled product for every GPU, every stride and every size: one tile of the result for each program."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lq_kernels._launch import launch
from lq_kernels._triton import device_limits, tl, triton


@triton.jit
def swizzled(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of a tile: GROUP_M rows of tiles are done together, so that their operands stay in the L2."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = tile // (GROUP_M * tiles_n) * GROUP_M
    group = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + tile % (GROUP_M * tiles_n) % group, tile % (GROUP_M * tiles_n) // group


@triton.jit
def scaled(
    total,
    row,
    column,
    M,
    N,
    scale_a_ptr,
    scale_b_ptr,
    bias_ptr,
    stride_scale_a: tl.constexpr,
    stride_scale_b: tl.constexpr,
):
    """total * scale_a * scale_b + bias in float32, each step rounded; without scales total as it is.

    A scale whose stride is 0 is one value: read as a vector, it would take registers that a second program needs.
    """
    if scale_a_ptr is None:
        out = total
    else:
        out = total.to(tl.float32)
        if stride_scale_a == 0:
            out *= tl.load(scale_a_ptr)
        else:
            out *= tl.load(scale_a_ptr + row.to(tl.int64) * stride_scale_a, mask=row < M, other=0.0)[:, None]
        if stride_scale_b == 0:
            out *= tl.load(scale_b_ptr)
        else:
            out *= tl.load(scale_b_ptr + column.to(tl.int64) * stride_scale_b, mask=column < N, other=0.0)[None, :]
        if bias_ptr is not None:
            out += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    return out


@triton.heuristics({"EVEN_K": lambda args: args["K"] % args["BLOCK_K"] == 0})
@triton.jit
def _scaled_mm_kernel(
    a_ptr,
    b_ptr,
    scale_a_ptr,
    scale_b_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
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
    IN_UNITS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """IN_UNITS: how many products of fp8 the matrix units add up before float32 does; None: all."""
    tile_m, tile_n = swizzled(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    # int64: row * stride passes 2^31 at 1M tokens x 4096
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    step = tl.full([], BLOCK_K, tl.int64)
    rows, columns = (row < M)[:, None], (column < N)[None, :]
    a_ptr += row[:, None] * stride_am + k[None, :] * stride_ak
    b_ptr += k[:, None] * stride_bk + column[None, :] * stride_bn

    SUM: tl.constexpr = tl.int32 if a_ptr.dtype.element_ty == tl.int8 else tl.float32
    total = tl.zeros([BLOCK_M, BLOCK_N], SUM)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptr, mask=rows, other=0.0)
            b = tl.load(b_ptr, mask=columns, other=0.0)
        else:
            a = tl.load(a_ptr, mask=rows & (start + k < K)[None, :], other=0.0)
            b = tl.load(b_ptr, mask=columns & (start + k < K)[:, None], other=0.0)
        total = tl.dot(a, b, total, max_num_imprecise_acc=IN_UNITS, out_dtype=SUM)
        a_ptr += step * stride_ak
        b_ptr += step * stride_bk

    out = scaled(total, row, column, M, N, scale_a_ptr, scale_b_ptr, bias_ptr, stride_scale_a, stride_scale_b)
    out_ptr += row[:, None] * N + column[None, :]
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), mask=rows & columns)


@dataclass(frozen=True)
class Tile:
    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def shared_memory(self) -> int:
        return (self.m + self.n) * self.k * self.stages

    def count(self, M: int, N: int) -> int:
        return -(-M // self.m) * -(-N // self.n)


# On an H200 the first is 5 to 16 % faster than 128 x 256 with 8 warps and 3 stages, at K from 768 to 8192: two programs
# share a multiprocessor, and one multiplies while the other loads or writes its result.
HOPPER_TILES = (
    Tile(128, 128, 128, warps=4, stages=3),
    Tile(128, 128, 64, warps=4, stages=3),
    Tile(64, 128, 64, warps=4, stages=4),
    Tile(32, 64, 64, warps=4, stages=4),
)

# Elsewhere, and with two sums for each value of the result, 4 warps have too few registers for the largest.
TILES = (Tile(128, 128, 128, warps=8, stages=3), Tile(128, 128, 64, warps=8, stages=3), *HOPPER_TILES[2:])


def tile_for(a: Tensor, b: Tensor, precise: bool) -> Tile:
    """The largest that fits into shared memory and gives half of the multiprocessors work, else the smallest.

    Operands that are not aligned to 16 bytes go through registers on their way to shared memory, and rows of a result
    that are not are written value by value: the large tiles would spill.
    """
    limits = device_limits(a.device)
    tiles = HOPPER_TILES if is_hopper(a.device) and not precise else TILES
    M, N = a.shape[0], b.shape[1]
    for tile in tiles if _aligned(a) and _aligned(b) and N % 8 == 0 else tiles[-2:]:
        fills = 2 * tile.count(M, N) >= limits.multiprocessors
        if fills and tile.shared_memory <= limits.shared_memory:
            return tile
    return tiles[-1]


def is_hopper(device: torch.device) -> bool:
    return device.type != "cpu" and _is_hopper(triton.runtime.driver.active, device.index or 0)


@cache
def _is_hopper(driver: Any, index: int) -> bool:
    target = driver.get_current_target()
    return target.backend == "cuda" and target.arch == 90


def _aligned(x: Tensor) -> bool:
    """Whether one dimension is contiguous and lines of it start and end at multiples of 16 bytes."""
    inner = 1 if x.stride(1) == 1 else 0
    sizes = (x.data_ptr(), x.shape[inner], x.stride(1 - inner))
    return x.stride(inner) == 1 and all(size % 16 == 0 for size in sizes)


def launch_tiles(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor | None,
    scale_b: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    precise: bool,
    tile: Tile,
) -> None:
    """Fills out (M, N), contiguous; without scales with the sums."""
    M, N = out.shape
    launch(
        _scaled_mm_kernel,
        tile.count(M, N),
        (a, b, scale_a, scale_b, bias, out),
        (M, N, a.shape[1], *a.stride(), *b.stride()),
        **scale_strides(scale_a, scale_b),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        GROUP_M=8,
        IN_UNITS=tile.k if precise else None,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,  # each product and the sum are rounded, as in the reference
    )


def scale_strides(scale_a: Tensor | None, scale_b: Tensor | None) -> dict[str, int]:
    """From row to row of a and from column to column of b: 0 where one scale serves all."""
    if scale_a is None or scale_b is None:
        return {"stride_scale_a": 0, "stride_scale_b": 0}
    return {
        "stride_scale_a": scale_a.stride(0) if scale_a.shape[0] > 1 else 0,
        "stride_scale_b": scale_b.stride(1) if scale_b.shape[1] > 1 else 0,
    }
