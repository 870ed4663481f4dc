"""`benchmark=format_noise`: how far each product of each format is from the exact one, in decibels.

    20 log10(||exact|| / ||product - exact||)        6 dB are a bit; float64 is exact

`operands` says what is multiplied: normal values; tokens whose sizes spread over orders of magnitude; features of which
some are many times larger than the rest, as in the activations of large language models; and a gradient that the tokens
share a part of, as a weight gradient has: its sums grow with the tokens, and what matrix units cut off of fp8 sums with
them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lq_plugin.formats import TRAINABLE_FORMATS, GemmFormats
from lq_plugin.formats.gemm import matmul
from lq_plugin.recipes.benchmarks.cases import told_in

PRODUCTS = ("output", "grad_input", "grad_weight")
OPERANDS = ("normal", "tokens", "features", "shared")
HEAD = f"{'format':32} {'operands':10} " + " ".join(f"{product:>12}" for product in PRODUCTS)
_SPREAD = 1.5  # standard deviation of the logarithm of a token's size
_LOUD, _TIMES = 64, 20.0  # one feature in so many is larger, so many times
_SHARED = 0.3  # of a gradient's standard deviation


@dataclass(frozen=True)
class Noise:
    """Decibels of the three products, or the problem that kept them away."""

    formats: str
    operands: str
    shape: str
    decibels: dict[str, float] = field(default_factory=dict)
    problem: str | None = None

    @property
    def op(self) -> str:
        return f"{self.formats}, {self.operands}"

    def record(self) -> dict[str, Any]:
        values = {product: round(value, 2) for product, value in self.decibels.items()}
        what = {"format": self.formats, "operands": self.operands, "shape": self.shape}
        return {"name": "noise", **what, **values, "problem": self.problem}

    def row(self) -> str:
        values = " ".join(f"{self.decibels[product]:12.1f}" for product in PRODUCTS if product in self.decibels)
        return f"{self.formats:32} {self.operands:10} {self.problem or values}"


@dataclass(frozen=True)
class FormatNoiseBenchmark:
    """`sizes`: "full", "small", or "auto" for full ones on a GPU: tokens, in_features and out_features."""

    sizes: str = "auto"
    head: str = HEAD

    def run(self, device: torch.device) -> Iterator[Noise]:
        full = {"full": True, "small": False, "auto": device.type == "cuda"}[self.sizes]
        shape = (16384, 4096, 2048) if full else (96, 128, 64)
        for operands in OPERANDS:
            torch.manual_seed(0)
            x, weight, grad = make(operands, shape, device)
            for formats in TRAINABLE_FORMATS.values():
                problems: dict[str, str] = {}
                decibels: dict[str, float] = {}
                with told_in(problems, "ours"):
                    decibels = noise(formats, x, weight, grad)
                yield Noise(formats.name, operands, "{}, {}->{}".format(*shape), decibels, problems.get("ours"))


def make(operands: str, shape: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, I), weight (O, I), grad_output (T, O) in bfloat16."""
    tokens, in_features, out_features = shape
    x, grad = (torch.randn(tokens, features, device=device) for features in (in_features, out_features))
    weight = (torch.rand(out_features, in_features, device=device) - 0.5) * in_features**-0.5
    if operands == "tokens":
        x, grad = (t * torch.exp(_SPREAD * torch.randn(tokens, 1, device=device)) for t in (x, grad))
    elif operands == "features":
        x[:, ::_LOUD] *= _TIMES
    elif operands == "shared":
        common = torch.randn(tokens, 1, device=device)
        x, grad = x + _SHARED * common, grad + _SHARED * common
    return x.bfloat16(), weight.bfloat16(), grad.bfloat16()


def noise(formats: GemmFormats, x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, float]:
    """Decibels of output, grad_input and grad_weight; results are in bfloat16, whose own rounding is 57 dB."""
    operands = {"output": (x, weight.t()), "grad_input": (grad, weight), "grad_weight": (grad.t(), x)}
    return {product: _decibels(matmul(getattr(formats, product), a, b), a, b) for product, (a, b) in operands.items()}


def _decibels(got: Tensor, a: Tensor, b: Tensor) -> float:
    exact = a.double() @ b.double()
    return float(20 * torch.log10(exact.norm() / (got.double() - exact).norm()))
