"""Rounding of scaled values to integers, in a form that costs one addition on a GPU."""

from lq_kernels._triton import tl, triton

# 1.5 * 2^23: added to |x| < 2^22 it leaves round-half-to-even(x) in the low bits of the mantissa.
ROUNDING_OFFSET = tl.constexpr(12582912.0)


@triton.jit
def int8_nearest(x):
    """float32 in [-127, 127] -> the nearest int8, ties to even (torch.round)."""
    return (x + ROUNDING_OFFSET).to(tl.int32, bitcast=True).to(tl.int8)
