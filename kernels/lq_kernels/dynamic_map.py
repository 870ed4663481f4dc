"""The dynamic map in kernels: codes to values by a table, values to codes by arithmetic.

Inside a decade the map is linear, so the code of a magnitude x is a rounded linear function of x, and only the decade
has to be found. The bounds between decades lie in different octaves of float32: a table by the exponent of x holds the
one bound in that octave, or 2 for none, and a table by exponent and side of that bound holds slope and offset of the
line. Both are loaded through the first-level cache: AdamW on an H200 took 14.4 ms with copies of them in shared memory
and 11.3 without. Magnitudes of a block lie in few octaves, so that a warp reads few lines; lanes that would search 255
midpoints take 8 steps.

Codes differ from the nearest by at most one, and only for values within about 1e-5 of a cell from a midpoint. With
KEEP_SMALL only 0 has the code of zero in dynamic_unsigned: a second moment that is kept as 0 beside a first moment
that is not would divide it by eps.
"""

from functools import cache

import torch
from torch import Tensor

from lq_kernels._triton import tl, triton
from lq_kernels.approximate import with_sign
from lq_kernels.codebooks import CODES, DECADES, dynamic_map, midpoints, zero_code
from lq_kernels.rounding import ROUNDING_OFFSET

SIGNED_MAP = "dynamic_symmetric"
UNSIGNED_MAP = "dynamic_unsigned"

_EXPONENTS = 256  # of float32
_SIDES = 2 * _EXPONENTS  # entry 2 e + 1 is for values above the bound of exponent e
_STEEP = 2.0**127  # takes every normal positive number to the first code

# Offsets in the tensor of `constants`: code values, bounds by exponent, pairs of slope and offset by side; each for the
# signed map and the unsigned, and the unsigned pairs once more for KEEP_SMALL.
_BOUNDS, _LINES = 2 * CODES, 2 * (CODES + _EXPONENTS)

_CODES = tl.constexpr(CODES)
_EXPONENTS_T = tl.constexpr(_EXPONENTS)
_SIDES_T = tl.constexpr(_SIDES)
_BOUNDS_T = tl.constexpr(_BOUNDS)
_LINES_T = tl.constexpr(_LINES)

# -1 takes the place of the last value below it, so its cell begins at the midpoint of -1 and the value after that,
# where the distance from zero is 126.75.
_LOWEST_CELL = tl.constexpr(-126.75)
# The last code of a decade of n values as a function of its offset. Signed: last = 2 n - 1, offset = 8 n / 9 - 1/2;
# unsigned: last = 2 n - 2, offset = 8 n / 9 - 3/2.
_LAST_SLOPE = tl.constexpr(2.25)
_LAST_OFFSET_SIGNED = tl.constexpr(0.125)
_LAST_OFFSET_UNSIGNED = tl.constexpr(1.375)


@cache
def constants(device: torch.device) -> Tensor:
    """(4096,) float32 on `device`: everything that the functions below read; see the offsets above."""
    signed, unsigned = dynamic_map(SIGNED_MAP), dynamic_map(UNSIGNED_MAP)
    signed_bounds, signed_lines = _lines(signed[zero_code(SIGNED_MAP) :], first_count=1)
    bounds, lines = _lines(unsigned, first_count=2)
    keeping = torch.where((lines == 0).all(dim=1, keepdim=True), torch.tensor([_STEEP, 0.0]), lines)
    tables = [signed, unsigned, signed_bounds, bounds, signed_lines.flatten(), lines.flatten(), keeping.flatten()]
    return torch.cat(tables).to(device)


def _lines(positive: Tensor, first_count: int) -> tuple[Tensor, Tensor]:
    """Bounds (256,), slopes and offsets (512, 2) float32: code = round(slope x + offset), from the code of zero on."""
    ranks = torch.tensor([first_count * (2**decade - 1) for decade in range(DECADES + 1)])
    decade_bounds = midpoints(positive)[ranks]
    exponents = torch.frexp(decade_bounds).exponent + 126
    bounds = torch.full((_EXPONENTS,), 2.0).index_put((exponents,), decade_bounds)
    # The number of decade bounds below: 0 is nearer to zero than to the first value, 8 nearer to 1 than to the last.
    rank = torch.stack([(exponents < e).sum() + torch.tensor([0, 1]) for e in range(_EXPONENTS)]).clamp(max=DECADES + 1)
    count = first_count * 2.0 ** (rank.double() - 1)
    slopes = count / 0.9 * 10.0 ** (DECADES - rank.double())
    offsets = count * (8 / 9) + (0.5 - first_count)
    slopes[rank == 0], offsets[rank == 0] = 0.0, 0.0
    slopes[rank > DECADES], offsets[rank > DECADES] = 0.0, first_count * (2.0**DECADES - 1) + 1
    return bounds, torch.stack([slopes.flatten(), offsets.flatten()], dim=1).float()


@triton.jit
def load_values(constants_ptr, SIGNED: tl.constexpr):
    """The 256 values of a map, for `decode`."""
    which: tl.constexpr = 0 if SIGNED else 1
    return tl.load(constants_ptr + which * _CODES + tl.arange(0, _CODES))


@triton.jit
def line_pointers(constants_ptr, SIGNED: tl.constexpr, KEEP_SMALL: tl.constexpr = False):
    """Where `encode_*` find the bounds by exponent and the lines by side; a line is two float32 in an int64."""
    which: tl.constexpr = 0 if SIGNED else 1
    lines: tl.constexpr = which + 1 if KEEP_SMALL and not SIGNED else which
    lines_ptr = (constants_ptr + _LINES_T + lines * 2 * _SIDES_T).to(tl.pointer_type(tl.int64), bitcast=True)
    return constants_ptr + _BOUNDS_T + which * _EXPONENTS_T, lines_ptr


@triton.jit
def decode(codes, values):
    """codes uint8 (n,) -> their values, float32."""
    return tl.gather(values, codes.to(tl.int32), axis=0)


@triton.jit
def _distance(magnitude, bounds_ptr, lines_ptr, LAST_OFFSET: tl.constexpr):
    """magnitude >= 0 -> its distance from the code of zero, to be rounded."""
    exponent = magnitude.to(tl.uint32, bitcast=True) >> 23
    bound = tl.load(bounds_ptr + exponent.to(tl.int32))
    # The sign of the difference is the side; shifts of two words by one are one instruction.
    side = (exponent << 1) | ((bound - magnitude).to(tl.uint32, bitcast=True) >> 31)
    line = tl.load(lines_ptr + side.to(tl.int32))
    slope = line.to(tl.int32).to(tl.float32, bitcast=True)
    offset = (line >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.minimum(magnitude * slope + offset, offset * _LAST_SLOPE + LAST_OFFSET)


@triton.jit
def encode_unsigned(x, bounds_ptr, lines_ptr, inverse=1.0):
    """x float32, x * inverse in [0, 1] -> the code of the nearest value of dynamic_unsigned, uint8."""
    distance = _distance(tl.abs(x) * inverse, bounds_ptr, lines_ptr, _LAST_OFFSET_UNSIGNED)
    return (distance + ROUNDING_OFFSET).to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def encode_signed(x, bounds_ptr, lines_ptr, inverse=1.0, PTX: tl.constexpr = False):
    """x float32, x * inverse in [-1, 1] -> the code of the nearest value of dynamic_symmetric, uint8."""
    distance = _distance(tl.abs(x) * inverse, bounds_ptr, lines_ptr, _LAST_OFFSET_SIGNED)
    signed = with_sign(distance, x, PTX)
    signed = tl.maximum(signed, tl.where(signed < _LOWEST_CELL, -127.0, -126.0))
    return (signed + (ROUNDING_OFFSET + 127.0)).to(tl.int32, bitcast=True).to(tl.uint8)
