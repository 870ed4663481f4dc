"""Samples of gradient_percentile.py's op."""

import torch
from hostile import FLOATS, Samples, SampleTable, cut_out, heavy_tailed
from torch import Tensor


def histories() -> Samples:
    """For record_gradient_norm: norms about 1, so that one bound serves for all results."""
    for dtype in FLOATS:
        for step in (1, 7, 99, 100, 101, 300):
            grad = (torch.randn(37, 300) / 100).to(dtype)
            yield f"step {step} {dtype}", (cut_out(grad), history(step), torch.empty(3), step, 5)
    for percentile in (0, 50, 99):
        yield f"percentile {percentile}", (torch.randn(40) / 6, history(300), torch.empty(3), 300, percentile)
    yield "ties", (torch.ones(1), torch.ones(100), torch.empty(3), 5, 40)
    yield "zero", (torch.zeros(5), torch.zeros(100), torch.empty(3), 1, 5)
    yield "zero after others", (torch.zeros(5), history(200), torch.empty(3), 200, 0)
    yield "grown after zeros", (torch.ones(5), torch.zeros(100), torch.empty(3), 50, 5)
    yield "not zeros at the first step", (torch.ones(4) / 2, history(1000), torch.empty(3), 1, 10)
    yield "infinite", (torch.tensor([1.0, float("inf")]), history(200), torch.empty(3), 200, 5)
    yield "overflows", (torch.tensor([1e30, 1.0]), history(200), torch.empty(3), 200, 5)
    yield "NaN", (torch.tensor([1.0, float("nan")]), history(200), torch.empty(3), 200, 5)
    yield "NaN in the history", (torch.ones(1), with_nan(), torch.empty(3), 200, 98)
    yield "percentile is NaN", (torch.ones(1), with_nan(), torch.empty(3), 200, 99)
    yield "empty", (torch.empty(0, 3), history(20), torch.empty(3), 20, 5)
    yield "one value", (torch.full((), -0.5), history(20), torch.empty(3), 20, 5)
    yield "transposed", (cut_out(torch.randn(30, 50) / 40, "columns"), history(20), torch.empty(3), 20, 5)
    yield "more than a tile", (heavy_tailed(7, 3000) / 400, history(20), torch.empty(3), 20, 5)
    strided = torch.stack([history(200), torch.full((100,), float("inf"))], 1)[:, 0]
    yield "strided", (torch.ones(2), strided, torch.full((9,), 9.0)[::3], 200, 5)


def history(step: int) -> Tensor:
    """Squared norms of the steps before, and what the first of them left in the slots that had no turn."""
    recorded = 0.2 + torch.rand(100)
    return torch.zeros(100) if step == 1 else torch.where(torch.arange(100) < step, recorded, recorded[1])


def with_nan() -> Tensor:
    values = history(200)
    values[7] = float("nan")
    return values


def norm_bound(grad: Tensor, gnorm_vec: Tensor, result: Tensor, step: int, percentile: int) -> Tensor:
    """Two sums of n squares in different orders, in float32: at worst log2(n) + 20 roundings of each, pairs first.

    Norms and squares are below 2 here, and so is the scale; the square root and the quotient halve or keep the error.
    """
    roundings = 2 * (torch.tensor(float(grad.numel() + 1)).log2().ceil() + 20)
    return 4 * roundings * 2.0**-24


SAMPLES: SampleTable = {"record_gradient_norm": histories}
BOUNDS = {"record_gradient_norm": norm_bound}
