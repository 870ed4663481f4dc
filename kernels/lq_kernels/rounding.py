"""Rounding of scaled values to integers, and the random bits of stochastic rounding.

The bits are a hash of a seed and of the index of a value, so that they do not depend on tiles, launches, devices or
ranks: the reference and the kernel draw the same ones. The hash is `lowbias32`, two multiplications and three shifts,
https://nullprogram.com/blog/2018/07/31/; the seed is hashed before it meets the index.
"""

from torch import Tensor

from lq_kernels._triton import tl, triton

# 1.5 * 2^23: added to |x| < 2^22 it leaves round-half-to-even(x) in the low bits of the mantissa.
ROUNDING_OFFSET = tl.constexpr(12582912.0)

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
_MULTIPLIER1, _MULTIPLIER2 = tl.constexpr(_MULTIPLIERS[0]), tl.constexpr(_MULTIPLIERS[1])


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


@triton.jit
def int8_nearest(x):
    """float32 in [-127, 127] -> the nearest int8, ties to even (torch.round)."""
    return (x + ROUNDING_OFFSET).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def hashed_seed(seed, high):
    """The seed and the upper words of indices, hashed: what `random_word` takes; one for all indices below 2^32."""
    return _hash(high.to(tl.uint32) ^ _hash(seed.to(tl.uint32)))


@triton.jit
def random_word(hashed, low):
    """`random_bits` of the indices whose lower words are `low`, as uint32."""
    return _hash(low.to(tl.uint32) ^ hashed)


@triton.jit
def _hash(x):
    x = (x ^ (x >> 16)) * _MULTIPLIER1
    x = (x ^ (x >> 15)) * _MULTIPLIER2
    return x ^ (x >> 16)
