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
from lq_kernels.linear_4bit import linear_4bit, linear_4bit_grad_input
from lq_kernels.nested_scales import dequantize_4bit_double, dequantize_scales, quantize_4bit_double
from lq_kernels.requantize_4bit import requantize_4bit
from lq_kernels.rowwise import quantize_rowwise
from lq_kernels.scaled_mm import scaled_mm

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

    def operand(self) -> tuple[Tensor, Tensor, int, str, list[int]]:
        """What ops on a packed matrix take: packed, scale, block_size, quant_type, shape."""
        return self.packed, self.plain_scale(), self.block_size, self.quant_type, list(self.shape)

    def plain_scale(self) -> Tensor:
        """(blocks,) float32, read back if it is quantised."""
        if self.nested is None:
            assert self.scale is not None
            return self.scale
        return dequantize_scales(self.nested.scale_codes, self.nested.nested_scale, self.nested.offset)


def matmul_4bit(x: Tensor, weight: Packed4bit, bias: Tensor | None = None, compute: str | None = None) -> Tensor:
    """x (..., K), weight of shape (N, K), bias (N,) or None -> (..., N), like torch.nn.functional.linear.

    The output has the dtype of x, inside autocast the autocast dtype; W is read back in that dtype, whatever it was
    quantised from, and the bias is cast to it. No rows give no rows. ValueError: an x that is not float32, bfloat16 or
    float16, or sizes that do not fit.

    compute: "int8" or "fp8" multiplies in 8 bits, forward and for the gradient to x: W is read back as 8-bit codes with
    a scale for each row (column), x and grad_output are quantised row by row, sums are int32 or fp8's. It takes rows of
    whole blocks, else ValueError; "fp8" is e4m3, and an error on a GPU without it.
    """
    device = x.device.type
    _check(x, weight, bias)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if compute is None:
        trains = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        # Without a gradient half of the host's time: a product of one row is over before it.
        return _Linear4bit.apply(x, weight, bias) if trains else linear_4bit(x, *weight.operand(), bias)
    if compute not in _COMPUTE:
        raise ValueError(f"matmul_4bit computes in {', '.join(map(repr, _COMPUTE))} or None, got {compute!r}")
    return _Linear8bit.apply(x, weight, bias, _COMPUTE[compute])


_COMPUTE = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class _Linear4bit(torch.autograd.Function):
    """All of one dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Packed4bit, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return linear_4bit(x, *weight.operand(), bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _GradInput4bit.apply(grad_output, ctx.weight)
        if ctx.needs_input_grad[2]:
            grad_bias = _grad_bias(grad_output)
        return grad_x, None, grad_bias


class _GradInput4bit(torch.autograd.Function):
    """grad_output @ W, whose own gradient is the product again."""

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, weight: Packed4bit) -> Tensor:
        ctx.weight = weight
        return linear_4bit_grad_input(grad_output, *weight.operand())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Linear4bit.apply(grad, ctx.weight, None), None


class _Linear8bit(torch.autograd.Function):
    """Both products in 8 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Packed4bit, bias: Tensor | None, element: torch.dtype) -> Tensor:
        ctx.weight, ctx.element = weight, element
        return _product_8bit(x, weight, element, bias, transposed=False)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _GradInput8bit.apply(grad_output, ctx.weight, ctx.element)
        if ctx.needs_input_grad[2]:
            grad_bias = _grad_bias(grad_output)
        return grad_x, None, grad_bias, None


class _GradInput8bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, weight: Packed4bit, element: torch.dtype) -> Tensor:
        ctx.weight, ctx.element = weight, element
        return _product_8bit(grad_output, weight, element, None, transposed=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Linear8bit.apply(grad, ctx.weight, None, ctx.element), None, None


def _product_8bit(x: Tensor, weight: Packed4bit, element: torch.dtype, bias: Tensor | None, transposed: bool) -> Tensor:
    """x (..., K) @ W.t() + bias or, transposed, x (..., N) @ W."""
    codes, scale = quantize_rowwise(x.reshape(-1, x.shape[-1]), element)
    weight_codes, weight_scale = requantize_4bit(*weight.operand(), element, transposed)
    out = scaled_mm(codes, weight_codes.t(), scale, weight_scale.t(), bias, x.dtype)
    return out.view(*x.shape[:-1], out.shape[1])


def _grad_bias(grad_output: Tensor) -> Tensor:
    return grad_output.reshape(-1, grad_output.shape[-1]).sum(dim=0)


def _check(x: Tensor, weight: Packed4bit, bias: Tensor | None) -> None:
    if x.dtype not in _FLOATS:
        raise ValueError(f"matmul_4bit takes float32, bfloat16 or float16, got {x.dtype}: cast it, x.float()")
    if len(weight.shape) != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"matmul_4bit takes x (..., K) and a weight (N, K), got {tuple(x.shape)} and {weight.shape}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"the bias of a weight {weight.shape} is {weight.shape[:1]}, got {tuple(bias.shape)}")
