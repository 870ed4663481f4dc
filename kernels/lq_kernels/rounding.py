"""Rounding of scaled values to codes, to nearest and stochastically, and the random bits of stochastic rounding.

The bits are a hash of a seed and of the index of a value, so that they do not depend on tiles, launches, devices or
ranks: the reference and the kernel draw the same ones. The hash is `lowbias32`, two multiplications and three shifts,
https://nullprogram.com/blog/2018/07/31/; the seed is hashed before it meets the index.

A value between two codes goes to the upper one with the probability of its distance from the lower one:

    int8   floor(x + u), u uniform in [0, 1) with 24 bits
    fp8    u, uniform below one step of the code, is added to the magnitude; what lies below the step is cut off

so that the expectation of a code is x. int8 cuts x to a multiple of 2^-24 first, fp8 its subnormal codes to one of
2^-20 (e4m3) or 2^-21 (e5m2) steps; a normal code is exact.
"""

import torch
from torch import Tensor

from lq_kernels._triton import tl, triton

# 1.5 * 2^23: added to |x| < 2^22 it leaves round-half-to-even(x) in the low bits of the mantissa.
ROUNDING_OFFSET = tl.constexpr(12582912.0)

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
_MULTIPLIER1, _MULTIPLIER2 = tl.constexpr(_MULTIPLIERS[0]), tl.constexpr(_MULTIPLIERS[1])

FRACTION_BITS = 24  # of an int8 code in fixed point: 127.99 * 2^24 is an int32
_FRACTION_BITS, _FRACTION = tl.constexpr(FRACTION_BITS), tl.constexpr(2.0**FRACTION_BITS)


def random_bits(seed: Tensor, index: Tensor) -> Tensor:
    """seed int64 with one element, index int64 >= 0 -> int64 of its shape, uniform in [0, 2^32).

    Different indices below 2^32 give different bits for the same seed.
    """
    low, high = index & _WORD, index >> 32
    return _hashed(low ^ _hashed(high ^ _hashed(seed.reshape(()) & _WORD)))


def _hashed(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * _MULTIPLIERS[0]) & _WORD
    x = ((x ^ (x >> 15)) * _MULTIPLIERS[1]) & _WORD
    return x ^ (x >> 16)


def round_to_int8(x: Tensor, bits: Tensor) -> Tensor:
    """x float32 in [-127, 127], bits of `random_bits` -> int8, one of the two integers around x."""
    fixed = (x * 2.0**FRACTION_BITS).long() + (bits >> (32 - FRACTION_BITS))
    return (fixed >> FRACTION_BITS).to(torch.int8)


def round_to_mantissa(x: Tensor, bits: Tensor, mantissa: int, smallest_normal: float) -> Tensor:
    """x float32, bits of `random_bits` -> float32, one of the two values around x with a mantissa of so many bits.

    Below smallest_normal values are as far apart as just above it. x is at most the largest value of that kind.
    """
    offset = torch.where(x.abs() < smallest_normal, torch.full_like(x, smallest_normal).copysign(x), 0.0)
    dropped = 23 - mantissa
    word = (x + offset).view(torch.int32) + (bits >> (32 - dropped)).int()
    return ((word >> dropped) << dropped).view(torch.float32) - offset


@triton.jit
def int8_nearest(x):
    """float32 in [-127, 127] -> the nearest int8, ties to even (torch.round)."""
    return (x + ROUNDING_OFFSET).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def int8_stochastic(x, word):
    """`round_to_int8`, with `random_word`."""
    fixed = (x * _FRACTION).to(tl.int32) + (word >> (32 - _FRACTION_BITS)).to(tl.int32)
    return (fixed >> _FRACTION_BITS).to(tl.int8)


@triton.jit
def mantissa_stochastic(x, word, MANTISSA: tl.constexpr, SMALLEST_NORMAL: tl.constexpr):
    """`round_to_mantissa`, with `random_word`."""
    DROPPED: tl.constexpr = 23 - MANTISSA
    offset = tl.where(tl.abs(x) < SMALLEST_NORMAL, tl.where(x < 0, -SMALLEST_NORMAL, SMALLEST_NORMAL), 0.0)
    bits = (x + offset).to(tl.int32, bitcast=True) + (word >> (32 - DROPPED)).to(tl.int32)
    return ((bits >> DROPPED) << DROPPED).to(tl.float32, bitcast=True) - offset


@triton.jit
def hashed_seed(seed, high):
    """The seed and the upper words of indices, hashed: what `random_word` takes; one for all indices below 2^32."""
    return _hash(high.to(tl.uint32) ^ _hash(seed.to(tl.uint32)))


@triton.jit
def random_word(hashed, low):
    """`random_bits` of the indices whose lower words are `low`, as uint32."""
    return _hash(low.to(tl.uint32) ^ hashed)


@triton.jit
def random_words(seed, index, BELOW_32_BITS: tl.constexpr):
    """`random_bits` of indices, int64, as uint32; cheaper if all of them are below 2^32."""
    high = tl.full([], 0, tl.int64) if BELOW_32_BITS else index >> 32
    return random_word(hashed_seed(seed, high), index)


@triton.jit
def _hash(x):
    x = (x ^ (x >> 16)) * _MULTIPLIER1
    x = (x ^ (x >> 15)) * _MULTIPLIER2
    return x ^ (x >> 16)
