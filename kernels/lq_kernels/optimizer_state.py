"""How optimizers keep a moment between steps: in 8 bits by blocks of 256 that never cross rows, or in float32.

A parameter with 8-bit state keeps uint8 codes of its shape and float32 scales (rows, ceil(columns / 256)) for each
moment; the first moment is coded in the map dynamic_symmetric, the second in dynamic_unsigned. Below are the state
and its reference in torch, then the functions by which kernels load and store it.
"""

import torch
from torch import Tensor

from lq_kernels._triton import tl, triton
from lq_kernels.blockwise import BLOCK_SIZE, block_scale, dequantize_rows, quantize_rows
from lq_kernels.codebooks import dynamic_map, zero_code
from lq_kernels.dynamic_map import (
    SIGNED_MAP,
    UNSIGNED_MAP,
    decode,
    encode_signed,
    encode_unsigned,
    load_lines,
    load_values,
)
from lq_kernels.multi_tensor import NUMEL, ROW_LENGTH, State, address, pointer

CODE_NAMES = {"1": SIGNED_MAP, "2": UNSIGNED_MAP}  # the map of the first and of the second moment

_BLOCK = tl.constexpr(BLOCK_SIZE)


def new_state(param: Tensor, eight_bit: bool) -> State:
    """Zero moments for `param`, in 8 bits by rows or in float32, and a step of 0."""
    step = torch.zeros((), device=param.device)
    if not eight_bit:
        moments = {f"state{i}": torch.zeros(param.shape, device=param.device) for i in CODE_NAMES}
        return {"step": step, **moments}
    scale_shape = (param.shape[0], -(-(param.numel() // param.shape[0]) // BLOCK_SIZE))
    state = {"step": step}
    for i, name in CODE_NAMES.items():
        state[f"codes{i}"] = torch.full(param.shape, zero_code(name), dtype=torch.uint8, device=param.device)
        state[f"scale{i}"] = torch.zeros(scale_shape, device=param.device)
    return state


def load_moment(state: State, i: str) -> Tensor:
    """The first ("1") or second ("2") moment as float32; float32 state itself, not a copy."""
    if f"state{i}" in state:
        return state[f"state{i}"]
    codes = state[f"codes{i}"]
    return dequantize_rows(codes, state[f"scale{i}"], dynamic_map(CODE_NAMES[i]).to(codes.device))


def store_moment(state: State, i: str, moment: Tensor) -> None:
    """Writes a float32 moment into the state, in place."""
    if f"state{i}" in state:
        state[f"state{i}"].copy_(moment)
        return
    codes, scale = quantize_rows(moment, dynamic_map(CODE_NAMES[i]))
    state[f"codes{i}"].copy_(codes)
    state[f"scale{i}"].copy_(scale)


@triton.jit
def block_tile(table_ptr, tensor, first_block, active, BLOCKS: tl.constexpr, FLAT: tl.constexpr):
    """Offsets and mask (BLOCKS * 256,) of the values of neighbouring blocks, and the mask (BLOCKS,) of the blocks."""
    row_length = address(table_ptr, tensor, ROW_LENGTH)
    numel = tl.where(active != 0, address(table_ptr, tensor, NUMEL), 0)
    lane = tl.arange(0, BLOCKS * _BLOCK)
    block = first_block + tl.arange(0, BLOCKS)
    if FLAT:
        offset = first_block * _BLOCK + lane
        return offset, lane // _BLOCK < numel // _BLOCK - first_block, block < numel // _BLOCK
    else:
        blocks_per_row = tl.cdiv(row_length, _BLOCK)
        column = (block % blocks_per_row)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        offset = (block // blocks_per_row)[:, None] * row_length + column
        mask = (column < row_length) & (offset < numel)
        return tl.ravel(offset), tl.ravel(mask), block < numel // row_length * blocks_per_row


@triton.jit
def _spread(scale, BLOCKS: tl.constexpr):
    """(BLOCKS,) -> (BLOCKS * 256,): each block's number for each of its values."""
    return tl.ravel(tl.broadcast_to(scale[:, None], [BLOCKS, _BLOCK]))


@triton.jit
def load_moment_tile(
    table_ptr,
    tensor,
    constants_ptr,
    first_block,
    offset,
    mask,
    block_mask,
    STATE: tl.constexpr,
    SCALE: tl.constexpr,
    SIGNED: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The float32 values of a tile of the moment in the columns STATE and SCALE; 8-bit ones are wrong beyond `mask`."""
    if EIGHT_BIT:
        codes = tl.load(pointer(table_ptr, tensor, STATE, tl.uint8, ALIGNED) + offset, mask=mask, other=0)
        scale_ptr = pointer(table_ptr, tensor, SCALE, tl.float32, False) + first_block + tl.arange(0, BLOCKS)
        scale = tl.load(scale_ptr, mask=block_mask, other=0.0)
        return decode(codes, load_values(constants_ptr, SIGNED)) * _spread(scale, BLOCKS)
    else:
        return tl.load(pointer(table_ptr, tensor, STATE, tl.float32, ALIGNED) + offset, mask=mask, other=0.0)


@triton.jit
def store_moment_tile(
    x,
    table_ptr,
    tensor,
    constants_ptr,
    first_block,
    offset,
    mask,
    block_mask,
    STATE: tl.constexpr,
    SCALE: tl.constexpr,
    SIGNED: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Writes a tile of float32 values where `load_moment_tile` finds them."""
    if EIGHT_BIT:
        # Beyond the mask x is not zero: codes were loaded as 0 there, which stands for -1.
        scale = block_scale(tl.reshape(tl.where(mask, x, 0.0), [BLOCKS, _BLOCK]), axis=1)
        inverse = 1.0 / tl.where(scale == 0, float("inf"), scale)
        v = x * _spread(inverse, BLOCKS)
        bounds, slopes, offsets = load_lines(constants_ptr, SIGNED)
        codes = encode_signed(v, bounds, slopes, offsets) if SIGNED else encode_unsigned(v, bounds, slopes, offsets)
        tl.store(pointer(table_ptr, tensor, STATE, tl.uint8, ALIGNED) + offset, codes, mask=mask)
        scale_ptr = pointer(table_ptr, tensor, SCALE, tl.float32, False) + first_block + tl.arange(0, BLOCKS)
        tl.store(scale_ptr, scale, mask=block_mask)
    else:
        tl.store(pointer(table_ptr, tensor, STATE, tl.float32, ALIGNED) + offset, x, mask=mask)
