"""SwitchBack: output and grad_input in int8, grad_weight in 16 bits.

The weight gradient sums over all tokens, an inner dimension far longer than the features, so its quantisation noise
is the largest of the three; left in 16 bits, int8 training matches 16-bit training.

Source: Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language models", section 2,
https://arxiv.org/abs/2304.13013
"""

from dataclasses import dataclass
from typing import Literal

import torch
from lq_kernels.rowwise import (
    quantize_columnwise_transposed,
    quantize_rowwise,
    quantize_tensorwise,
    quantize_tensorwise_transposed,
)
from lq_kernels.scaled_mm import scaled_mm
from torch import Tensor

from lq_plugin.formats.gemm import GemmFormats, high_precision


@dataclass(frozen=True)
class Int8Gemm:
    """Both operands in int8: one scale for each row of a, and one for all of b or one for each column of it."""

    b: Literal["tensorwise", "columnwise"]

    def matmul(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.multiply(*self.quantize_a(a), b, bias, a.dtype)

    def quantize_a(self, a: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_rowwise(a)

    def multiply(self, codes: Tensor, scale: Tensor, b: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        b_codes, b_scale = self._quantize_b(b)
        return scaled_mm(codes, b_codes, scale, b_scale, bias, dtype)

    def _quantize_b(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """b (K, N) -> codes (K, N) whose columns lie contiguous, as int8 matrix units want them, scale (1, N or 1)."""
        columns_contiguous = b.stride(0) == 1
        if self.b == "tensorwise":
            codes, scale = quantize_tensorwise(b.t()) if columns_contiguous else quantize_tensorwise_transposed(b)
        else:
            codes, scale = quantize_rowwise(b.t()) if columns_contiguous else quantize_columnwise_transposed(b)
        return codes.t(), scale.t()


_tensorwise = Int8Gemm("tensorwise")
_columnwise = Int8Gemm("columnwise")

int8_switchback = GemmFormats("int8_switchback", 8, _tensorwise, _tensorwise, high_precision)
int8_switchback_vectorwise = GemmFormats("int8_switchback_vectorwise", 8, _columnwise, _columnwise, high_precision)
int8_switchback_mem_efficient = GemmFormats(
    "int8_switchback_mem_efficient", 8, _tensorwise, _tensorwise, high_precision, saves=_tensorwise
)
