"""How optimizers keep a moment between steps: in 8 bits by blocks of 256 that never cross rows, or in float32.

A parameter with 8-bit state keeps codes of its shape and float32 scales (rows, ceil(columns / 256)) for each moment.
Format "dynamic": uint8 codes, in the map dynamic_symmetric for moments with a sign and in dynamic_unsigned for those
without, where only 0 is coded as 0. Format "e4m3": float8_e4m3fn codes (e4m3.py). Below are the state and its
reference in torch, then the functions by which kernels load and store it.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from lq_kernels._triton import tl, triton
from lq_kernels.blockwise import BLOCK_SIZE, SMALLEST_SCALE, block_scale, dequantize_rows, quantize_rows
from lq_kernels.codebooks import dynamic_map, zero_code
from lq_kernels.dynamic_map import (
    SIGNED_MAP,
    UNSIGNED_MAP,
    decode,
    encode_signed,
    encode_unsigned,
    line_pointers,
    load_values,
)
from lq_kernels.e4m3 import decode_e4m3, dequantize_e4m3, encode_e4m3, quantize_e4m3, root_scale, value_scale
from lq_kernels.multi_tensor import NUMEL, ROW_LENGTH, SCALE, STATE, State, address, pointer
from lq_kernels.nearest import NearestTable

FORMATS = ("float32", "dynamic", "e4m3")

_BLOCK = tl.constexpr(BLOCK_SIZE)
_ZERO_CODE = tl.constexpr(zero_code(SIGNED_MAP))
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)


def code_name(signed: bool) -> str:
    """The map of a moment with or without a sign."""
    return SIGNED_MAP if signed else UNSIGNED_MAP


def format_of(state: State) -> str:
    """The format of a parameter's state, read from its keys."""
    if "codes1" not in state:
        return "float32"
    return "dynamic" if state["codes1"].dtype == torch.uint8 else "e4m3"


def new_state(param: Tensor, kind: str, signs: Sequence[bool], initial: float = 0.0) -> State:
    """A step of 0 and one moment full of `initial` for each of `signs`: True where the moment has a sign."""
    state = {"step": torch.zeros((), device=param.device)}
    if kind == "float32":
        for i, _ in enumerate(signs, 1):
            state[f"state{i}"] = torch.full(param.shape, float(initial), dtype=torch.float32, device=param.device)
        return state
    rows = param.shape[0]
    scale_shape = (rows, -(-(param.numel() // rows) // BLOCK_SIZE))
    for i, signed in enumerate(signs, 1):
        code = zero_code(code_name(signed)) if kind == "dynamic" else 0
        codes = torch.full(param.shape, code, dtype=torch.uint8, device=param.device)
        state[f"codes{i}"] = codes if kind == "dynamic" else codes.view(torch.float8_e4m3fn)
        state[f"scale{i}"] = torch.zeros(scale_shape, device=param.device)
        if initial:
            store_moment(state, i, torch.full(param.shape, float(initial), device=param.device), signed)
    return state


def load_moment(state: State, i: int, signed: bool) -> Tensor:
    """Moment number i, from 1, as float32; float32 state itself, not a copy."""
    if f"state{i}" in state:
        return state[f"state{i}"]
    codes, scale = state[f"codes{i}"], state[f"scale{i}"]
    if codes.dtype == torch.uint8:
        return dequantize_rows(codes, scale, dynamic_map(code_name(signed)).to(codes.device))
    return dequantize_e4m3(codes, scale, roots=not signed)


def store_moment(state: State, i: int, moment: Tensor, signed: bool) -> None:
    """Writes a float32 moment into the state, in place."""
    if f"state{i}" in state:
        state[f"state{i}"].copy_(moment)
        return
    if state[f"codes{i}"].dtype == torch.uint8:
        codes, scale = quantize_rows(moment, _nearest_table(signed))
    else:
        codes, scale = quantize_e4m3(moment, roots=not signed)
    state[f"codes{i}"].copy_(codes)
    state[f"scale{i}"].copy_(scale)


@cache
def _nearest_table(signed: bool) -> NearestTable:
    return NearestTable.of(dynamic_map(code_name(signed)), keep_small=not signed)


@triton.jit
def block_tile(table_ptr, tensor, first_block, active, BLOCKS: tl.constexpr, FLAT: tl.constexpr):
    """Neighbouring blocks: where they start, offsets and mask (BLOCKS * 256,), and the mask (BLOCKS,) of the blocks."""
    row_length = address(table_ptr, tensor, ROW_LENGTH)
    numel = tl.where(active != 0, address(table_ptr, tensor, NUMEL), 0)
    block = tl.arange(0, BLOCKS)
    if FLAT:
        lane = tl.arange(0, BLOCKS * _BLOCK)
        remaining = tl.minimum(numel // _BLOCK - first_block, BLOCKS).to(tl.int32)
        return first_block * _BLOCK, lane, lane // _BLOCK < remaining, block < remaining
    else:
        blocks_per_row = tl.cdiv(row_length, _BLOCK)
        block = first_block + block
        column = (block % blocks_per_row)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        offset = (block // blocks_per_row)[:, None] * row_length + column
        mask = (column < row_length) & (offset < numel)
        return first_block * 0, tl.ravel(offset), tl.ravel(mask), block < numel // row_length * blocks_per_row


@triton.jit
def _spread(scale, BLOCKS: tl.constexpr):
    """(BLOCKS,) -> (BLOCKS * 256,): each block's number for each of its values."""
    return tl.ravel(tl.broadcast_to(scale[:, None], [BLOCKS, _BLOCK]))


@triton.jit
def _block_amax(x, SIGNED: tl.constexpr):
    """`block_scale` by rows; what is never negative needs no absolute values."""
    if SIGNED:
        return block_scale(x, axis=1)
    else:
        amax = tl.max(x.to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)
        return tl.where(amax < _SMALLEST_SCALE, 0.0, amax)


@triton.jit
def _scale_pointers(table_ptr, tensor, first_block, INDEX: tl.constexpr, BLOCKS: tl.constexpr):
    return pointer(table_ptr, tensor, SCALE + INDEX, tl.float32, False) + first_block + tl.arange(0, BLOCKS)


@triton.jit
def load_moment_tile(
    table_ptr,
    tensor,
    constants_ptr,
    first_block,
    base,
    offset,
    mask,
    block_mask,
    decay,
    INDEX: tl.constexpr,
    SIGNED: tl.constexpr,
    FORMAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
    PTX: tl.constexpr,
):
    """The float32 values of a tile of moment INDEX, from 0, times `decay`."""
    if FORMAT == "float32":
        state_ptr = pointer(table_ptr, tensor, STATE + INDEX, tl.float32, ALIGNED)
        return tl.load(state_ptr + base + offset, mask=mask, other=0.0) * decay
    else:
        codes_ptr = pointer(table_ptr, tensor, STATE + INDEX, tl.uint8, ALIGNED)
        codes = tl.load(codes_ptr + base + offset, mask=mask, other=_ZERO_CODE if SIGNED and FORMAT == "dynamic" else 0)
        scale = tl.load(_scale_pointers(table_ptr, tensor, first_block, INDEX, BLOCKS), mask=block_mask, other=0.0)
        if FORMAT == "dynamic":
            return decode(codes, load_values(constants_ptr, SIGNED)) * _spread(scale * decay, BLOCKS)
        elif SIGNED:
            return decode_e4m3(codes, SIGNED, PTX) * _spread(scale * decay, BLOCKS)
        else:
            root = decode_e4m3(codes, SIGNED, PTX)
            return root * root * _spread(scale * scale * decay, BLOCKS)


@triton.jit
def store_moment_tile(
    x,
    table_ptr,
    tensor,
    constants_ptr,
    first_block,
    base,
    offset,
    mask,
    block_mask,
    INDEX: tl.constexpr,
    SIGNED: tl.constexpr,
    FORMAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCKS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Writes a tile of float32 values where `load_moment_tile` finds them."""
    if FORMAT == "float32":
        state_ptr = pointer(table_ptr, tensor, STATE + INDEX, tl.float32, ALIGNED)
        tl.store(state_ptr + base + offset, x, mask=mask)
    else:
        if not FLAT:
            x = tl.where(mask, x, 0.0)  # beyond the mask an eps of 0 makes 0 / 0
        scale = _block_amax(tl.reshape(x, [BLOCKS, _BLOCK]), SIGNED)
        if FORMAT == "dynamic":
            inverse = _spread(1.0 / tl.where(scale == 0, float("inf"), scale), BLOCKS)
            codes = _dynamic_codes(x, inverse, constants_ptr, SIGNED, PTX)
        else:
            scale = value_scale(scale) if SIGNED else root_scale(scale)
            inverse = _spread(1.0 / tl.where(scale == 0, float("inf"), scale), BLOCKS)
            codes = encode_e4m3(x, inverse, SIGNED, PTX)
        codes_ptr = pointer(table_ptr, tensor, STATE + INDEX, tl.uint8, ALIGNED)
        tl.store(codes_ptr + base + offset, codes, mask=mask)
        tl.store(_scale_pointers(table_ptr, tensor, first_block, INDEX, BLOCKS), scale, mask=block_mask)


@triton.jit
def _dynamic_codes(x, inverse, constants_ptr, SIGNED: tl.constexpr, PTX: tl.constexpr):
    bounds_ptr, lines_ptr = line_pointers(constants_ptr, SIGNED, True)
    if SIGNED:
        return encode_signed(x, bounds_ptr, lines_ptr, inverse, PTX)
    else:
        return encode_unsigned(x, bounds_ptr, lines_ptr, inverse)
