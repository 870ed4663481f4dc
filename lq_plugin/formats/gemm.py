"""A trainable format is one value for each of the three matrix products of a linear layer.

With input x (T, I), weight w (O, I) and grad_output g (T, O):

    output      = x @ w.t() + bias
    grad_input  = g @ w
    grad_weight = g.t() @ x
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Gemm(Protocol):
    """a (M, K) @ b (K, N) + bias (N,) -> (M, N) in the dtype of a; a and b may have any strides."""

    def matmul(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor: ...


class RowQuantizedGemm(Gemm, Protocol):
    """A product whose left operand is quantised by row, so that backward can keep the codes in its place."""

    def quantize_a(self, a: Tensor) -> tuple[Tensor, Tensor]: ...

    def multiply(self, codes: Tensor, scale: Tensor, b: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor: ...


@dataclass(frozen=True)
class HighPrecision:
    """The product in the dtype of its left operand, unquantised."""

    def matmul(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        b = b.to(a.dtype)
        return a @ b if bias is None else torch.addmm(bias.to(a.dtype), a, b)


high_precision = HighPrecision()


@dataclass(frozen=True)
class GemmFormats:
    """The products of a linear layer whose weight is trained.

    bits: width of the operands of `output`. saves: where it is set, backward keeps the codes that this product made
    of the input, instead of the input; it then computes `output` too.
    """

    name: str
    bits: int
    output: Gemm
    grad_input: Gemm
    grad_weight: Gemm
    saves: RowQuantizedGemm | None = None
