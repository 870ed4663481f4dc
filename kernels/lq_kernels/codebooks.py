"""Code books: the 256 values that an 8-bit code can stand for, and the exact rule that picks one.

The dynamic map spends its codes on seven decades, 10^-6 .. 1, with twice as many codes in each decade as in the one
below: decade i holds n = 2^i values (signed, for each sign) or n = 2^(i+1) (unsigned),

    (0.1 + 0.9 (j + 1/2) / n) 10^(i - 6),  j = 0 .. n - 1,

plus 0 and 1. Source: 8-bit Optimizers via Block-wise Quantization, section 1.3, https://arxiv.org/abs/2110.02861
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

CODES = 256
DECADES = 7


def _decades(first_count: int) -> list[float]:
    """The positive values below 1, ascending; the lowest decade has `first_count` of them."""
    counts = [first_count << decade for decade in range(DECADES)]
    return [
        (0.1 + 0.9 * (j + 0.5) / n) * 10.0 ** (decade + 1 - DECADES)
        for decade, n in enumerate(counts)
        for j in range(n)
    ]


def _dynamic() -> list[float]:
    positive = _decades(1)
    return [*(-value for value in reversed(positive)), 0.0, *positive, 1.0]


def _dynamic_symmetric() -> list[float]:
    return [-1.0, *_dynamic()[1:]]


def _dynamic_unsigned() -> list[float]:
    return [0.0, *_decades(2), 1.0]


_MAPS = {
    "dynamic": _dynamic,  # bitsandbytes' signed map: +1 but no -1
    "dynamic_symmetric": _dynamic_symmetric,  # -1 in the place of -0.993: quantise after dequantise is the identity
    "dynamic_unsigned": _dynamic_unsigned,
}


@cache
def dynamic_map(name: str) -> Tensor:
    """(256,) float32, ascending, on the CPU; computed in float64 and rounded once, so the same on every machine.

    "dynamic" is bitsandbytes' signed map, "dynamic_symmetric" the same with index 0 = -1, "dynamic_unsigned" its map
    for values that are never negative. The tensor is shared: do not write to it.
    """
    if name not in _MAPS:
        raise ValueError(f"no code book is called {name!r}; known: {', '.join(_MAPS)}")
    return torch.tensor(_MAPS[name](), dtype=torch.float64).float()


def midpoints(code: Tensor) -> Tensor:
    """(255,) float32: the bounds between neighbouring values. v gets the code i = number of midpoints below v."""
    return (code[:-1] + code[1:]) / 2


@cache
def zero_code(name: str) -> int:
    """The code of 0.0 in the map called `name`."""
    return int((dynamic_map(name) == 0).nonzero())


@dataclass(frozen=True)
class NearestTable:
    """Finds the nearest code of a float32 by its upper 16 bits and a comparison with the midpoint in that bucket.

    `first[bucket]` is the code of the smallest value of the bucket, `comparisons` the most midpoints that any bucket
    holds: 1 for the dynamic maps, whose midpoints are wider apart than the 7 mantissa bits of a bucket.
    """

    first: Tensor  # (65536,) uint8, buckets in the order of the upper 16 bits as a signed integer
    bounds: Tensor  # (256,) float32: the midpoints, then infinity
    comparisons: int

    @classmethod
    def of(cls, code: Tensor) -> "NearestTable":
        code = code.detach().cpu().contiguous()
        return _table_of_bytes(code.numpy().tobytes())

    def nearest(self, v: Tensor) -> Tensor:
        """v float32 -> codes uint8 of its shape: the nearest value, ties to the lower index; NaN gets code 0."""
        flat = v.contiguous().view(-1)
        bucket = (flat.view(torch.int32) >> 16).add_(1 << 15)
        codes = self.first.index_select(0, bucket)
        for _ in range(self.comparisons):
            codes += flat > self.bounds.index_select(0, codes.int())
        return codes.view(v.shape)


@cache
def _table_of_bytes(code_bytes: bytes) -> NearestTable:
    code = torch.frombuffer(bytearray(code_bytes), dtype=torch.float32)
    bounds = midpoints(code)
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32)
    of_ends = torch.searchsorted(bounds, ends)
    # A bucket that reaches into the NaNs has its infinity at one end; a bucket of NaNs alone has none.
    of_ends = torch.where(ends.isnan(), torch.where(ends.isnan().all(dim=0), 0, of_ends.amin(dim=0)), of_ends)
    lowest, highest = of_ends.amin(dim=0), of_ends.amax(dim=0)
    return NearestTable(
        first=lowest.to(torch.uint8),
        bounds=torch.cat([bounds, torch.tensor([torch.inf])]),
        comparisons=int((highest - lowest).max()),
    )
