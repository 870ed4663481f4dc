"""The arithmetic of every trainable format in float64, from the definitions of the codes; nothing here calls an op."""

from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST = {"int8": 127.0, "e4m3": 448.0, "e5m2": 57344.0}


def _fp8_magnitudes(exponent_bits: int, mantissa_bits: int, largest: float) -> Tensor:
    """Every magnitude in the order of its code: (1 + m / 2^M) 2^(e - bias), subnormal for e = 0."""
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    values = [
        (m / steps if e == 0 else 1 + m / steps) * 2.0 ** (max(e, 1) - bias)
        for e in range(2**exponent_bits)
        for m in range(steps)
    ]
    return torch.tensor([value for value in values if value <= largest], dtype=torch.float64)


_MAGNITUDES = {"e4m3": _fp8_magnitudes(4, 3, 448.0), "e5m2": _fp8_magnitudes(5, 2, 57344.0)}


def _nearest(values: Tensor, element: str) -> Tensor:
    """Values float64 -> the nearest of the type, of two the one with the even code."""
    if element == "int8":
        return values.round()
    magnitudes = _MAGNITUDES[element]
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    size = values.abs().contiguous()
    code = torch.searchsorted(middles, size)
    tied = (code < len(middles)) & (middles[code.clamp(max=len(middles) - 1)] == size) & (code % 2 == 1)
    return magnitudes[code + tied.long()] * values.sign()


@dataclass(frozen=True)
class Rounded:
    """A round trip through an 8-bit type; dim: what shares a scale lies along it (None: all)."""

    element: str
    dim: int | None
    power_of_two: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        amax = x.float().abs().amax() if self.dim is None else x.float().abs().amax(self.dim, keepdim=True)
        largest = torch.full_like(amax, _LARGEST[self.element])
        scale, factor = amax / largest, largest / amax  # float32, as the definition of the codes has it
        if self.power_of_two:
            scale = torch.exp2(torch.ceil(torch.log2(amax.double() / largest.double()))).float()
            factor = 1 / scale
        codes = _nearest((x.float() * factor).double(), self.element)
        return torch.where(amax > 0, codes, 0.0) * scale.double()


@dataclass(frozen=True)
class Simulated:
    """A round trip through bitsandbytes' float of so many bits of exponent and mantissa, whose largest value is 1."""

    exponent_bits: int
    mantissa_bits: int
    dim: int | None

    def __call__(self, x: Tensor) -> Tensor:
        """Rows of at most 4096 values."""
        amax = x.float().abs().amax() if self.dim is None else x.float().abs().amax(self.dim, keepdim=True)
        scaled = x.float() / amax if self.dim is None else x.float() * (torch.ones_like(amax) / amax)
        code = self._code_book()
        middles = (code[1:] + code[:-1]) / 2
        values = code[torch.searchsorted(middles, torch.where(amax > 0, scaled, 0.0).contiguous())]
        return values.double() * amax.double()

    def _code_book(self) -> Tensor:
        """bitsandbytes' map: subnormal values a quarter of IEEE's, all divided by the largest; float32."""
        steps, bias = 2**self.mantissa_bits, 2 ** (self.exponent_bits - 1)
        normal = [
            (1 + m / steps) * 2.0 ** (e - bias + 1) for e in range(1, 2**self.exponent_bits) for m in range(steps)
        ]
        subnormal = [m / steps * 2.0**-bias for m in range(1, steps)]
        magnitudes = torch.tensor([0.0, *subnormal, *normal], dtype=torch.float64)
        magnitudes = (magnitudes / magnitudes.max()).float()
        return torch.cat([-magnitudes, magnitudes]).sort().values


def exact(x: Tensor) -> Tensor:
    return x.double()


@dataclass(frozen=True)
class Arithmetic:
    """What becomes of each operand of output, grad_input and grad_weight."""

    x: object
    weight: object
    grad: object
    weight_again: object
    grad_again: object = exact
    x_again: object = exact

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        """output, grad_input, grad_weight, grad_bias."""
        output = self.x(x) @ self.weight(weight).t() + bias.double()
        grad_input = self.grad(grad) @ self.weight_again(weight)
        return output, grad_input, self.grad_again(grad).t() @ self.x_again(x), grad.double().sum(0)


INT8_ROWS, INT8_COLUMNS, INT8 = Rounded("int8", 1), Rounded("int8", 0), Rounded("int8", None)
E4M3_ROWS, E4M3_COLUMNS, E4M3 = Rounded("e4m3", 1), Rounded("e4m3", 0), Rounded("e4m3", None)
E5M2 = Rounded("e5m2", None)
SIM_E4M3, SIM_E5M2 = Simulated(4, 3, None), Simulated(5, 2, None)

ARITHMETIC = {
    "int8_switchback": Arithmetic(INT8_ROWS, INT8, INT8_ROWS, INT8),
    "int8_switchback_vectorwise": Arithmetic(INT8_ROWS, INT8_ROWS, INT8_ROWS, INT8_COLUMNS),
    "int8_switchback_mem_efficient": Arithmetic(INT8_ROWS, INT8, INT8_ROWS, INT8, exact, INT8_ROWS),
    "int8_rowwise": Arithmetic(INT8_ROWS, INT8_ROWS, INT8_ROWS, INT8_COLUMNS, INT8_COLUMNS, INT8_COLUMNS),
    "fp8_tensorwise": Arithmetic(E4M3, E4M3, E5M2, E4M3, E5M2, E4M3),
    "fp8_tensorwise_power_of_two": Arithmetic(
        *(Rounded(element, None, power_of_two=True) for element in ("e4m3", "e4m3", "e5m2", "e4m3", "e5m2", "e4m3"))
    ),
    "fp8_rowwise": Arithmetic(E4M3_ROWS, E4M3_ROWS, E4M3_ROWS, E4M3_COLUMNS, E4M3_COLUMNS, E4M3_COLUMNS),
    "fp8_rowwise_power_of_two": Arithmetic(*(Rounded("e4m3", dim, power_of_two=True) for dim in (1, 1, 1, 0, 0, 0))),
    "fp8_rowwise_with_gw_hp": Arithmetic(E4M3_ROWS, E4M3_ROWS, E4M3_ROWS, E4M3_COLUMNS),
    "sim_fp8_mixed": Arithmetic(Simulated(4, 3, 1), SIM_E4M3, Simulated(5, 2, 1), SIM_E4M3),
    "sim_fp8_global": Arithmetic(SIM_E4M3, SIM_E4M3, SIM_E5M2, SIM_E4M3, SIM_E5M2, SIM_E4M3),
}
