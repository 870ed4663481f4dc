"""The product of a linear layer whose weight is frozen in 4 bits: x @ W.t() + bias, W read back from its codes.

    output    = x @ W.t() + bias
    grad_x    = grad_output @ W
    grad_bias = sum of grad_output over all leading dimensions

The weight has no gradient, and backward keeps nothing but its codes and scales: W is read back a second time.

Source: QLoRA, section 3, https://arxiv.org/abs/2305.14314
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lq_kernels.blockwise_4bit import dequantize_4bit, quantize_4bit
from lq_kernels.nested_scales import dequantize_4bit_double, dequantize_scales, quantize_4bit_double

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Nested:
    """Scales kept in 8 bits, as `quantize_scales` gives them."""

    scale_codes: Tensor  # (blocks,) uint8
    nested_scale: Tensor  # (ceil(blocks / 256),) float32
    offset: Tensor  # () float32


@dataclass(frozen=True)
class Packed4bit:
    """A tensor in 4 bits and all that is needed to read it back; its scales are in `scale` or, quantised, in `nested`.

    `dtype` is what it was quantised from, and what `dequantize` gives unless it is told otherwise.
    """

    packed: Tensor  # ceil(n / 2) bytes of any dtype
    scale: Tensor | None  # (blocks,) float32
    block_size: int
    quant_type: str  # "nf4" or "fp4"
    shape: tuple[int, ...]
    dtype: torch.dtype
    nested: Nested | None = None

    def __post_init__(self) -> None:
        if (self.scale is None) == (self.nested is None):
            raise ValueError("a packed tensor has either `scale` or `nested`: pass one of them and None for the other")

    @classmethod
    def quantize(
        cls,
        x: Tensor,
        block_size: int = 64,
        quant_type: str = "nf4",
        storage: torch.dtype = torch.uint8,
        double: bool = False,
    ) -> "Packed4bit":
        """x, float of any shape, in 4 bits; `double`: its scales in 8 bits. Errors are those of `quantize_4bit`."""
        if double:
            packed, *nested = quantize_4bit_double(x, block_size, quant_type, storage)
            return cls(packed, None, block_size, quant_type, tuple(x.shape), x.dtype, Nested(*nested))
        packed, scale = quantize_4bit(x, block_size, quant_type, storage)
        return cls(packed, scale, block_size, quant_type, tuple(x.shape), x.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor of `shape` in `dtype`; each value is a float32 product, rounded once."""
        dtype, shape = dtype or self.dtype, list(self.shape)
        if self.nested is None:
            assert self.scale is not None
            return dequantize_4bit(self.packed, self.scale, self.block_size, self.quant_type, shape, dtype)
        return dequantize_4bit_double(
            self.packed,
            self.nested.scale_codes,
            self.nested.nested_scale,
            self.nested.offset,
            self.block_size,
            self.quant_type,
            shape,
            dtype,
        )

    def plain_scale(self) -> Tensor:
        """(blocks,) float32, read back if it is quantised."""
        if self.nested is None:
            assert self.scale is not None
            return self.scale
        return dequantize_scales(self.nested.scale_codes, self.nested.nested_scale, self.nested.offset)


def matmul_4bit(x: Tensor, weight: Packed4bit, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight of shape (N, K), bias (N,) or None -> (..., N), like torch.nn.functional.linear.

    The output has the dtype of x, inside autocast the autocast dtype; W is read back in that dtype, whatever it was
    quantised from, and the bias is cast to it. No rows give no rows. ValueError: an x that is not float32, bfloat16 or
    float16, or sizes that do not fit.
    """
    device = x.device.type
    _check(x, weight, bias)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return _Matmul4bit.apply(x.to(dtype), weight, None if bias is None else bias.to(dtype))


class _Matmul4bit(torch.autograd.Function):
    """All of one dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Packed4bit, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return torch.nn.functional.linear(x, weight.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_output @ ctx.weight.dequantize(grad_output.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(dim=0)
        return grad_x, None, grad_bias


def _check(x: Tensor, weight: Packed4bit, bias: Tensor | None) -> None:
    if x.dtype not in _FLOATS:
        raise ValueError(f"matmul_4bit takes float32, bfloat16 or float16, got {x.dtype}: cast it, x.float()")
    if len(weight.shape) != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"matmul_4bit takes x (..., K) and a weight (N, K), got {tuple(x.shape)} and {weight.shape}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"the bias of a weight {weight.shape} is {weight.shape[:1]}, got {tuple(bias.shape)}")
