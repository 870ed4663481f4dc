"""8-bit blockwise quantisation: each block of neighbouring values shares one float32 scale, x = code[codes] * scale.

    scale = max(|x|) of the block
    codes = nearest of the code book to x * (1 / scale)       (quotient and product rounded to float32)

The ops work on flat blocks, in row-major order. `quantize_rows` and `dequantize_rows` are the same arithmetic with
blocks that never cross rows, as optimizers keep their state: row r is dim 0, and its last block may be short.

Both backends take the IEEE reciprocal, subnormal for scales above 2^126, and find the code exactly, so codes and scales
are equal to the last bit. A NaN or an infinity makes the scale of its block NaN or infinite and all codes of the block
that of zero, so that the whole block comes back as NaN.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lq_kernels._op import op, op_with_out
from lq_kernels._triton import tl, triton
from lq_kernels.codebooks import CODES
from lq_kernels.nearest import (
    TILE,
    WARPS,
    NearestTable,
    check_codes,
    check_out,
    check_values,
    flat_tile,
    load_nearest,
    load_tile,
    nearest_code,
    programs,
    store_tile,
)

BLOCK_SIZE = 256

SMALLEST_SCALE = 2.0**-126  # the smallest normal float32: below it some devices flush to zero, and 1 / scale overflows

_CODES = tl.constexpr(CODES)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)


@op
def quantize_blockwise(x: Tensor, code: Tensor, block_size: int = BLOCK_SIZE) -> tuple[Tensor, Tensor]:
    """x float -> codes uint8 of its shape, scale (ceil(numel / block_size),) float32: the amax of each flat block.

    x is float32, bfloat16 or float16 of any shape; `code` is (256,) float32, ascending, on the device of x (values that
    do not ascend are an error on the CPU and give wrong codes on a GPU). Each value gets the nearest code, ties to the
    lower index; zero gets the code of zero; a zero block has scale 0, and so has one whose amax is subnormal. Blocks
    that are not finite: see above. Powers of two from 64 to 4096 are the fast block sizes, above that a block is read
    twice, by one program. Source: https://arxiv.org/abs/2110.02861
    """
    codes, scale = _quantize_blockwise_fake(x, code, block_size)
    quantize_blockwise_out.reference(x, code, block_size, codes, scale)
    return codes, scale


@quantize_blockwise.fake
def _quantize_blockwise_fake(x: Tensor, code: Tensor, block_size: int = BLOCK_SIZE) -> tuple[Tensor, Tensor]:
    _check_block_size(block_size)
    check_values(x, code, "quantize_blockwise")
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    return codes, torch.empty(_blocks(x, block_size), dtype=torch.float32, device=x.device)


@op
def dequantize_blockwise(
    codes: Tensor, scale: Tensor, code: Tensor, block_size: int = BLOCK_SIZE, dtype: torch.dtype = torch.float32
) -> Tensor:
    """codes uint8, scale (ceil(numel / block_size),) float32 -> code[codes] * scale of its block, in `dtype`.

    `code` is (256,) float32, in any order; `dtype` float32, bfloat16 or float16. The product is float32, rounded once.
    """
    x = _dequantize_blockwise_fake(codes, scale, code, block_size, dtype)
    dequantize_blockwise_out.reference(codes, scale, code, block_size, x)
    return x


@dequantize_blockwise.fake
def _dequantize_blockwise_fake(
    codes: Tensor, scale: Tensor, code: Tensor, block_size: int = BLOCK_SIZE, dtype: torch.dtype = torch.float32
) -> Tensor:
    _check_dequantize(codes, scale, code, block_size, dtype)
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


@op_with_out("codes", "scale")
def quantize_blockwise_out(x: Tensor, code: Tensor, block_size: int, codes: Tensor, scale: Tensor) -> None:
    """`quantize_blockwise` into `codes`, uint8 of the shape of x, and `scale`: contiguous, on the device of x."""
    _quantize_blockwise_out_fake(x, code, block_size, codes, scale)
    blocks = _in_blocks(x.detach().reshape(1, -1).float(), block_size)
    values, amax = _quantize_blocks(blocks, NearestTable.of(code))
    codes.copy_(values.view(-1)[: x.numel()].view(x.shape))
    scale.copy_(amax)


@quantize_blockwise_out.fake
def _quantize_blockwise_out_fake(x: Tensor, code: Tensor, block_size: int, codes: Tensor, scale: Tensor) -> None:
    _check_block_size(block_size)
    check_values(x, code, "quantize_blockwise_out")
    check_out(codes, "codes", x.shape, torch.uint8, x.device)
    check_out(scale, "scale", torch.Size([_blocks(x, block_size)]), torch.float32, x.device)


@op_with_out("out")
def dequantize_blockwise_out(codes: Tensor, scale: Tensor, code: Tensor, block_size: int, out: Tensor) -> None:
    """`dequantize_blockwise` into `out`, float32, bfloat16 or float16: contiguous, shape and device those of codes."""
    _dequantize_blockwise_out_fake(codes, scale, code, block_size, out)
    x = _dequantize_blocks(_in_blocks(codes.reshape(1, -1), block_size), scale, code)
    out.copy_(x.view(-1)[: codes.numel()].view(codes.shape))


@dequantize_blockwise_out.fake
def _dequantize_blockwise_out_fake(codes: Tensor, scale: Tensor, code: Tensor, block_size: int, out: Tensor) -> None:
    _check_dequantize(codes, scale, code, block_size, out.dtype)
    check_out(out, "out", codes.shape, out.dtype, codes.device)


def quantize_rows(x: Tensor, table: NearestTable, block_size: int = BLOCK_SIZE) -> tuple[Tensor, Tensor]:
    """x (rows, ...) float32 -> codes uint8 of its shape, scale (rows, ceil(numel / rows / block_size)) float32."""
    rows = x.reshape(x.shape[0], -1)
    codes, scale = _quantize_blocks(_in_blocks(rows, block_size), table)
    return codes.view(rows.shape[0], -1)[:, : rows.shape[1]].reshape(x.shape), scale.view(rows.shape[0], -1)


def dequantize_rows(codes: Tensor, scale: Tensor, code: Tensor, block_size: int = BLOCK_SIZE) -> Tensor:
    """codes (rows, ...) uint8, scale (rows, blocks) float32 -> code[codes] * scale of its block, float32."""
    rows = codes.reshape(codes.shape[0], -1)
    x = _dequantize_blocks(_in_blocks(rows, block_size), scale.reshape(-1), code)
    return x.view(rows.shape[0], -1)[:, : rows.shape[1]].reshape(codes.shape)


def _in_blocks(rows: Tensor, block_size: int) -> Tensor:
    """(rows, columns) -> (rows * blocks, block_size); the last block of a row is filled up with zeros."""
    block_size = min(block_size, max(rows.shape[1], 1))
    missing = -rows.shape[1] % block_size
    padded = F.pad(rows, (0, missing)) if missing else rows
    return padded.reshape(-1, block_size)


def _quantize_blocks(blocks: Tensor, table: NearestTable) -> tuple[Tensor, Tensor]:
    amax = blocks.abs().amax(dim=1) if blocks.numel() else blocks.new_empty(0)
    scale = torch.where(amax < SMALLEST_SCALE, 0.0, amax)
    # full_like: a reciprocal of IEEE on every device. That of infinity is 0.
    inverse = torch.full_like(scale, 1.0) / torch.where(scale > 0, scale, torch.inf)
    values = blocks * inverse[:, None]
    if not math.isfinite(scale.sum()):
        values = torch.where(scale.isfinite()[:, None], values, 0.0)
    return table.nearest_number(values), scale


def _dequantize_blocks(blocks: Tensor, scale: Tensor, code: Tensor) -> Tensor:
    values = code.index_select(0, blocks.reshape(-1).long())
    return values.view(blocks.shape).mul_(scale[:, None])


def _blocks(x: Tensor, block_size: int) -> int:
    return (x.numel() + block_size - 1) // block_size


def _check_block_size(block_size: int) -> None:
    if block_size < 1:
        raise ValueError(f"block_size must be positive, got {block_size}")


def _check_dequantize(codes: Tensor, scale: Tensor, code: Tensor, block_size: int, dtype: torch.dtype) -> None:
    _check_block_size(block_size)
    check_codes(codes, code, dtype, "dequantize_blockwise")
    expected = (_blocks(codes, block_size),)
    if scale.shape != expected or scale.dtype != torch.float32 or scale.device != codes.device:
        raise ValueError(
            f"{codes.numel()} codes in blocks of {block_size} need a float32 scale of shape {expected} on "
            f"{codes.device}, got {scale.dtype} {tuple(scale.shape)} on {scale.device}: was the block size another?"
        )


@triton.jit
def block_scale(x, axis: tl.constexpr):
    """The amax along an axis, 0 when it is subnormal; NaN wins, because its bits are above those of infinity."""
    amax = tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=axis).to(tl.float32, bitcast=True)
    return tl.where(amax < _SMALLEST_SCALE, 0.0, amax)


@triton.jit
def _spread(per_block, WIDTH: tl.constexpr):
    """(blocks,) -> (blocks * WIDTH,): each block's number for each of its values."""
    return tl.ravel(tl.broadcast_to(per_block[:, None], [per_block.shape[0], WIDTH]))


@triton.jit
def _inverse(scale):
    """1 / scale, 1 where there is none, and whether there is one."""
    quantizable = (scale > 0) & (scale < float("inf"))
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.where(quantizable, scale, 1.0)), quantizable


@triton.jit
def _scaled(x, scale, WIDTH: tl.constexpr):
    """x (blocks * WIDTH,), scale (blocks,) -> x * (1 / scale), 0 where the scale is 0 or not finite."""
    inverse, quantizable = _inverse(scale)
    return tl.where(_spread(quantizable, WIDTH), x * _spread(inverse, WIDTH), 0.0)


@triton.jit
def _block_tile(tile, numel, block_size, x_ptr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr):
    """Blocks (BLOCKS,) of a tile, offsets and mask (BLOCKS * WIDTH,) of their values, and whether the tile is whole."""
    block = tl.cast(tile, tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    if EXACT:
        offset, mask, whole = flat_tile(tile, numel, BLOCKS * WIDTH, x_ptr.dtype.element_ty)
    else:
        lane = tl.arange(0, WIDTH)[None, :]
        offset = block[:, None] * block_size + lane
        mask = tl.ravel((lane < block_size) & (offset < numel))
        offset = tl.ravel(offset)
        whole = tl.full([], 0, tl.int1)
    return block, offset, mask, whole


@triton.heuristics({"EXACT": lambda args: args["block_size"] == args["WIDTH"]})
@triton.jit
def _quantize_kernel(
    x_ptr,
    code_ptr,
    codes_ptr,
    scale_ptr,
    numel,
    block_size,
    tiles,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    EXACT: tl.constexpr,
):
    """BLOCKS blocks of at most WIDTH values at a time; a program takes every num_programs-th tile."""
    nearest = load_nearest(code_ptr)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        block, offset, mask, whole = _block_tile(tile, numel, block_size, x_ptr, BLOCKS, WIDTH, EXACT)
        x = load_tile(x_ptr, offset, mask, whole, 0.0).to(tl.float32)
        scale = block_scale(tl.reshape(x, [BLOCKS, WIDTH]), axis=1)
        codes = nearest_code(_scaled(x, scale, WIDTH), nearest)
        store_tile(codes_ptr, offset, codes.to(tl.uint8), mask, whole)
        tl.store(scale_ptr + block, scale, mask=block * block_size < numel)


@triton.jit
def _quantize_long_kernel(x_ptr, code_ptr, codes_ptr, scale_ptr, numel, block_size, blocks, TILE: tl.constexpr):
    """One block of more than TILE values at a time, read twice."""
    nearest = load_nearest(code_ptr)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        first = tl.cast(block, tl.int64) * block_size + tl.arange(0, TILE)
        end = tl.minimum(tl.cast(block + 1, tl.int64) * block_size, numel)
        amax = tl.zeros([TILE], tl.int32)
        for start in range(0, block_size, TILE):
            x = tl.load(x_ptr + first + start, mask=first + start < end, other=0.0).to(tl.float32)
            amax = tl.maximum(amax, tl.abs(x).to(tl.int32, bitcast=True))
        scale = block_scale(tl.reshape(amax, [1, TILE]).to(tl.float32, bitcast=True), axis=1)
        for start in range(0, block_size, TILE):
            x = tl.load(x_ptr + first + start, mask=first + start < end, other=0.0).to(tl.float32)
            codes = nearest_code(_scaled(x, scale, TILE), nearest)
            tl.store(codes_ptr + first + start, codes.to(tl.uint8), mask=first + start < end)
        tl.store(scale_ptr + block + tl.arange(0, 1), scale)


@triton.heuristics({"EXACT": lambda args: args["block_size"] == args["WIDTH"]})
@triton.jit
def _dequantize_kernel(
    codes_ptr,
    scale_ptr,
    code_ptr,
    x_ptr,
    numel,
    block_size,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    EXACT: tl.constexpr,
):
    """BLOCKS * WIDTH values; unless WIDTH is the block size, each finds its block by a division."""
    values = tl.load(code_ptr + tl.arange(0, _CODES))
    offset, mask, whole = flat_tile(tl.program_id(0), numel, BLOCKS * WIDTH, x_ptr.dtype.element_ty)
    codes = load_tile(codes_ptr, offset, mask, whole, 0)
    if EXACT:
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        scale = _spread(tl.load(scale_ptr + block, mask=block * WIDTH < numel, other=0.0), WIDTH)
    else:
        scale = tl.load(scale_ptr + offset // block_size, mask=mask, other=0.0)
    x = tl.gather(values, codes.to(tl.int32), axis=0) * scale
    store_tile(x_ptr, offset, x.to(x_ptr.dtype.element_ty), mask, whole)


@quantize_blockwise_out.triton
def _launch_quantize_out(x: Tensor, code: Tensor, block_size: int, codes: Tensor, scale: Tensor) -> None:
    _quantize_blockwise_out_fake(x, code, block_size, codes, scale)
    blocks, numel = scale.numel(), x.numel()
    if not numel:
        return
    x, code, block_size = x.contiguous(), code.contiguous(), min(block_size, numel)
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    if block_size > TILE:
        grid = programs(blocks, x.device)
        _quantize_long_kernel[grid](x, code, codes, scale, numel, block_size, blocks, TILE=TILE, **options)
        return
    width = triton.next_power_of_2(block_size)
    tiles = triton.cdiv(blocks, TILE // width)
    grid = programs(tiles, x.device)
    _quantize_kernel[grid](
        x, code, codes, scale, numel, block_size, tiles, BLOCKS=TILE // width, WIDTH=width, **options
    )


@quantize_blockwise.triton
def _launch_quantize(x: Tensor, code: Tensor, block_size: int = BLOCK_SIZE) -> tuple[Tensor, Tensor]:
    codes, scale = _quantize_blockwise_fake(x, code, block_size)
    _launch_quantize_out(x, code, block_size, codes, scale)
    return codes, scale


@dequantize_blockwise_out.triton
def _launch_dequantize_out(codes: Tensor, scale: Tensor, code: Tensor, block_size: int, out: Tensor) -> None:
    _dequantize_blockwise_out_fake(codes, scale, code, block_size, out)
    numel = codes.numel()
    if numel:
        width = min(triton.next_power_of_2(block_size), TILE)
        codes, scale, code = codes.contiguous(), scale.contiguous(), code.contiguous()
        _dequantize_kernel[(triton.cdiv(numel, TILE),)](
            codes, scale, code, out, numel, block_size, BLOCKS=TILE // width, WIDTH=width, num_warps=WARPS
        )


@dequantize_blockwise.triton
def _launch_dequantize(
    codes: Tensor, scale: Tensor, code: Tensor, block_size: int = BLOCK_SIZE, dtype: torch.dtype = torch.float32
) -> Tensor:
    x = _dequantize_blockwise_fake(codes, scale, code, block_size, dtype)
    _launch_dequantize_out(codes, scale, code, block_size, x)
    return x
