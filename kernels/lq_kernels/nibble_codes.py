"""The 4-bit maps in kernels: values to bytes of two codes, and back, each by a table in shared memory.

Neighbouring bounds of nf4, and those of fp4's magnitudes, lie at least 1/12.5 apart, so that a bucket of width 1/15
holds at most one. Tables of 32 buckets have the number of bounds below a bucket and the next bound; one comparison does
the rest. Each table fits into one row of banks, so that a warp reads it without conflicts. No bound lies near the edge
of a bucket: it does not matter how a value there is rounded.
"""

from functools import cache

import torch
from torch import Tensor

from lq_kernels._triton import tl, triton
from lq_kernels.codebooks import four_bit_map, midpoints

MAGNITUDES = 8  # of fp4; bit 3 of its codes is the sign

_BUCKETS = 32
_WIDTH = 4  # of a bucket, in steps
_STEPS = 60.0  # in 1.0: v lies in the bucket (round(v * _STEPS) + _STEPS) // _WIDTH, of which 31 serves no number
_ROUNDING = 2.0**23 + _STEPS  # leaves that integer in the low bits of the mantissa

_BUCKETS_T = tl.constexpr(_BUCKETS)
_LOG_WIDTH_T = tl.constexpr(2)
_STEPS_T = tl.constexpr(_STEPS)
_ROUNDING_T = tl.constexpr(_ROUNDING)
_MAGNITUDES_T = tl.constexpr(MAGNITUDES)


@cache
def ascending(quant_type: str) -> tuple[Tensor, Tensor]:
    """Values in ascending order, of fp4 the magnitudes, float32, and the code of each, uint8."""
    values = four_bit_map(quant_type)
    values, codes = (values[:MAGNITUDES] if quant_type == "fp4" else values).sort()
    return values, codes.to(torch.uint8)


@cache
def encode_table(quant_type: str, device: torch.device) -> Tensor:
    """(64,) int32: of each bucket the bits of the next bound, float32, then of each the number of bounds below it."""
    bounds = midpoints(ascending(quant_type)[0])
    edges = (torch.arange(_BUCKETS) * _WIDTH - 0.5 - _STEPS) / _STEPS
    below = torch.searchsorted(bounds, edges)
    bound = torch.cat([bounds, torch.tensor([torch.inf])])[below]
    return torch.cat([bound.view(torch.int32), below.int()]).to(device)


@cache
def decode_table(quant_type: str, device: torch.device) -> Tensor:
    """(16,) float32: `four_bit_map` on `device`."""
    return four_bit_map(quant_type).to(device)


@triton.jit
def _rank(v, table_ptr):
    """v float32 (n,) -> how many bounds lie below v, int32; of a v that is not finite any number."""
    bucket = (tl.fma(v, _STEPS_T, _ROUNDING_T).to(tl.int32, bitcast=True) >> _LOG_WIDTH_T) & (_BUCKETS_T - 1)
    # One gather for both: a second would store its table in shared memory again, behind a barrier.
    entries = tl.load(table_ptr + tl.arange(0, 2 * _BUCKETS_T))
    both = tl.reshape(tl.join(bucket, bucket + _BUCKETS_T), (2 * v.shape[0],))
    bound, below = tl.split(tl.reshape(tl.gather(entries, both, axis=0), (v.shape[0], 2)))
    bound = bound.to(tl.float32, bitcast=True)
    above = (bound - v).to(tl.uint32, bitcast=True) >> 31  # the sign: cheaper than a comparison
    return below + above.to(tl.int32)


@triton.jit
def encode_pairs(v, table_ptr, FP4: tl.constexpr):
    """v float32 (n,) in [-1, 1] -> (n / 2,) int32 bytes with the nearest codes of 2i and 2i + 1."""
    PAIRS: tl.constexpr = v.shape[0] // 2
    rank = _rank(tl.abs(v) if FP4 else v, table_ptr)
    if FP4:
        rank |= (v < 0).to(tl.int32) * _MAGNITUDES_T
    high, low = tl.split(tl.reshape(rank, (PAIRS, 2)))
    packed = (high << 4) | low
    if FP4:
        # Ranks 0 .. 7 of magnitudes have the codes 0, 1, 6, 7, 4, 5, 2, 3: bit 2 is flipped where bit 1 is set.
        packed ^= (packed << 1) & 0x44
    return packed


@triton.jit
def decode_pairs(packed, table_ptr):
    """packed uint8 (rows, width / 2) -> (rows, width) float32."""
    ROWS: tl.constexpr = packed.shape[0]
    WIDTH: tl.constexpr = packed.shape[1] * 2
    codes = tl.reshape(tl.join(packed >> 4, packed & 15), (ROWS * WIDTH,))
    return tl.reshape(tl.gather(tl.load(table_ptr + tl.arange(0, 16)), codes.to(tl.int32), axis=0), (ROWS, WIDTH))
