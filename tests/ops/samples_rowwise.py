"""Samples of rowwise.py's ops."""

import torch
from hostile import FLOATS, Samples, SampleTable, cut_out, heavy_tailed, not_finite, rounded_twice, ties, tiny


def matrices() -> Samples:
    """For ops that take one matrix."""
    for dtype in FLOATS:
        yield f"odd size {dtype}", (cut_out(heavy_tailed(37, 1000, dtype)),)
    yield "one value", (cut_out(torch.full((1, 1), -3.0)),)
    yield "one row", (cut_out(torch.randn(1, 37)),)
    yield "one column", (cut_out(torch.randn(1000, 1)),)
    yield "contiguous", (heavy_tailed(64, 256, torch.bfloat16),)
    yield "transposed", (cut_out(heavy_tailed(130, 37), "columns"),)
    yield "every other", (cut_out(heavy_tailed(37, 130, torch.bfloat16), "every_other"),)
    yield "expanded", (torch.randn(1, 1).expand(33, 65),)
    yield "several tiles", (cut_out(heavy_tailed(300, 200, torch.float16)),)
    yield "zeros", (torch.zeros(5, 7),)
    yield "ties", (cut_out(ties(5, 200)),)
    yield "rounded twice", (rounded_twice(16, 64),)
    yield "rounded twice, one row", (rounded_twice(1, 64),)
    yield "not finite", (cut_out(not_finite(9, 70)),)
    yield "infinite", (cut_out(not_finite(9, 70)[2:3]),)
    yield "tiny", (cut_out(tiny(33)),)
    yield "tiny, one row", (cut_out(tiny(33)[10:11]),)
    yield "no rows", (torch.empty(0, 5),)
    yield "no columns", (torch.empty(5, 0),)


def long_rows() -> Samples:
    yield from matrices()
    yield "longer than a tile", (cut_out(heavy_tailed(2, 40000, torch.bfloat16)),)
    yield "longer than a tile, transposed", (cut_out(heavy_tailed(3, 33333), "columns"),)


SAMPLES: SampleTable = {
    "quantize_rowwise": long_rows,
    "quantize_columnwise_transposed": matrices,
    "quantize_tensorwise": matrices,
    "quantize_tensorwise_transposed": matrices,
}
