"""The dynamic map in kernels: codes to values by a table, values to codes by arithmetic.

Inside a decade the map is linear, so the code of a magnitude x is a rounded linear function of x, and only the decade
has to be found. The bounds between decades lie in different octaves of float32: a table by the exponent of x holds
the one bound in that octave, with the number of decades below it in the lowest mantissa bits (which moves the bound by
less than 5e-7 of itself). A second table holds slope and offset of each decade. Both have at most 32 entries, so that
a warp reads them from shared memory in one cycle; lanes that would search 255 midpoints take 8.

Codes differ from the nearest by at most one, and only for values within about 1e-5 of a cell from a midpoint.
"""

from functools import cache

import torch
from torch import Tensor

from lq_kernels._triton import tl, triton
from lq_kernels.codebooks import CODES, DECADES, dynamic_map, midpoints, zero_code
from lq_kernels.rounding import ROUNDING_OFFSET

_OCTAVES = 32  # of float32 exponents modulo 32: 2^-23 .. 2^1 are the entries 8 .. 31 and 0
_RANKS = 16  # 0: nearer to zero than to the first value; 1 .. 7: a decade; 8: nearer to 1 than to the last value
_SMALLEST = 2.0**-23  # everything below has the code of zero

SIGNED_MAP = "dynamic_symmetric"
UNSIGNED_MAP = "dynamic_unsigned"

# Offsets in the tensor of `constants`: code values, bounds by octave, slope and offset by decade; signed, unsigned.
_VALUES, _BOUNDS, _SLOPES, _OFFSETS = 0, 2 * CODES, 2 * (CODES + _OCTAVES), 2 * (CODES + _OCTAVES + _RANKS)

_CODES = tl.constexpr(CODES)
_OCTAVES_T = tl.constexpr(_OCTAVES)
_RANKS_T = tl.constexpr(_RANKS)
_SMALLEST_T = tl.constexpr(_SMALLEST)
_BOUNDS_T = tl.constexpr(_BOUNDS)
_SLOPES_T = tl.constexpr(_SLOPES)
_OFFSETS_T = tl.constexpr(_OFFSETS)

# -1 takes the place of the last value below it, so its cell begins at the midpoint of -1 and the value after that.
_LOWEST_CELL = tl.constexpr(float(midpoints(dynamic_map(SIGNED_MAP))[0]))
# The last code of a decade of n values as a function of its offset. Signed: last = 2 n - 1, offset = 8 n / 9 - 1/2;
# unsigned: last = 2 n - 2, offset = 8 n / 9 - 3/2.
_LAST_SLOPE = tl.constexpr(2.25)
_LAST_OFFSET_SIGNED = tl.constexpr(0.125)
_LAST_OFFSET_UNSIGNED = tl.constexpr(1.375)


@cache
def constants(device: torch.device) -> Tensor:
    """(640,) float32 on `device`: everything that the functions below read; see the offsets above."""
    maps = [dynamic_map(SIGNED_MAP), dynamic_map(UNSIGNED_MAP)]
    positive = [maps[0][zero_code(SIGNED_MAP) :], maps[1]]
    lines = [_lines(first_count) for first_count in (1, 2)]
    bounds = [_bounds_by_octave(values, first_count) for values, first_count in zip(positive, (1, 2), strict=True)]
    return torch.cat([*maps, *bounds, *(slopes for slopes, _ in lines), *(offsets for _, offsets in lines)]).to(device)


def _bounds_by_octave(positive: Tensor, first_count: int) -> Tensor:
    """(32,) float32: at 2^e <= x < 2^(e+1), entry e mod 32 is the bound there, else 2, with the rank below it."""
    ranks = torch.tensor([first_count * (2**decade - 1) for decade in range(DECADES + 1)])
    bounds = midpoints(positive)[ranks]
    exponents = torch.frexp(bounds).exponent - 1
    table = torch.empty(_OCTAVES)
    for exponent in range(1 - _OCTAVES, 1):
        inside = (exponents == exponent).nonzero().flatten()
        rank = int((exponents < exponent).sum())
        bound = bounds[inside] if len(inside) else torch.tensor([2.0])
        table[exponent + 127 & _OCTAVES - 1] = (bound.view(torch.int32) & ~7 | rank & 7).view(torch.float32)
    # From 1 on, by a rounding error: always the last rank, which is one more than three bits hold.
    table[127 & _OCTAVES - 1] = torch.tensor(DECADES, dtype=torch.int32).view(torch.float32)
    return table


def _lines(first_count: int) -> tuple[Tensor, Tensor]:
    """Slope and offset by rank: code = round(slope x + offset), counted from the code of zero."""
    last = first_count * (2**DECADES - 1) + 1
    slopes, offsets = torch.zeros(_RANKS, dtype=torch.float64), torch.zeros(_RANKS, dtype=torch.float64)
    for decade in range(DECADES):
        count = first_count << decade
        slopes[decade + 1] = count / 0.9 * 10.0 ** (DECADES - 1 - decade)
        offsets[decade + 1] = first_count * (2**decade - 1) + 1 - count / 9 - 0.5  # - 1/2: rounding instead of floor
    offsets[DECADES + 1] = last
    return slopes.float(), offsets.float()


@triton.jit
def load_values(constants_ptr, SIGNED: tl.constexpr):
    """The 256 values of a map, for `decode`."""
    which: tl.constexpr = 0 if SIGNED else 1
    return tl.load(constants_ptr + which * _CODES + tl.arange(0, _CODES))


@triton.jit
def load_lines(constants_ptr, SIGNED: tl.constexpr):
    """Bounds by octave (32,), slopes and offsets by rank (16,) of a map, for `encode_*`."""
    which: tl.constexpr = 0 if SIGNED else 1
    rank = tl.arange(0, _RANKS_T)
    bounds = tl.load(constants_ptr + _BOUNDS_T + which * _OCTAVES_T + tl.arange(0, _OCTAVES_T))
    slopes = tl.load(constants_ptr + _SLOPES_T + which * _RANKS_T + rank)
    offsets = tl.load(constants_ptr + _OFFSETS_T + which * _RANKS_T + rank)
    return bounds, slopes, offsets


@triton.jit
def decode(codes, values):
    """codes uint8 (n,) -> their values, float32."""
    return tl.gather(values, codes.to(tl.int32), axis=0)


@triton.jit
def _distance(magnitude, bounds, slopes, offsets, LAST_OFFSET: tl.constexpr):
    """magnitude in [0, 1] -> its distance from the code of zero, to be rounded."""
    magnitude = tl.maximum(magnitude, _SMALLEST_T)
    octave = (magnitude.to(tl.int32, bitcast=True) >> 23) & (_OCTAVES_T - 1)
    bound = tl.gather(bounds, octave, axis=0)
    rank = (bound.to(tl.int32, bitcast=True) & 7) + (magnitude > bound).to(tl.int32)
    offset = tl.gather(offsets, rank, axis=0)
    line = magnitude * tl.gather(slopes, rank, axis=0) + offset
    return tl.minimum(line, offset * _LAST_SLOPE + LAST_OFFSET)


@triton.jit
def encode_unsigned(v, bounds, slopes, offsets):
    """v float32 in [0, 1] -> the code of the nearest value of dynamic_unsigned, uint8."""
    distance = _distance(v, bounds, slopes, offsets, _LAST_OFFSET_UNSIGNED)
    return (distance + ROUNDING_OFFSET).to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def encode_signed(v, bounds, slopes, offsets):
    """v float32 in [-1, 1] -> the code of the nearest value of dynamic_symmetric, uint8."""
    distance = _distance(tl.abs(v), bounds, slopes, offsets, _LAST_OFFSET_SIGNED)
    lowest = tl.where(v < _LOWEST_CELL, -127.0, -126.0)
    signed = tl.maximum(tl.where(v < 0, -distance, distance), lowest)
    return (signed + (ROUNDING_OFFSET + 127.0)).to(tl.int32, bitcast=True).to(tl.uint8)
