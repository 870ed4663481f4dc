"""Quantise and dequantise in one: values rounded to what a code book of 256 values can express, in their own dtype.

    scale = max(|x|) of a block, or of the tensor
    blocks   out = code[nearest(x * (1 / scale))] * scale           (as dequantise after quantise in blockwise.py)
    tensor   out = code[nearest(x / scale)] * scale                 (float32, rounded once to the dtype of x)

A block or tensor of zeros, or with a subnormal maximum, becomes the code book's value nearest to 0, times 0; one with a
NaN or an infinity becomes NaN. Both backends give the same bits.

Source: bitsandbytes before 0.50, whose research layers simulate fp8 so; the blocks: https://arxiv.org/abs/2110.02861
"""

import torch
from torch import Tensor

from lq_kernels._op import op
from lq_kernels._triton import tl, triton
from lq_kernels.blockwise import SMALLEST_SCALE, block_scale, dequantize_rows, quantize_rows
from lq_kernels.codebooks import CODES
from lq_kernels.element_types import magnitude_bits
from lq_kernels.nearest import NearestTable, check_values, load_nearest, nearest_code, programs

LARGEST_BLOCK = 4096

_TILE = LARGEST_BLOCK  # values in one step of a program

_CODES = tl.constexpr(CODES)


@op
def fake_quantize_blockwise(x: Tensor, code: Tensor, block_size: int, row_length: int) -> Tensor:
    """x float -> the same in its shape and dtype, rounded to `code` with a scale for each block; contiguous.

    x is float32, bfloat16 or float16, in row-major order cut into rows of `row_length`, a divisor of its size, and
    these into blocks of `block_size` <= LARGEST_BLOCK values, the last of which may be short: with row_length =
    x.numel() the blocks are flat, with x.shape[-1] they never cross rows. code (256,) float32, ascending, on the device
    of x.
    """
    out = _fake_quantize_blockwise_fake(x, code, block_size, row_length)
    if x.numel() == 0:
        return out
    codes, scale = quantize_rows(x.reshape(-1, row_length).float(), NearestTable.of(code), block_size)
    return out.copy_(dequantize_rows(codes, scale, code, block_size).reshape(x.shape))


@fake_quantize_blockwise.fake
def _fake_quantize_blockwise_fake(x: Tensor, code: Tensor, block_size: int, row_length: int) -> Tensor:
    _check_blocks(x, code, block_size, row_length)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@op
def fake_quantize_tensorwise(x: Tensor, code: Tensor) -> Tensor:
    """x float of any shape -> the same, rounded to `code` with one scale; the strides are those of empty_like(x).

    x is float32, bfloat16 or float16; code (256,) float32, ascending, on the device of x.
    """
    out = _fake_quantize_tensorwise_fake(x, code)
    if x.numel() == 0:
        return out
    amax = x.abs().amax().float()
    scale = torch.where(amax < SMALLEST_SCALE, 0.0, amax)
    quantizable = (scale > 0) & scale.isfinite()
    codes = NearestTable.of(code).nearest(torch.where(quantizable, x.float() / scale, 0.0))
    return out.copy_(code.index_select(0, codes.view(-1).int()).view(x.shape) * scale)


@fake_quantize_tensorwise.fake
def _fake_quantize_tensorwise_fake(x: Tensor, code: Tensor) -> Tensor:
    check_values(x, code, "fake_quantize_tensorwise")
    return torch.empty_like(x)


def _check_blocks(x: Tensor, code: Tensor, block_size: int, row_length: int) -> None:
    check_values(x, code, "fake_quantize_blockwise")
    if not 1 <= block_size <= LARGEST_BLOCK:
        raise ValueError(f"fake_quantize_blockwise takes blocks of 1 to {LARGEST_BLOCK} values, got {block_size}")
    if x.numel() and (row_length < 1 or x.numel() % row_length):
        raise ValueError(f"fake_quantize_blockwise cannot cut {tuple(x.shape)} into rows of {row_length} values")


@triton.jit
def _fake_quantize_blocks_kernel(
    x_ptr, code_ptr, out_ptr, row_length, block_size, blocks, tiles, BLOCKS: tl.constexpr, WIDTH: tl.constexpr
):
    """BLOCKS blocks of at most WIDTH values at a time; a program takes every num_programs-th tile."""
    nearest = load_nearest(code_ptr)
    values = tl.load(code_ptr + tl.arange(0, _CODES))
    blocks_of_row = tl.cdiv(row_length, block_size)
    lane = tl.arange(0, WIDTH)[None, :]
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        block = tl.cast(tile, tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
        in_row = block % blocks_of_row * block_size + lane
        offset = block // blocks_of_row * row_length + in_row
        mask = (block < blocks) & (lane < block_size) & (in_row < row_length)
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        scale = block_scale(x, axis=1)[:, None]
        quantizable = (scale > 0) & (scale < float("inf"))
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.where(quantizable, scale, 1.0))
        codes = nearest_code(tl.ravel(tl.where(quantizable, x * inverse, 0.0)), nearest)
        out = tl.reshape(tl.gather(values, codes, axis=0), [BLOCKS, WIDTH]) * scale
        tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tensor_amax_kernel(x_ptr, partial_ptr, numel, tiles, TILE: tl.constexpr):
    """The largest magnitude in every num_programs-th tile, NaN above all."""
    bits = tl.zeros([TILE], tl.int32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        offset = tl.cast(tile, tl.int64) * TILE + tl.arange(0, TILE)
        bits = tl.maximum(bits, magnitude_bits(tl.load(x_ptr + offset, mask=offset < numel, other=0.0)))
    tl.store(partial_ptr + tl.program_id(0), tl.max(bits).to(tl.float32, bitcast=True))


@triton.jit
def _fake_quantize_tensor_kernel(
    x_ptr, partial_ptr, code_ptr, out_ptr, numel, tiles, partials, TILE: tl.constexpr, PARTIALS: tl.constexpr
):
    """Each program reduces the partial maxima for itself."""
    partial = tl.arange(0, PARTIALS)
    scale = block_scale(tl.load(partial_ptr + partial, mask=partial < partials, other=0.0), axis=0)
    quantizable = (scale > 0) & (scale < float("inf"))
    divisor = tl.full([TILE], 1.0, tl.float32) * tl.where(quantizable, scale, 1.0)
    nearest = load_nearest(code_ptr)
    values = tl.load(code_ptr + tl.arange(0, _CODES))
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        offset = tl.cast(tile, tl.int64) * TILE + tl.arange(0, TILE)
        x = tl.load(x_ptr + offset, mask=offset < numel, other=0.0).to(tl.float32)
        codes = nearest_code(tl.where(quantizable, tl.div_rn(x, divisor), 0.0), nearest)
        out = tl.gather(values, codes, axis=0) * scale
        tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=offset < numel)


@fake_quantize_blockwise.triton
def _launch_blockwise(x: Tensor, code: Tensor, block_size: int, row_length: int) -> Tensor:
    out = _fake_quantize_blockwise_fake(x, code, block_size, row_length)
    if x.numel():
        width = triton.next_power_of_2(min(block_size, row_length))
        blocks = x.numel() // row_length * triton.cdiv(row_length, block_size)
        tiles = triton.cdiv(blocks, _TILE // width)
        _fake_quantize_blocks_kernel[programs(tiles, x.device)](
            x.contiguous(),
            code.contiguous(),
            out,
            row_length,
            block_size,
            blocks,
            tiles,
            BLOCKS=_TILE // width,
            WIDTH=width,
            enable_fp_fusion=False,
        )
    return out


@fake_quantize_tensorwise.triton
def _launch_tensorwise(x: Tensor, code: Tensor) -> Tensor:
    out = _fake_quantize_tensorwise_fake(x, code)
    numel = x.numel()
    if numel:
        # One scale: the order in memory does not matter, if it is the same for both and without gaps.
        x = x if x.stride() == out.stride() else torch.empty_like(x).copy_(x)
        tiles = triton.cdiv(numel, _TILE)
        grid = programs(tiles, x.device)
        partial = torch.empty(grid, dtype=torch.float32, device=x.device)
        _tensor_amax_kernel[grid](x, partial, numel, tiles, TILE=_TILE)
        _fake_quantize_tensor_kernel[grid](
            x,
            partial,
            code.contiguous(),
            out,
            numel,
            tiles,
            len(partial),
            TILE=_TILE,
            PARTIALS=triton.next_power_of_2(len(partial)),
            enable_fp_fusion=False,
        )
    return out
