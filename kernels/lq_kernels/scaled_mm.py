"""int8 matrix product with the scales and the bias applied to the int32 sums: out = codes_a @ codes_b * scales + bias.

Source of the epilogue: SwitchBack, https://arxiv.org/abs/2304.13013, section 2; here it is one kernel without split K,
so that the bias is added once and a result never depends on the order in which programs finish.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lq_kernels._op import op
from lq_kernels._triton import device_limits, tl, triton

LARGEST_K = 131_071  # sums of more products of -128 and -128 can leave int32

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@op
def scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """a (M, K) int8 @ b (K, N) int8 -> (M, N) in `out_dtype`: float32(a @ b) * scale_a * scale_b + bias.

    scale_a (M, 1) or (1, 1), scale_b (1, N) or (1, 1), float32; bias (N,) float32, bfloat16, float16 or None;
    out_dtype float32, bfloat16 or float16. a and b may have any strides; matrix units want rows of a and columns of b
    contiguous (b = codes.t()). a @ b is exact in int32, the rest is float32, rounded once to out_dtype. Any size up to
    K = LARGEST_K, 0 included: without K the result is the bias, or zeros.
    """
    _check(a, b, scale_a, scale_b, bias, out_dtype)
    out = _exact_mm(a, b).float() * scale_a * scale_b
    return (out if bias is None else out + bias.float()).to(out_dtype)


@scaled_mm.fake
def _scaled_mm_fake(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    _check(a, b, scale_a, scale_b, bias, out_dtype)
    return a.new_empty(a.shape[0], b.shape[1], dtype=out_dtype)


def _exact_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in int32."""
    # torch 2.13's _int_mm is wrong for expanded operands, and where a side of 1 leaves its strides ambiguous.
    if _int_mm_is_exact() and 1 not in (*a.shape, *b.shape):
        return torch._int_mm(a.contiguous(), b if b.t().is_contiguous() else b.contiguous())
    out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], _EXACT_IN_FLOAT32):
        k = slice(start, start + _EXACT_IN_FLOAT32)
        out += (a[:, k].float() @ b[k].float()).int()
    return out


_EXACT_IN_FLOAT32 = 1024  # 1024 products of -128 and -128 add up to 2^24: every partial sum is a float32


@cache
def _int_mm_is_exact() -> bool:
    """Whether this CPU adds int8 products without saturation; those before VNNI add pairs of them in int16."""
    extremes = torch.tensor([127, -128, 127, 127, -128, -128, 127, -128], dtype=torch.int8)
    for rows in (1, 64):
        a = extremes.repeat(rows, 32)
        for b in (a, torch.full_like(a, 127), torch.full_like(a, -128)):
            if not torch.equal(torch._int_mm(a, b.t()), (a.long() @ b.t().long()).int()):
                return False
    return True


def _check(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"scaled_mm takes a (M, K) and b (K, N), got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise TypeError(
            f"scaled_mm takes int8 codes, got {a.dtype} and {b.dtype}: quantize them with lq_kernels.rowwise"
        )
    devices = {x.device for x in (a, b, scale_a, scale_b, bias) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"scaled_mm takes tensors of one device, got {sorted(map(str, devices))}: move them to one")
    if a.shape[1] > LARGEST_K:
        raise ValueError(f"scaled_mm sums at most {LARGEST_K} products in int32, got K = {a.shape[1]}: split K")
    _check_scale("scale_a", scale_a, (a.shape[0], 1))
    _check_scale("scale_b", scale_b, (1, b.shape[1]))
    if bias is not None and (bias.shape != (b.shape[1],) or bias.dtype not in _FLOATS):
        raise ValueError(
            f"scaled_mm takes a bias of shape {(b.shape[1],)}, float32, bfloat16 or float16, "
            f"got {tuple(bias.shape)} {bias.dtype}"
        )
    if out_dtype not in _FLOATS:
        raise TypeError(f"scaled_mm returns float32, bfloat16 or float16, not {out_dtype}")


def _check_scale(name: str, scale: Tensor, shape: tuple[int, int]) -> None:
    if scale.dtype != torch.float32 or scale.ndim != 2 or tuple(scale.shape) not in (shape, (1, 1)):
        raise ValueError(
            f"scaled_mm takes {name} float32 of shape {shape} or (1, 1), got {tuple(scale.shape)} {scale.dtype}"
        )


@triton.jit
def _swizzled(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The tile of this program: GROUP_M rows of tiles are done together, so that their operands stay in the L2."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = program // (GROUP_M * tiles_n) * GROUP_M
    group = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + program % (GROUP_M * tiles_n) % group, program % (GROUP_M * tiles_n) // group


@triton.heuristics(
    {
        "EVEN_K": lambda args: args["K"] % args["BLOCK_K"] == 0,
        "HAS_BIAS": lambda args: args["bias_ptr"] is not None,
    }
)
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
    stride_scale_a,
    stride_scale_b,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    tile_m, tile_n = _swizzled(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    # int64: row * stride passes 2^31 at 1M tokens x 4096
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    step = tl.full([], BLOCK_K, tl.int64)
    rows, columns = (row < M)[:, None], (column < N)[None, :]
    a_ptr += row[:, None] * stride_am + k[None, :] * stride_ak
    b_ptr += k[:, None] * stride_bk + column[None, :] * stride_bn

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptr, mask=rows, other=0)
            b = tl.load(b_ptr, mask=columns, other=0)
        else:
            a = tl.load(a_ptr, mask=rows & (start + k < K)[None, :], other=0)
            b = tl.load(b_ptr, mask=columns & (start + k < K)[:, None], other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
        a_ptr += step * stride_ak
        b_ptr += step * stride_bk

    out = total.to(tl.float32)
    out *= tl.load(scale_a_ptr + row * stride_scale_a, mask=row < M, other=0.0)[:, None]
    out *= tl.load(scale_b_ptr + column * stride_scale_b, mask=column < N, other=0.0)[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
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
_TILES = (
    Tile(128, 128, 128, warps=4, stages=3),
    Tile(128, 128, 64, warps=4, stages=3),
    Tile(64, 128, 64, warps=4, stages=4),
    Tile(32, 64, 64, warps=4, stages=4),
)


def tile_for(M: int, N: int, aligned: bool, device: torch.device) -> Tile:
    """The largest that fits into shared memory and gives half of the multiprocessors work, else the smallest.

    Operands that are not aligned to 16 bytes go through registers on their way to shared memory: the large tiles would
    spill.
    """
    limits = device_limits(device)
    for tile in _TILES if aligned else _TILES[-2:]:
        if tile.shared_memory <= limits.shared_memory and 2 * tile.count(M, N) >= limits.multiprocessors:
            return tile
    return _TILES[-1]


def _aligned(x: Tensor) -> bool:
    """Whether one dimension is contiguous and lines of it start and end at multiples of 16 bytes."""
    inner = 1 if x.stride(1) == 1 else 0
    sizes = (x.data_ptr(), x.shape[inner], x.stride(1 - inner))
    return x.stride(inner) == 1 and all(size % 16 == 0 for size in sizes)


@scaled_mm.triton
def _launch(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    out = _scaled_mm_fake(a, b, scale_a, scale_b, bias, out_dtype)
    M, N = out.shape
    if out.numel():
        tile = tile_for(M, N, _aligned(a) and _aligned(b), a.device)
        _scaled_mm_kernel[(tile.count(M, N),)](
            a,
            b,
            scale_a,
            scale_b,
            None if bias is None else bias.contiguous(),
            out,
            M,
            N,
            a.shape[1],
            *a.stride(),
            *b.stride(),
            scale_a.stride(0) if scale_a.shape[0] > 1 else 0,
            scale_b.stride(1) if scale_b.shape[1] > 1 else 0,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            GROUP_M=8,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=False,  # each product and the sum are rounded, as in the reference
        )
    return out
