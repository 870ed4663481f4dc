"""Samples of rowwise.py's ops."""

from collections.abc import Callable
from functools import cache

import torch
from hostile import (
    FLOATS,
    Arguments,
    Samples,
    SampleTable,
    cut_out,
    heavy_tailed,
    not_finite,
    rounded_twice,
    ties,
    tiny,
)
from lq_kernels.element_types import ELEMENT_TYPES
from lq_kernels.rounding import random_bits
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def matrices() -> Samples:
    """For ops that take one matrix."""
    for dtype in FLOATS:
        yield f"odd size {dtype}", (cut_out(heavy_tailed(37, 1000, dtype)),)
    yield "one value", (cut_out(torch.full((1, 1), -3.0)),)
    yield "one row", (cut_out(torch.randn(1, 37)),)
    yield "one column", (cut_out(torch.randn(1000, 1)),)
    yield "four rows", (cut_out(torch.randn(4, 37)),)
    yield "contiguous", (heavy_tailed(64, 256, torch.bfloat16),)
    yield "rows of words", (cut_out(heavy_tailed(68, 130, torch.bfloat16)),)
    yield "transposed", (cut_out(heavy_tailed(132, 37), "columns"),)
    yield "every other", (cut_out(heavy_tailed(36, 130, torch.bfloat16), "every_other"),)
    yield "expanded", (torch.randn(1, 1).expand(33, 65),)
    yield "several tiles", (cut_out(heavy_tailed(300, 200, torch.float16)),)
    yield "zeros", (torch.zeros(5, 7),)
    yield "ties", (cut_out(ties(5, 200)),)
    yield "rounded twice", (rounded_twice(16, 64),)
    yield "rounded twice, one row", (rounded_twice(1, 64),)
    yield "not finite", (cut_out(not_finite(9, 70)),)
    yield "not finite, rows of words", (cut_out(not_finite(8, 70)),)
    yield "infinite", (cut_out(not_finite(9, 70)[2:3]),)
    yield "tiny", (cut_out(tiny(33)),)
    yield "tiny, one row", (cut_out(tiny(33)[10:11]),)
    yield "no rows", (torch.empty(0, 5),)
    yield "no columns", (torch.empty(5, 0),)


def long_rows() -> Samples:
    yield from matrices()
    yield "longer than a tile", (cut_out(heavy_tailed(2, 40000, torch.bfloat16)),)
    yield "longer than a tile, transposed", (cut_out(heavy_tailed(3, 33333), "columns"),)
    last = torch.randn(3, 33333)
    last[:, -1] = 100
    yield "longer than a tile, the largest last", (cut_out(last),)


def fp8_ties(dtype: torch.dtype) -> Tensor:
    """Every value of fp8, every midpoint of two and the neighbours of those, in four rows whose scale is 1."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    values = codes[codes.isfinite()].unique()
    middles = (values[1:] + values[:-1]) / 2
    around = [torch.nextafter(middles, middles + sign) for sign in (1.0, -1.0)]
    row = torch.cat([values.amax()[None], values, middles, *around])
    return torch.stack([row, row.flip(0), -row, row])


def fp8_tiny(smallest_amax: float) -> Tensor:
    """Rows whose amax goes past the smallest that is quantised."""
    return torch.randn(12, 33).clamp(-1, 1) * (smallest_amax * torch.exp2(torch.arange(-6.0, 6.0)))[:, None]


def rounded_past(largest: float) -> Tensor:
    """An amax, one value, for which amax * (largest / amax) is above largest."""
    amax = 1 + torch.arange(10000) * 2.0**-23
    return amax[amax * (torch.full_like(amax, largest) / amax) > largest][:1]


@cache
def extreme_seed(values: int) -> int:
    """A seed for which the bits of one of so many indices begin with 21 ones: what lies above a code rounds up."""
    index = torch.arange(values)
    return next(seed for seed in range(1000) if int(random_bits(torch.tensor(seed), index).max()) >> 11 == 2**21 - 1)


def to_fp8(dtype: torch.dtype) -> Samples:
    name = str(dtype).removeprefix("torch.")
    yield f"odd size to {name}", (cut_out(heavy_tailed(37, 130, torch.bfloat16)), dtype)
    yield f"ties to {name}", (cut_out(fp8_ties(dtype)), dtype)
    yield f"tiny to {name}", (cut_out(fp8_tiny(ELEMENT_TYPES[dtype].smallest_amax)), dtype)
    if dtype == E4M3:
        yield f"rows of words to {name}", (cut_out(heavy_tailed(68, 130)), dtype)
        yield f"transposed to {name}", (cut_out(heavy_tailed(132, 37), "columns"), dtype)
        yield f"not finite to {name}", (cut_out(not_finite(9, 70)), dtype)
        yield f"no rows to {name}", (torch.empty(0, 5), dtype)


def stochastic(dtype: torch.dtype) -> Samples:
    past = rounded_past(ELEMENT_TYPES[dtype].largest).expand(4, 30000)
    cases = {
        "rows of words": (cut_out(heavy_tailed(132, 70, torch.float16)), 0x1234_5678_9ABC),
        "ties": (cut_out(ties(5, 200) if dtype == torch.int8 else fp8_ties(dtype)), -1),
        "past the largest": (past, extreme_seed(past.numel())),
    }
    if dtype == E4M3:
        cases |= {
            "odd size": (cut_out(heavy_tailed(37, 130, torch.bfloat16)), 2),
            "transposed": (cut_out(heavy_tailed(132, 37), "columns"), 3),
            "not finite": (cut_out(not_finite(9, 70)), 4),
            "no columns": (torch.empty(5, 0), 5),
        }
    name = f"{str(dtype).removeprefix('torch.')}, stochastic"
    for case, (x, seed) in cases.items():
        yield f"{case} to {name}", (x, dtype, "stochastic", torch.tensor([seed]))


def all_types(plain: Callable[[], Samples]) -> Callable[[], Samples]:
    def samples() -> Samples:
        e4m3 = [*to_fp8(E4M3), *stochastic(E4M3), *power_of_two(E4M3)]
        others = [*plain(), *to_fp8(E5M2), *stochastic(torch.int8), *stochastic(E5M2), *power_of_two(torch.int8)]
        return after_each_third(others, e4m3)

    return samples


def after_each_third(samples: list[tuple[str, Arguments]], without_opcheck: list[tuple[str, Arguments]]) -> Samples:
    """All of them; opcheck takes each third, which is none of those whose fp8 torch cannot check."""
    assert len(without_opcheck) <= 2 * len(samples)
    for i, sample in enumerate(samples):
        yield sample
        yield from without_opcheck[2 * i : 2 * i + 2]


def power_of_two(dtype: torch.dtype) -> Samples:
    """Scales between two powers, and on one: amax is 127 or 448 times a power of two."""
    on_a_power = torch.full((5, 8), ELEMENT_TYPES[dtype].largest) * torch.exp2(torch.arange(-2.0, 3.0))[:, None]
    cases = {"odd size": heavy_tailed(37, 130), "powers": on_a_power, "not finite": not_finite(9, 70), "tiny": tiny(33)}
    for case, x in cases.items():
        name = f"{case} to {str(dtype).removeprefix('torch.')}, power of two"
        yield name, (cut_out(x), dtype, "nearest", None, True)


def both_ways() -> Samples:
    for name, (x, *options) in all_types(matrices)():
        filled = (*options, *(torch.int8, "nearest", None, False)[len(options) :])
        yield f"{name}, both", (x, *filled, True)
    yield "one way", (heavy_tailed(36, 130), torch.int8, "nearest", None, False, False)


def with_amax() -> Samples:
    for name, (x, *options) in all_types(matrices)():
        by_column = x.abs().amax(0, keepdim=True) if x.shape[0] else x.new_zeros(1, x.shape[1])
        yield f"{name}, by column", (x, by_column.float(), *options)
    x = heavy_tailed(132, 70)
    for name, matrix in (
        ("finite", x),
        ("odd", x[:37, :5]),
        ("one column", x[:, :1]),
        ("not finite", not_finite(9, 70)),
    ):
        yield f"{name}, one amax", (cut_out(matrix), matrix.abs().amax().view(1, 1), torch.int8)
    yield "no columns, one amax", (torch.empty(5, 0), torch.ones(1, 1))


def codes_with_scales() -> Samples:
    scale = torch.exp(5 * torch.randn(37, 1))
    codes = torch.randint(-127, 128, (37, 1030), dtype=torch.int8)
    for dtype in FLOATS:
        yield f"to {dtype}", (cut_out(codes), scale, dtype)
        yield f"transposed to {dtype}", (codes[:33].t()[:37], scale, dtype)
        yield f"e4m3 to {dtype}", (torch.randn(37, 600).to(E4M3), scale, dtype)
    infinite = torch.tensor([[float("nan")], [float("inf")], [0.0]])
    yield "not finite", (torch.ones(3, 5, dtype=torch.int8), infinite, torch.bfloat16)
    yield "no rows", (torch.empty(0, 5, dtype=torch.int8), torch.empty(0, 1), torch.float32)


SAMPLES: SampleTable = {
    "quantize_rowwise": all_types(long_rows),
    "quantize_columnwise": all_types(matrices),
    "quantize_columnwise_transposed": all_types(matrices),
    "quantize_tensorwise": all_types(matrices),
    "quantize_tensorwise_transposed": all_types(matrices),
    "quantize_rowwise_column_amax": all_types(long_rows),
    "quantize_tensorwise_amax": both_ways,
    "quantize_transposed": with_amax,
    "dequantize_rowwise": codes_with_scales,
}
