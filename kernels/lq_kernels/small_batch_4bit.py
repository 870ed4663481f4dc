"""x @ W.t() for few rows of x, with W read once from its 4-bit codes and unpacked in registers.

    out[m, n] = sum over k of x[m, k] * (map[codes[n, k]] * scale of its block) + bias[n]

The weight is the left operand of the matrix instruction, out.t() = W @ x.t(), because Hopper takes that one from
registers: a word of eight codes becomes the four registers of two rows of a fragment, and nothing goes through shared
memory but the packed bytes. Two renamings make that so. Along K a thread loads 16 bytes, 32 values, and each dot of 128
takes its k in the order (part, thread, run) instead of (thread, part, run), and x in the same order; along N rows of a
tile are loaded in the order in which warps hold them.

K may be split over programs; their sums are added in a fixed order by a second launch, so that results repeat.

Sources: QLoRA, section 3, https://arxiv.org/abs/2305.14314; unpacking in registers: Marlin, section 3,
https://arxiv.org/abs/2408.11743
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lq_kernels._op import op
from lq_kernels._triton import device_limits, tl, triton
from lq_kernels.blockwise_4bit import dequantize_4bit
from lq_kernels.layout_4bit import aligned_words, check_product, rows_of
from lq_kernels.nibble_words import decode_words, fill_table, has_ptx, word_table

LARGEST_ROWS = 128
_CHUNK = 128  # values along K of one dot
_WHOLE = 64  # values that share a scale


@op
def small_batch_4bit(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    block_size: int,
    quant_type: str,
    shape: list[int],
    bias: Tensor | None = None,
) -> Tensor:
    """x (..., K) @ W.t() + bias -> (..., N) in the dtype of x; W of `shape` (N, K) as `quantize_4bit` packed it.

    x is bfloat16 or float16, bias (N,) float32, bfloat16, float16 or None. Sums are float32, rounded once; on a GPU map
    values are rounded to the dtype of x first, and again when they are multiplied by their scale. Any number of rows, 0
    included; meant for 1 to LARGEST_ROWS. ValueError: sizes that do not fit together and, on a GPU, a K or a block_size
    that is no multiple of 64 (`fits_small_batch`).
    """
    check_product(x, packed, scale, block_size, quant_type, shape, bias)
    weight = dequantize_4bit.reference(packed, scale, block_size, quant_type, shape, torch.float32)
    out = x.float() @ weight.t()
    return (out if bias is None else out + bias.float()).to(x.dtype)


@small_batch_4bit.fake
def _small_batch_4bit_fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    block_size: int,
    quant_type: str,
    shape: list[int],
    bias: Tensor | None = None,
) -> Tensor:
    check_product(x, packed, scale, block_size, quant_type, shape, bias)
    return x.new_empty(*x.shape[:-1], shape[0])


def fits_small_batch(x: Tensor, block_size: int, shape: list[int]) -> bool:
    """Whether the kernel can read this weight for this x."""
    sixteen_bits = x.dtype in (torch.bfloat16, torch.float16)
    return sixteen_bits and shape[1] % _WHOLE == 0 and block_size % _WHOLE == 0 and shape[1] > 0


@triton.jit
def _rows_as_held(BLOCK_N: tl.constexpr, WARPS: tl.constexpr):
    """Of each row as a load spreads them over warps, the row that a matrix operand holds in its place."""
    at = tl.arange(0, BLOCK_N)
    warp, half, tile = at // 8 % WARPS, at // (8 * WARPS) % 2, at // (16 * WARPS)
    return tile * (16 * WARPS) + warp * 16 + half * 8 + at % 8


@triton.jit
def _as_operand(weight, WARPS: tl.constexpr, RUN: tl.constexpr):
    """[BLOCK_N, 128] as loaded -> as the dot takes it: (tile, half, warp, 8; thread, part, run) in another order."""
    ROWS: tl.constexpr = weight.shape[0]
    weight = tl.reshape(weight, (ROWS // (16 * WARPS), 2, WARPS, 8, 4, 32 // RUN, RUN))
    return tl.reshape(tl.permute(weight, (0, 2, 1, 3, 5, 4, 6)), (ROWS, 128))


@triton.heuristics(
    {
        "WHOLE_N": lambda args: args["N"] % args["BLOCK_N"] == 0,
        "WHOLE_BLOCKS": lambda args: args["K"] % args["BLOCK_SIZE"] == 0,
        "WHOLE_K": lambda args: args["K"] % (128 * args["CHUNKS"]) == 0,
    }
)
@triton.jit
def _small_batch_4bit_kernel(
    x_ptr,
    words_ptr,
    scale_ptr,
    table_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    steps_of_split,
    stride_xm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DECODE: tl.constexpr,
    ARRANGED: tl.constexpr,
    RUN: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE_N: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    WHOLE_K: tl.constexpr,
):
    """CHUNKS of 128 along K in a step. ARRANGED: x has the order of the operand already."""
    tile, split = tl.program_id(0).to(tl.int64) * BLOCK_N, tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    loaded, n = tile + _rows_as_held(BLOCK_N, WARPS), tile + tl.arange(0, BLOCK_N)
    at = tl.arange(0, 128)
    k_of_x = at if ARRANGED else at // RUN % 4 * 32 + at // (4 * RUN) * RUN + at % RUN
    # Two 64s of 8 words, 16 bytes for a thread: its run in the operand
    half = tl.arange(0, 2)
    words = words_ptr + (loaded * (K // 8))[:, None, None] + half[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    words = tl.max_contiguous(tl.multiple_of(words, (1, 1, 16)), (1, 1, 4))
    x_ptr += m.to(tl.int64)[None, :] * stride_xm + k_of_x[:, None]
    table = fill_table(table_ptr) if DECODE == "lookup" else 0
    dtype: tl.constexpr = x_ptr.dtype.element_ty

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    end = tl.minimum((split + 1) * steps_of_split, tl.cdiv(K, 128 * CHUNKS))
    for step in tl.range(split * steps_of_split, end, num_stages=STAGES):
        for chunk in tl.static_range(CHUNKS):
            k = (step * CHUNKS + chunk) * 128
            k_of_half = k + 64 * half
            if WHOLE_N and WHOLE_K:
                codes = tl.load(words + k // 8)
            else:
                mask = (loaded < N)[:, None] & (k_of_half < K)[None, :]
                codes = tl.load(words + k // 8, mask=mask[:, :, None], other=0)
            if WHOLE_BLOCKS:
                block = (loaded * (K // BLOCK_SIZE))[:, None] + (k_of_half // BLOCK_SIZE)[None, :]
            else:
                block = ((loaded * K)[:, None] + k_of_half[None, :]) // BLOCK_SIZE
            if WHOLE_N and WHOLE_K:
                scale = tl.load(scale_ptr + block)
            else:
                scale = tl.load(scale_ptr + block, mask=mask, other=0.0)
            rows = (m < M)[None, :]
            x = tl.load(x_ptr + k, mask=rows if WHOLE_K else rows & (k + k_of_x < K)[:, None], other=0.0)
            weight = decode_words(codes, scale, table_ptr, table, dtype, DECODE)
            total = tl.dot(_as_operand(weight, WARPS, RUN), x, total)

    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    out_ptr += (split * M + m).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def _sum_splits_kernel(partial_ptr, bias_ptr, out_ptr, size, N, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """partial (SPLITS, M, N) float32 -> out (M, N), added in order."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    total = tl.load(partial_ptr + at, mask=at < size, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partial_ptr + split * size + at, mask=at < size, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at % N, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < size)


@dataclass(frozen=True)
class Tile:
    """m rows of x, n rows of W, chunks of 128 along K in a step."""

    m: int
    n: int
    chunks: int
    warps: int
    stages: int
    decode: str
    arranged: bool = False

    @property
    def run(self) -> int:
        """Neighbours along K that a thread holds of an operand: of Hopper's wgmma, which Triton takes here, or mma."""
        return 2 if self.m >= 16 and self.warps % 4 == 0 else 4

    def splits(self, M: int, N: int, K: int, multiprocessors: int) -> int:
        """Parts of K, so that each multiprocessor gets PROGRAMS programs and no part is shorter than a few steps."""
        tiles = -(-M // self.m) * -(-N // self.n)
        wanted = -(-_PROGRAMS * multiprocessors // tiles)
        most = K // (_CHUNK * self.chunks * _FEWEST_STEPS)
        return max(1, min(wanted, most, _MOST_SPLITS))


_PROGRAMS, _FEWEST_STEPS, _MOST_SPLITS = 4, 4, 8
_SUM_TILE = 1024

# Measured on an H200, torch 2.11 and Triton 3.6, W (14336, 4096) and (4096, 14336).
TILES = (
    Tile(8, 64, 1, warps=4, stages=4, decode="prmt"),
    Tile(16, 64, 1, warps=4, stages=4, decode="prmt"),
    Tile(32, 64, 1, warps=4, stages=4, decode="prmt", arranged=True),
    Tile(64, 128, 1, warps=8, stages=3, decode="lookup", arranged=True),
    Tile(128, 128, 1, warps=8, stages=3, decode="lookup", arranged=True),
)
_PORTABLE_TILE = Tile(16, 64, 1, warps=4, stages=2, decode="portable")


def tile_for(M: int, device: torch.device) -> Tile:
    """The smallest that holds all rows, else the largest; where there is no PTX, the portable one."""
    if not has_ptx(device):
        return _PORTABLE_TILE
    return next((tile for tile in TILES if tile.m >= M), TILES[-1])


def plan_for(M: int, shape: list[int], device: torch.device) -> tuple[Tile, int]:
    """A tile, and in how many parts to split K."""
    tile = tile_for(M, device)
    return tile, tile.splits(M, shape[0], shape[1], device_limits(device).multiprocessors)


def arranged(x: Tensor, run: int) -> Tensor:
    """x (M, K) with each 128 of K in the order of the matrix operand: (thread, part, run) -> (part, thread, run)."""
    M, K = x.shape
    return x.reshape(M, K // _CHUNK, 4, 32 // run, run).transpose(2, 3).reshape(M, K)


@small_batch_4bit.triton
def _launch_small_batch_4bit(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    block_size: int,
    quant_type: str,
    shape: list[int],
    bias: Tensor | None = None,
) -> Tensor:
    out = _small_batch_4bit_fake(x, packed, scale, block_size, quant_type, shape, bias)
    if not fits_small_batch(x, block_size, shape):
        raise ValueError(
            "small_batch_4bit takes bfloat16 or float16 x, and K and blocks of whole 64s, "
            f"got {x.dtype}, K = {shape[1]} and blocks of {block_size}: gemv_4bit and linear_4bit take any"
        )
    if out.numel():
        rows = rows_of(x)
        plan = plan_for(len(rows), shape, x.device)
        launch_small_batch(rows, packed, scale, block_size, quant_type, out.view(len(rows), shape[0]), bias, *plan)
    return out


def launch_small_batch(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    block_size: int,
    quant_type: str,
    out: Tensor,
    bias: Tensor | None,
    tile: Tile,
    splits: int,
) -> None:
    """Fills out (M, N), contiguous, in one launch, or two where K is split, and one more for an arranged x."""
    (M, K), N = x.shape, out.shape[1]
    bias = None if bias is None else bias.contiguous()
    partial = out if splits == 1 else out.new_empty(splits, M, N, dtype=torch.float32)
    steps = triton.cdiv(K, _CHUNK * tile.chunks)
    is_arranged = tile.arranged and K % _CHUNK == 0
    if is_arranged:
        x = arranged(x, tile.run)
    elif x.stride(1) != 1:
        x = x.contiguous()
    _small_batch_4bit_kernel[(triton.cdiv(N, tile.n), splits, triton.cdiv(M, tile.m))](
        x,
        aligned_words(packed),
        scale.contiguous(),
        word_table(quant_type, x.dtype, x.device),
        bias if splits == 1 else None,
        partial,
        M,
        N,
        K,
        triton.cdiv(steps, splits),
        x.stride(0),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        CHUNKS=tile.chunks,
        BLOCK_SIZE=block_size,
        DECODE=tile.decode,
        ARRANGED=is_arranged,
        RUN=tile.run,
        WARPS=tile.warps,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    if splits > 1:
        _sum_splits_kernel[(triton.cdiv(M * N, _SUM_TILE),)](
            partial, bias, out, M * N, N, SPLITS=splits, TILE=_SUM_TILE, num_warps=4
        )
