"""The scaled product on Hopper: programs that stay, tiles that the bulk copy engine (TMA) brings and takes away.

One or two programs for each multiprocessor take every so many-th tile. TMA wants bases and rows at multiples of 16
bytes, and 8-bit matrix units want both operands contiguous along K; all else is `scaled_mm_tile.py`, which gives the
same bits for int8.

Triton lets fp8 products run on while the next ones are issued, but waits for int8 products
(`dotCanBeProperlyAsync` in its WGMMAPipeline.cpp wants float32 sums): two programs on a multiprocessor fill those gaps.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from lq_kernels._launch import cdiv, launch
from lq_kernels._triton import HAS_TRITON, device_limits, tl, triton
from lq_kernels.scaled_mm_tile import is_hopper, scale_strides, scaled, swizzled

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def _scaled_mm_tma_kernel(
    a_desc,
    b_desc,
    out_desc,
    scale_a_ptr,
    scale_b_ptr,
    bias_ptr,
    M,
    N,
    K,
    stride_scale_a: tl.constexpr,
    stride_scale_b: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
    IN_UNITS: tl.constexpr,
):
    """a (M, K), b (N, K); the result leaves in PARTS column ranges of a tile, which need less shared memory each.

    FLATTEN: the first copies of a tile are in flight while the result of the one before it is written. IN_UNITS: how
    many products of fp8 the matrix units add up before float32 does; None: all.
    """
    SUM: tl.constexpr = tl.int32 if a_desc.dtype == tl.int8 else tl.float32
    PART: tl.constexpr = BLOCK_N // PARTS
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = swizzled(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
        total = tl.zeros([BLOCK_M, BLOCK_N], SUM)
        for k in range(0, K, BLOCK_K):
            a = a_desc.load([m, k])
            b = b_desc.load([n, k])
            total = tl.dot(a, b.T, total, max_num_imprecise_acc=IN_UNITS, out_dtype=SUM)
        row = m + tl.arange(0, BLOCK_M)
        column = n + tl.arange(0, PART)
        if PARTS == 1:
            out = scaled(total, row, column, M, N, scale_a_ptr, scale_b_ptr, bias_ptr, stride_scale_a, stride_scale_b)
            out_desc.store([m, n], out.to(out_desc.dtype))
        else:
            first, second = tl.split(tl.permute(tl.reshape(total, [BLOCK_M, 2, PART]), (0, 2, 1)))
            out = scaled(first, row, column, M, N, scale_a_ptr, scale_b_ptr, bias_ptr, stride_scale_a, stride_scale_b)
            out_desc.store([m, n], out.to(out_desc.dtype))
            column += PART
            out = scaled(second, row, column, M, N, scale_a_ptr, scale_b_ptr, bias_ptr, stride_scale_a, stride_scale_b)
            out_desc.store([m, n + PART], out.to(out_desc.dtype))


@dataclass(frozen=True)
class TmaTile:
    """m, n, k: a step; parts: of a result of 2 bytes; programs: on one multiprocessor.

    Times in microseconds on an H200: `step` along K with all programs of a multiprocessor running, `alone` with one,
    `rest` of a tile.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    parts: int
    flatten: bool
    programs: int
    step: float
    alone: float
    rest: float

    def parts_of(self, out: torch.dtype) -> int:
        return max(self.parts, out.itemsize // 2)

    def shared_memory(self, out: torch.dtype) -> int:
        result = self.m * self.n * out.itemsize // self.parts_of(out)
        return (self.m + self.n) * self.k * self.stages + result + _BARRIERS_AND_SCALES

    def time(self, M: int, N: int, K: int, multiprocessors: int) -> float:
        steps, tiles = -(-K // self.k), -(-M // self.m) * -(-N // self.n)
        full, left = divmod(-(-tiles // multiprocessors), self.programs)
        return full * (steps * self.step + self.rest) + (steps * self.alone + self.rest if left else 0.0)


_BARRIERS_AND_SCALES = 1100  # bytes

# Times fitted on an H200 with torch 2.11 and Triton 3.6 to nine products from (512, 4096, 4096) to (8192, 8192, 8192);
# `alone`, where no product of them shows it, is `step`.
_WIDE = partial(TmaTile, 128, 256, 128, warps=8, stages=3, parts=1, flatten=True, programs=1)
_PAIR = partial(TmaTile, 128, 128, 128, warps=4, stages=3, parts=2, flatten=True, programs=2)
_PAIR_OF_8_WARPS = partial(TmaTile, 128, 128, 128, warps=8, stages=3, parts=2, flatten=True, programs=2)
_LOW_PAIR = partial(TmaTile, 64, 128, 128, warps=4, stages=3, parts=1, flatten=True, programs=2)
_DEEP = partial(TmaTile, 128, 128, 256, warps=8, stages=3, parts=1, flatten=True, programs=1)

INT8_TILES = (
    _PAIR(step=0.72, alone=0.85, rest=2.88),
    _PAIR_OF_8_WARPS(step=0.79, alone=0.84, rest=1.92),
    _LOW_PAIR(step=0.6, alone=0.6, rest=0.3),
)
FP8_TILES = (
    _WIDE(step=0.73, alone=0.73, rest=3.4),
    _PAIR(step=0.785, alone=0.76, rest=1.44),
    _LOW_PAIR(step=0.56, alone=0.56, rest=0.56),
)
# Two sums for each value of the result take twice the registers. Adding one to the other every 256 products in place of
# 128 is 22 % faster, and of 16384 products 1.0e-4 off in place of 0.65e-4; without a second sum it is 4e-2.
PRECISE_TILES = (_DEEP(step=0.83, alone=0.83, rest=2.8), _LOW_PAIR(step=0.59, alone=0.59, rest=0.8))

_SMALLEST_SIDE = 64  # of a result: below it most of a tile would be empty


def tma_tile_for(a: Tensor, b: Tensor, out: Tensor, precise: bool) -> TmaTile | None:
    """The tile with which this product takes the least time, or None where it cannot or should not go this way."""
    if not is_hopper(a.device):
        return None
    (M, K), N = a.shape, b.shape[1]
    a_rows, a_along_k = a.stride()
    b_along_k, b_rows = b.stride()
    pointers = a.data_ptr() | b.data_ptr()
    if not (a_along_k == b_along_k == 1 and a_rows >= K > 0 and b_rows >= K and min(M, N) >= _SMALLEST_SIDE):
        return None
    if (pointers | a_rows | b_rows | N * out.itemsize) % 16 != 0:
        return None
    tiles = INT8_TILES if a.dtype == torch.int8 else PRECISE_TILES if precise else FP8_TILES
    return _fastest(M, N, K, tiles, device_limits(a.device).multiprocessors)


@lru_cache(maxsize=4096)
def _fastest(M: int, N: int, K: int, tiles: tuple[TmaTile, ...], multiprocessors: int) -> TmaTile:
    return min(tiles, key=lambda tile: tile.time(M, N, K, multiprocessors))


def launch_tma(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor | None,
    scale_b: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    precise: bool,
    tile: TmaTile,
) -> None:
    """Fills out (M, N), contiguous; without scales with the sums."""
    M, N = out.shape
    parts = tile.parts_of(out.dtype)
    limits = device_limits(a.device)
    resident = min(tile.programs, limits.shared_memory // tile.shared_memory(out.dtype)) or 1
    tiles = cdiv(M, tile.m) * cdiv(N, tile.n)
    launch(
        _scaled_mm_tma_kernel,
        min(tiles, resident * limits.multiprocessors),
        (
            _descriptor(a, tile.m, tile.k),
            _descriptor(b.t(), tile.n, tile.k),
            _descriptor(out, tile.m, tile.n // parts),
            scale_a,
            scale_b,
            bias,
        ),
        (M, N, a.shape[1]),
        **scale_strides(scale_a, scale_b),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        GROUP_M=8,
        PARTS=parts,
        FLATTEN=tile.flatten,
        IN_UNITS=tile.k if precise else None,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,  # each product and the sum are rounded, as in the reference
    )


def _descriptor(x: Tensor, rows: int, columns: int) -> Any:
    """A TensorDescriptor without the checks of its constructor, 2 of the 12 us of a launch each: they were made."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.base = x
    descriptor.shape = list(x.shape)
    descriptor.strides = list(x.stride())
    descriptor.block_shape = [rows, columns]
    return descriptor
