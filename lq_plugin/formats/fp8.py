"""fp8 on matrix units: one scale for a tensor, with e5m2 for gradients, or one for each row, with e4m3 for all.

e5m2 has two more binary orders of magnitude on either side and a bit of mantissa less; with a scale for each token
gradients no longer need them. Matrix units add fp8 products with about 14 bits: over features that is below the
rounding of the operands, over all tokens it is not, and grad_weight adds in float32 every 256 products.

Source: Micikevicius et al. 2022, "FP8 formats for deep learning", section 3, https://arxiv.org/abs/2209.05433; row
scales and a weight gradient in 16 bits: torchao's recipes `rowwise` and `rowwise_with_gw_hp`; the sums:
https://arxiv.org/abs/2412.19437, section 3.5.2
"""

from typing import Literal

import torch

from lq_plugin.formats.gemm import GemmFormats, ScaledGemm, high_precision
from lq_plugin.formats.operands import Quantized


def Fp8Tensorwise(power_of_two: bool = False) -> GemmFormats:
    """One scale for each tensor; input and weight in e4m3, grad_output in e5m2.

    power_of_two: scales are rounded up to powers of two, so that multiplying by them rounds nothing.
    """
    value = Quantized(torch.float8_e4m3fn, "tensorwise", power_of_two=power_of_two)
    gradient = Quantized(torch.float8_e5m2, "tensorwise", power_of_two=power_of_two)
    return GemmFormats(
        _name("fp8_tensorwise", power_of_two),
        8,
        output=ScaledGemm(value, value),
        grad_input=ScaledGemm(gradient, value),
        grad_weight=ScaledGemm(gradient, value, "precise"),
    )


def Fp8Rowwise(grad_weight: Literal["fp8", "high_precision"] = "fp8", power_of_two: bool = False) -> GemmFormats:
    """A scale for each row of a and each column of b, all in e4m3; grad_weight in 16 bits if asked for."""
    if grad_weight not in ("fp8", "high_precision"):
        raise ValueError(f"Fp8Rowwise takes grad_weight 'fp8' or 'high_precision', got {grad_weight!r}")
    value = Quantized(torch.float8_e4m3fn, "rowwise", power_of_two=power_of_two)
    product = ScaledGemm(value, value)
    if grad_weight == "high_precision":
        name = _name("fp8_rowwise_with_gw_hp", power_of_two)
        return GemmFormats(name, 8, product, product, high_precision)
    name = _name("fp8_rowwise", power_of_two)
    return GemmFormats(name, 8, product, product, ScaledGemm(value, value, "precise"))


def _name(name: str, power_of_two: bool) -> str:
    return f"{name}_power_of_two" if power_of_two else name


fp8_tensorwise = Fp8Tensorwise()
fp8_rowwise = Fp8Rowwise()
fp8_rowwise_with_gw_hp = Fp8Rowwise("high_precision")
