"""A trainable format is one value for each of the three matrix products of a linear layer.

With input x (T, I), weight w (O, I) and grad_output g (T, O):

    output      = x @ w.t() + bias
    grad_input  = g @ w
    grad_weight = g.t() @ x
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from lq_kernels.scaled_mm import scaled_mm
from torch import Tensor

from lq_plugin.formats.operands import UNQUANTIZED, Lines, OperandFormat, Quantized, Sides


class Gemm(Protocol):
    """How two operands are made and multiplied."""

    @property
    def a(self) -> OperandFormat: ...

    @property
    def b(self) -> OperandFormat: ...

    def multiply(self, a: Lines, b: Lines, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """a (M, K) @ b (N, K).t() + bias (N,) -> (M, N) in dtype."""
        ...


@dataclass(frozen=True)
class HighPrecision:
    """The product of the operands as they are made, in the dtype of the left one."""

    a: OperandFormat = UNQUANTIZED
    b: OperandFormat = UNQUANTIZED

    def multiply(self, a: Lines, b: Lines, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        x, y = a.values, b.values.t().to(a.values.dtype)
        return (x @ y if bias is None else torch.addmm(bias.to(x.dtype), x, y)).to(dtype)


@dataclass(frozen=True)
class ScaledGemm:
    """8-bit codes, multiplied by matrix units and scaled in the epilogue; `accumulation` of fp8: see scaled_mm."""

    a: Quantized
    b: Quantized
    accumulation: str = "fast"

    def multiply(self, a: Lines, b: Lines, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        assert a.scale is not None
        assert b.scale is not None
        return scaled_mm(a.values, b.values.t(), a.scale, b.scale.t(), bias, dtype, self.accumulation)


high_precision = HighPrecision()


def matmul(gemm: Gemm, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (M, K) @ b (K, N) + bias (N,) -> (M, N) in the dtype of a; a and b may have any strides."""
    return gemm.multiply(gemm.a.lines(a), gemm.b.lines(b.t()), bias, a.dtype)


@dataclass(frozen=True)
class GemmFormats:
    """The products of a linear layer whose weight is trained.

    bits: width of the operands of `output`. keeps_codes: backward takes the input from the codes that `output` made
    of it, and the input itself is not kept. input, weight and grad_output follow from the products: how each of these
    tensors becomes an operand of two of them; element_types are the 8-bit types that a device needs.
    """

    name: str
    bits: int
    output: Gemm
    grad_input: Gemm
    grad_weight: Gemm
    keeps_codes: bool = False
    input: Sides = field(init=False, repr=False, compare=False)
    weight: Sides = field(init=False, repr=False, compare=False)
    grad_output: Sides = field(init=False, repr=False, compare=False)
    element_types: tuple[torch.dtype, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        output, grad_input, grad_weight = self.output, self.grad_input, self.grad_weight
        sides = {
            "input": Sides(output.a, grad_weight.b, "rows" if self.keeps_codes else "codes"),
            "weight": Sides(output.b, grad_input.b),
            "grad_output": Sides(grad_input.a, grad_weight.a, "codes"),
        }
        operands = [operand for gemm in (output, grad_input, grad_weight) for operand in (gemm.a, gemm.b)]
        types = dict.fromkeys(operand.dtype for operand in operands if isinstance(operand, Quantized))
        for name, value in (*sides.items(), ("element_types", tuple(types))):
            object.__setattr__(self, name, value)
