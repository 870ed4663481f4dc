"""Code books: the values that codes stand for, each with its source.

8-bit maps are (256,) float32, ascending; a map with fewer values is filled up with zeros. They are computed in float64
and rounded once, so that every machine has the same bits; bitsandbytes rounds more than once on its way to dynamic,
linear and normal maps, and differs by up to 1.5e-7 of a value, 1.2e-7 of the largest.

The dynamic map spends its codes on decades 10^(i - E + 1), i = 0 .. E - 1, with twice as many in each as in the one
below: of B bits decade i gets n = 2^(i + B - 1 - E) (signed, for each sign) or n = 2^(i + B - E) (unsigned) values,

    (0.1 + 0.9 (j + 1/2) / n) 10^(i - E + 1),  j = 0 .. n - 1,

plus 0 and 1; signed it has 1 but no -1. Source: 8-bit Optimizers via Block-wise Quantization, section 1.3,
https://arxiv.org/abs/2110.02861. The 4-bit maps: QLoRA, https://arxiv.org/abs/2305.14314. Names, arguments and defaults
of `create_*` are those of bitsandbytes.functional, https://github.com/bitsandbytes-foundation/bitsandbytes.
"""

from functools import cache

import torch
from torch import Tensor

CODES = 256
DECADES = 7
_FP8_BITS = 8

# QLoRA, appendix E; index order is value order.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# In twelfths, by the low three bits; bit 3 is the sign. bitsandbytes' own format: OCP's E2M1 has 1 for the 0.0625.
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

_FOUR_BIT_MAPS = {"nf4": _NF4, "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in _FP4_TWELFTHS)}


@cache
def four_bit_map(name: str) -> Tensor:
    """(16,) float32 on the CPU, in the order of the codes: "nf4" ascends, "fp4" does not and has -0 at index 8.

    The tensor is shared: do not write to it. Source: bitsandbytes, whose checkpoints store these codes.
    """
    if name not in _FOUR_BIT_MAPS:
        raise ValueError(f"no 4-bit map is called {name!r}; known: {', '.join(_FOUR_BIT_MAPS)}")
    return torch.tensor(_FOUR_BIT_MAPS[name], dtype=torch.float64).float()


def _dynamic_symmetric() -> Tensor:
    values = create_dynamic_map()
    values[0] = -1
    return values


_DYNAMIC_MAPS = {
    "dynamic": lambda: create_dynamic_map(),  # bitsandbytes' signed map: +1 but no -1
    "dynamic_symmetric": _dynamic_symmetric,  # -1 in the place of -0.993: quantise after dequantise is the identity
    "dynamic_unsigned": lambda: create_dynamic_map(signed=False),
}


@cache
def dynamic_map(name: str) -> Tensor:
    """(256,) float32, ascending, on the CPU.

    "dynamic" is bitsandbytes' signed map, "dynamic_symmetric" the same with index 0 = -1, "dynamic_unsigned" its map
    for values that are never negative. The tensor is shared: do not write to it.
    """
    if name not in _DYNAMIC_MAPS:
        raise ValueError(f"no code book is called {name!r}; known: {', '.join(_DYNAMIC_MAPS)}")
    return _DYNAMIC_MAPS[name]()


def midpoints(code: Tensor) -> Tensor:
    """(n,) -> (n - 1,): the bounds between neighbouring values. v gets the code i = number of midpoints below v."""
    return (code[:-1] + code[1:]) / 2


@cache
def zero_code(name: str) -> int:
    """The code of 0.0 in the map called `name`."""
    return int((dynamic_map(name) == 0).nonzero())


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = DECADES, total_bits: int = 8) -> Tensor:
    """(256,) float32: the dynamic map of `total_bits` bits over `max_exponent_bits` decades; see above for the formula.

    Signed it has 2^(B - 1 - E) - 1 more values in the highest decade where that is positive; unsigned it needs B - 1
    decades. ValueError where the number of values is not 2^total_bits, and for more than 8 bits.
    """
    bits = total_bits - max_exponent_bits
    counts = [int(2.0 ** (decade + bits - signed)) for decade in range(max_exponent_bits)]
    extra = int(2.0 ** (bits - 1)) - 1
    positive = [value for decade, n in enumerate(counts) for value in _decade(n, decade + 1 - max_exponent_bits)]
    positive += _decade(max(extra, 0), 0)
    values = [*(-value for value in positive if signed), 0.0, *positive, 1.0]
    if not 2 <= total_bits <= 8 or len(values) != 1 << total_bits:
        raise ValueError(
            f"a dynamic map of total_bits={total_bits} and max_exponent_bits={max_exponent_bits} has {len(values)} "
            f"values, expected 2^total_bits: take 2 to 8 bits, and for an unsigned map one exponent bit less"
        )
    return _filled_up(torch.tensor(values, dtype=torch.float64))


def _decade(n: int, exponent: int) -> list[float]:
    """The centres of n equal parts of 0.1 .. 1, times 10^exponent."""
    return [(0.1 + 0.9 * (j + 0.5) / n) * 10.0**exponent for j in range(n)]


def create_fp8_map(
    signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = _FP8_BITS
) -> Tensor:
    """(256,) float32: the values of a small float, without infinities and NaNs, divided by the largest.

    With m = 0, 1, .. 2^p - 1 over 2^p and b = 2^(exponent_bits - 1): m 2^-b, then (1 + m) 2^e for e = 2 - b .. b. Not
    OCP's fp8, which has m 2^(2 - b) below: this has a hole there. A signed map has two zeros. ValueError unless the
    bits add up to total_bits.
    """
    if exponent_bits < 1 or total_bits > _FP8_BITS or exponent_bits + precision_bits + signed != total_bits:
        raise ValueError(
            f"a float of total_bits={total_bits}, at most {_FP8_BITS}, has a sign bit if signed, at least one exponent "
            f"bit, and precision bits; got {int(signed)} + {exponent_bits} + {precision_bits}"
        )
    bias = 1 << (exponent_bits - 1)
    fractions = torch.arange(1 << precision_bits, dtype=torch.float64) / (1 << precision_bits)
    exponents = torch.arange(2 - bias, bias + 1, dtype=torch.float64)
    magnitudes = torch.cat([fractions * 2.0**-bias, ((1 + fractions) * torch.exp2(exponents)[:, None]).flatten()])
    values = torch.cat([-magnitudes, magnitudes]) if signed else magnitudes
    return _filled_up(values / magnitudes.max())


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """(256,) float32: 2^total_bits equidistant values from -1 (unsigned: 0) to 1; signed with a zero, one less.

    Below 8 bits a signed map always has a zero. bitsandbytes puts the zeros that fill up a map in the middle, where
    they do not always belong; here every map ascends.
    """
    if not 2 <= total_bits <= 8:
        raise ValueError(f"a linear map has 2 to 8 bits, got total_bits={total_bits}")
    points = (1 << total_bits) - (signed and (add_zero or total_bits < 8))
    steps = torch.arange(points, dtype=torch.float64)
    return _filled_up((2 * steps - (points - 1)) / (points - 1) if signed else steps / (points - 1))


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """(256,) float32: NF4 as it was made, quantiles of the normal distribution divided by the largest, and zeros.

    The quantiles of the first 8 (without the extra value: 7) of 9 (8) equidistant probabilities from `offset` to 1/2,
    and the negatives of the first 7 of 8. `four_bit_map` holds the published values, up to 1.2e-7 off.
    """
    positive, negative = _quantiles(offset, 8 if use_extra_value else 7), -_quantiles(offset, 7)
    values = torch.cat([negative, positive])
    return _filled_up(values / values.max())


def _quantiles(offset: float, count: int) -> Tensor:
    return torch.special.ndtri(torch.linspace(offset, 0.5, count + 1, dtype=torch.float64)[:-1])


def _filled_up(values: Tensor) -> Tensor:
    """At most 256 values, float64 -> 256 of them in ascending order, float32, zeros for those that are missing."""
    return torch.nn.functional.pad(values, (0, CODES - len(values))).float().sort().values
