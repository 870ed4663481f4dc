"""Samples of fake_quantize.py's ops."""

import torch
from hostile import FLOATS, Samples, SampleTable, cut_out, heavy_tailed, not_finite, tiny
from lq_kernels.codebooks import dynamic_map
from torch import Tensor


def fp8_map(exponent_bits: int, precision_bits: int) -> Tensor:
    """bitsandbytes' fp8, from its description: (256,) float32, ascending, -1 .. 1, with two zeros."""
    bias = 2 ** (exponent_bits - 1)
    fractions = [k / 2**precision_bits for k in range(2**precision_bits)]
    positive = [m * 2.0**-bias for m in fractions]
    positive += [(1 + m) * 2.0 ** (bias + 1 - e) for e in range(1, 2**exponent_bits) for m in fractions]
    values = torch.tensor(sorted([*positive, *(-value for value in positive)]), dtype=torch.float64)
    return (values / values.max()).float()


def tensors() -> Samples:
    """For fake_quantize_tensorwise."""
    e4m3, e5m2 = fp8_map(4, 3), fp8_map(5, 2)
    for dtype in FLOATS:
        yield f"odd size {dtype}", (cut_out(heavy_tailed(37, 130, dtype)), e4m3)
    yield "e5m2", (cut_out(heavy_tailed(37, 130)), e5m2)
    yield "dynamic map", (cut_out(heavy_tailed(7, 100)), dynamic_map("dynamic"))
    yield "random code", (cut_out(torch.randn(3, 700)), (torch.rand(256) * 2 - 1).sort().values)
    yield "transposed", (heavy_tailed(130, 37).t(), e4m3)
    yield "transposed, cut out", (cut_out(heavy_tailed(130, 37, torch.float16), "columns"), e4m3)
    yield "every other", (cut_out(heavy_tailed(30, 37), "every_other"), e4m3)
    yield "expanded", (torch.randn(5, 1).expand(5, 40), e4m3)
    yield "permuted", (heavy_tailed(30, 40).view(3, 10, 40).permute(2, 0, 1), e4m3)
    yield "several tiles", (cut_out(heavy_tailed(70, 1001, torch.bfloat16).flip(0)), e4m3)
    yield "three tiles of small values", (cut_out(torch.randn(10, 1001) / 100), e4m3)
    yield "ties", (code_ties(e4m3), e4m3)
    yield "one value", (torch.full((), -3.0), e4m3)
    yield "zeros", (torch.zeros(5, 7), e4m3)
    yield "NaN", (cut_out(not_finite(9, 70)[:2]), e4m3)
    yield "infinity", (cut_out(not_finite(9, 70)[2:3]), e4m3)
    for row in (1, 22, 23, 24, 30):
        yield f"tiny {row}", (cut_out(tiny(33)[row : row + 1]), e4m3)
    yield "no rows", (torch.empty(0, 5), e4m3)


def blocks() -> Samples:
    """For fake_quantize_blockwise."""
    e4m3, e5m2 = fp8_map(4, 3), fp8_map(5, 2)
    for dtype in FLOATS:
        x = heavy_tailed(37, 130, dtype)
        yield f"flat {dtype}", (cut_out(x), e4m3, 256, x.numel())
        yield f"rows {dtype}", (cut_out(x), e4m3, 256, 130)
        yield f"parts of rows {dtype}", (cut_out(x), e5m2, 64, 130)
    yield "transposed", (cut_out(heavy_tailed(130, 37), "columns"), e4m3, 64, 37)
    yield "three dimensions", (heavy_tailed(30, 40).view(3, 10, 40), e4m3, 64, 40)
    yield "rows of two dimensions", (heavy_tailed(30, 40).view(3, 10, 40), e4m3, 128, 400)
    yield "blocks of one", (cut_out(torch.randn(3, 7)), e4m3, 1, 7)
    yield "rows of one", (cut_out(torch.randn(3, 7)), e4m3, 64, 1)
    yield "odd blocks", (cut_out(heavy_tailed(3, 700)), e4m3, 37, 700)
    yield "long blocks", (cut_out(heavy_tailed(4, 5000, torch.bfloat16)), e4m3, 4096, 5000)
    yield "long flat blocks", (cut_out(heavy_tailed(4, 5000)), dynamic_map("dynamic"), 4096, 20000)
    yield "many tiles", (cut_out(heavy_tailed(300, 100).flip(0)), e4m3, 4096, 100)
    yield "ties", (code_ties(e4m3), e4m3, 256, 256)
    yield "zeros", (torch.zeros(5, 100), e4m3, 64, 100)
    yield "not finite", (cut_out(not_finite(9, 70)), e4m3, 32, 70)
    yield "tiny", (cut_out(tiny(64)), e4m3, 64, 64)
    yield "one value", (torch.full((), -3.0), e4m3, 64, 1)
    yield "no rows", (torch.empty(0, 5), e4m3, 64, 5)
    yield "no columns", (torch.empty(5, 0), e4m3, 64, 0)


def code_ties(code: Tensor) -> Tensor:
    """Rows that begin with 1, then midpoints between neighbours of a code book, and the values next to those."""
    bounds = (code[:-1] + code[1:]) / 2
    rows = torch.stack([bounds, torch.nextafter(bounds, bounds + 1), torch.nextafter(bounds, bounds - 1)])
    return torch.nn.functional.pad(rows, (1, 0), value=1.0)


SAMPLES: SampleTable = {"fake_quantize_tensorwise": tensors, "fake_quantize_blockwise": blocks}
