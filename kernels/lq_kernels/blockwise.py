"""8-bit blockwise quantisation: each block of neighbouring values shares one float32 scale, x = code[codes] * scale.

The ops work on flat blocks, in row-major order. `quantize_rows` and `dequantize_rows` are the same arithmetic with
blocks that never cross rows, as optimizers keep their state: row r is dim 0, and its last block may be short.

Both backends compute v = x / scale with IEEE division and count the float32 midpoints below v, so codes and scales
are equal to the last bit. A NaN or an infinity makes the scale NaN or infinite, and the whole block with it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lq_kernels._op import op
from lq_kernels._triton import tl, triton
from lq_kernels.codebooks import CODES, NearestTable, midpoints

BLOCK_SIZE = 256

SMALLEST_SCALE = 2.0**-126  # the smallest normal float32: below it some devices flush to zero, and 1 / scale overflows

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TILE = 2048  # values per program
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)


@op
def quantize_blockwise(x: Tensor, code: Tensor, block_size: int = BLOCK_SIZE) -> tuple[Tensor, Tensor]:
    """x float -> codes uint8 of its shape, scale (ceil(numel / block_size),) float32: the amax of each flat block.

    `code` is (256,) float32, ascending. Each value gets the nearest code, ties to the lower index; zero gets the code
    of zero; a zero block has scale 0, and so has one whose amax is subnormal. Source: https://arxiv.org/abs/2110.02861
    """
    _check_quantize(x, code, block_size)
    blocks = _in_blocks(x.detach().reshape(1, -1).float(), block_size)
    codes, scale = _quantize_blocks(blocks, NearestTable.of(code))
    return codes.view(-1)[: x.numel()].view(x.shape), scale


@quantize_blockwise.fake
def _quantize_blockwise_fake(x: Tensor, code: Tensor, block_size: int = BLOCK_SIZE) -> tuple[Tensor, Tensor]:
    blocks = (x.numel() + block_size - 1) // block_size
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(blocks, dtype=torch.float32)


@op
def dequantize_blockwise(
    codes: Tensor, scale: Tensor, code: Tensor, block_size: int = BLOCK_SIZE, dtype: torch.dtype = torch.float32
) -> Tensor:
    """codes uint8, scale (ceil(numel / block_size),) float32 -> code[codes] * scale of its block, in `dtype`.

    The product is taken in float32 and rounded once.
    """
    _check_dequantize(codes, scale, code, block_size, dtype)
    blocks = _in_blocks(codes.reshape(1, -1), block_size)
    x = _dequantize_blocks(blocks, scale, code)
    return x.view(-1)[: codes.numel()].view(codes.shape).to(dtype)


@dequantize_blockwise.fake
def _dequantize_blockwise_fake(
    codes: Tensor, scale: Tensor, code: Tensor, block_size: int = BLOCK_SIZE, dtype: torch.dtype = torch.float32
) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def quantize_rows(x: Tensor, code: Tensor, block_size: int = BLOCK_SIZE) -> tuple[Tensor, Tensor]:
    """x (rows, ...) float32 -> codes uint8 of its shape, scale (rows, ceil(numel / rows / block_size)) float32."""
    rows = x.reshape(x.shape[0], -1)
    blocks = _in_blocks(rows, block_size)
    codes, scale = _quantize_blocks(blocks, NearestTable.of(code))
    return codes.view(rows.shape[0], -1)[:, : rows.shape[1]].reshape(x.shape), scale.view(rows.shape[0], -1)


def dequantize_rows(codes: Tensor, scale: Tensor, code: Tensor, block_size: int = BLOCK_SIZE) -> Tensor:
    """codes (rows, ...) uint8, scale (rows, blocks) float32 -> code[codes] * scale of its block, float32."""
    rows = codes.reshape(codes.shape[0], -1)
    x = _dequantize_blocks(_in_blocks(rows, block_size), scale.reshape(-1), code)
    return x.view(rows.shape[0], -1)[:, : rows.shape[1]].reshape(codes.shape)


def _in_blocks(rows: Tensor, block_size: int) -> Tensor:
    """(rows, columns) -> (rows * blocks, block_size); the last block of a row is filled up with zeros."""
    missing = -rows.shape[1] % block_size
    padded = F.pad(rows, (0, missing)) if missing else rows
    return padded.reshape(-1, block_size)


def _quantize_blocks(blocks: Tensor, table: NearestTable) -> tuple[Tensor, Tensor]:
    amax = blocks.abs().amax(dim=1) if blocks.numel() else blocks.new_empty(0)
    scale = torch.where(amax < SMALLEST_SCALE, 0.0, amax)
    divisor = torch.where(scale == 0, 1.0, scale)
    return table.nearest(blocks / divisor[:, None]), scale


def _dequantize_blocks(blocks: Tensor, scale: Tensor, code: Tensor) -> Tensor:
    values = code.index_select(0, blocks.reshape(-1).int())
    return values.view(blocks.shape).mul_(scale[:, None])


def _check_quantize(x: Tensor, code: Tensor, block_size: int) -> None:
    if x.dtype not in _FLOATS:
        raise TypeError(f"quantize_blockwise takes float32, bfloat16 or float16, got {x.dtype}")
    _check_code(code, block_size)


def _check_dequantize(codes: Tensor, scale: Tensor, code: Tensor, block_size: int, dtype: torch.dtype) -> None:
    _check_code(code, block_size)
    if codes.dtype != torch.uint8 or dtype not in _FLOATS:
        raise TypeError(f"dequantize_blockwise takes uint8 to a float of at most 32 bits, got {codes.dtype} to {dtype}")
    expected = (-(-codes.numel() // block_size),)
    if scale.shape != expected or scale.dtype != torch.float32:
        raise ValueError(
            f"{codes.numel()} codes in blocks of {block_size} need a float32 scale of shape {expected}, "
            f"got {scale.dtype} {tuple(scale.shape)}: was it made with another block size?"
        )


def _check_code(code: Tensor, block_size: int) -> None:
    if code.shape != (CODES,) or code.dtype != torch.float32:
        raise ValueError(f"a code book is ({CODES},) float32, got {tuple(code.shape)} {code.dtype}")
    if block_size < 1:
        raise ValueError(f"block_size must be positive, got {block_size}")


@triton.jit
def nearest_code(v, bounds_ptr):
    """v float32 -> the number of the 255 ascending bounds below v, int32: eight steps of a binary search."""
    code = tl.zeros_like(v).to(tl.int32)
    for log_step in tl.static_range(7, -1, -1):
        probe = code + (1 << log_step)
        code = tl.where(v > tl.load(bounds_ptr + probe - 1), probe, code)
    return code


@triton.jit
def block_scale(x, axis: tl.constexpr):
    """The amax along an axis, 0 when it is subnormal; NaN wins, because its bits are above those of infinity."""
    amax = tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=axis).to(tl.float32, bitcast=True)
    return tl.where(amax < _SMALLEST_SCALE, 0.0, amax)


@triton.jit
def _tile(numel, block_size, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """Blocks (BLOCKS,), offsets and mask (BLOCKS, WIDTH) of a program."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    lane = tl.arange(0, WIDTH)[None, :]
    offset = block[:, None] * block_size + lane
    return block, offset, (lane < block_size) & (offset < numel)


@triton.jit
def _quantize_kernel(
    x_ptr, bounds_ptr, codes_ptr, scale_ptr, numel, block_size, BLOCKS: tl.constexpr, WIDTH: tl.constexpr
):
    block, offset, mask = _tile(numel, block_size, BLOCKS, WIDTH)
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    scale = block_scale(x, axis=1)
    divisor = tl.where(scale == 0, 1.0, scale)
    codes = nearest_code(tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape)), bounds_ptr)
    tl.store(codes_ptr + offset, codes.to(tl.uint8), mask=mask)
    tl.store(scale_ptr + block, scale, mask=block * block_size < numel)


@triton.jit
def _dequantize_kernel(
    codes_ptr, scale_ptr, code_ptr, x_ptr, numel, block_size, BLOCKS: tl.constexpr, WIDTH: tl.constexpr
):
    block, offset, mask = _tile(numel, block_size, BLOCKS, WIDTH)
    scale = tl.load(scale_ptr + block, mask=block * block_size < numel, other=0.0)
    codes = tl.load(codes_ptr + offset, mask=mask, other=0).to(tl.int32)
    x = tl.load(code_ptr + codes) * scale[:, None]
    tl.store(x_ptr + offset, x.to(x_ptr.dtype.element_ty), mask=mask)


def _tiling(numel: int, block_size: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and tile: whole blocks, padded to a power of two, about _TILE values per program."""
    width = triton.next_power_of_2(block_size)
    blocks = max(1, _TILE // width)
    return (triton.cdiv(triton.cdiv(numel, block_size), blocks),), {"BLOCKS": blocks, "WIDTH": width}


@quantize_blockwise.triton
def _launch_quantize(x: Tensor, code: Tensor, block_size: int = BLOCK_SIZE) -> tuple[Tensor, Tensor]:
    _check_quantize(x, code, block_size)
    x = x.contiguous()
    codes, scale = _quantize_blockwise_fake(x, code, block_size)
    if x.numel():
        grid, tile = _tiling(x.numel(), block_size)
        _quantize_kernel[grid](x, midpoints(code.to(x.device)), codes, scale, x.numel(), block_size, **tile)
    return codes, scale


@dequantize_blockwise.triton
def _launch_dequantize(
    codes: Tensor, scale: Tensor, code: Tensor, block_size: int = BLOCK_SIZE, dtype: torch.dtype = torch.float32
) -> Tensor:
    _check_dequantize(codes, scale, code, block_size, dtype)
    codes = codes.contiguous()
    x = _dequantize_blockwise_fake(codes, scale, code, block_size, dtype)
    if codes.numel():
        grid, tile = _tiling(codes.numel(), block_size)
        _dequantize_kernel[grid](codes, scale.contiguous(), code.to(codes.device), x, codes.numel(), block_size, **tile)
    return x
