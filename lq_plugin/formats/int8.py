"""int8 on matrix units. SwitchBack: output and grad_input in int8, grad_weight in 16 bits; int8_rowwise: all three.

The weight gradient sums over all tokens, an inner dimension far longer than the features, so its quantisation noise
is the largest of the three; left in 16 bits, int8 training matches 16-bit training. Where it is in int8 too, each
column of grad_output and of the input has a scale of its own, so that a few tokens with large values do not round all
others to zero; stochastic rounding of grad_output makes its gradients right in expectation.

Source: Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language models", section 2,
https://arxiv.org/abs/2304.13013; stochastic rounding: https://arxiv.org/abs/1502.02551
"""

import torch

from lq_plugin.formats.gemm import GemmFormats, ScaledGemm, high_precision
from lq_plugin.formats.operands import Quantized

_BY_ROW = Quantized(torch.int8, "rowwise")
_GLOBAL = ScaledGemm(_BY_ROW, Quantized(torch.int8, "tensorwise"))
_VECTORWISE = ScaledGemm(_BY_ROW, _BY_ROW)

int8_switchback = GemmFormats("int8_switchback", 8, _GLOBAL, _GLOBAL, high_precision)
int8_switchback_vectorwise = GemmFormats("int8_switchback_vectorwise", 8, _VECTORWISE, _VECTORWISE, high_precision)
int8_switchback_mem_efficient = GemmFormats(
    "int8_switchback_mem_efficient", 8, _GLOBAL, _GLOBAL, high_precision, keeps_codes=True
)


def Int8Rowwise(stochastic_gradient: bool = False) -> GemmFormats:
    """All three products in int8 with a scale for each row of a and each column of b.

    stochastic_gradient: grad_output is rounded up or down by chance, with bits from torch's generator.
    """
    if not stochastic_gradient:
        return GemmFormats("int8_rowwise", 8, _VECTORWISE, _VECTORWISE, _VECTORWISE)
    by_chance = ScaledGemm(Quantized(torch.int8, "rowwise", stochastic=True), _BY_ROW)
    return GemmFormats("int8_rowwise_stochastic", 8, _VECTORWISE, by_chance, by_chance)


int8_rowwise = Int8Rowwise()
