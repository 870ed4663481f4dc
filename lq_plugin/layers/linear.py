"""Linear layers whose weight is trained and whose three matrix products run in a format.

    output      = format.output.matmul(x, weight.t())
    grad_input  = format.grad_input.matmul(grad_output, weight)
    grad_weight = format.grad_weight.matmul(grad_output.t(), x)

The weight stays the parameter that it was, in its dtype, and is quantised on every forward: checkpoints, optimizers
and sharding see an nn.Linear.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lq_plugin.formats import format_named
from lq_plugin.formats.gemm import GemmFormats

_INPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Linear(torch.autograd.Function):
    """x (T, I), weight (O, I), bias (O,) or None -> (T, O) in the dtype of x, to be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, formats: GemmFormats) -> Tensor:
        ctx.formats, ctx.dtype = formats, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        if formats.saves is None:
            ctx.save_for_backward(weight, x)
            return formats.output.matmul(x, weight.t(), bias)
        codes, scale = formats.saves.quantize_a(x)
        ctx.save_for_backward(weight, codes, scale)
        return formats.saves.multiply(codes, scale, weight.t(), bias, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"{ctx.formats.name} has no gradient of its gradient, and create_graph=True asks for one: leave the "
                "layers that a gradient penalty goes through in 16 bits (skip=)"
            )
        weight, *saved = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = ctx.formats.grad_input.matmul(grad_output, weight)
        if ctx.needs_input_grad[1]:
            x = saved[0] if len(saved) == 1 else (saved[0] * saved[1]).to(ctx.dtype)
            grad_weight = ctx.formats.grad_weight.matmul(grad_output.t(), x).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.sum(0, dtype=ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, formats: GemmFormats) -> Tensor:
    """x (..., I), weight (O, I), bias (O,) or None -> (..., O), like torch.nn.functional.linear, in a format.

    The output has the dtype that functional.linear gives: the autocast dtype inside autocast, else the dtype of x.
    TypeError: an input that is not float32, float16 or bfloat16, or outside autocast is not of the weight's dtype.
    """
    device = x.device.type
    if x.dtype not in _INPUT_DTYPES:
        raise TypeError(
            f"{formats.name} got an input of {x.dtype}, expected float32, float16 or bfloat16; cast it first"
        )
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    elif x.dtype != weight.dtype:
        raise TypeError(
            f"{formats.name} got an input of {x.dtype} and a weight of {weight.dtype}: cast one, or use autocast"
        )
    output = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, formats)
    return output.view(*x.shape[:-1], weight.shape[0])


class QuantLinear(nn.Linear):
    """nn.Linear whose products run in `formats`; an nn.Linear becomes one by a change of its class."""

    formats: GemmFormats

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, self.formats)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.formats.name}"


class QuantConv1D(nn.Module):
    """The linear layer of GPT-2 in transformers, `Conv1D`, with its weight (I, O), in a format."""

    weight: nn.Parameter
    bias: nn.Parameter
    formats: GemmFormats

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.t(), self.bias, self.formats)

    def extra_repr(self) -> str:
        return f"in={self.weight.shape[0]}, out={self.weight.shape[1]}, format={self.formats.name}"


class SwitchBackLinear(QuantLinear):
    """nn.Linear with output and grad_input in int8 and grad_weight in 16 bits.

    vector_wise_quantization: a scale for each row (for grad_input: column) of the weight instead of one for all of it.
    mem_efficient: backward keeps the int8 codes of the input instead of the input. Together they are a ValueError.

    Source: Wortsman et al. 2023, section 2, https://arxiv.org/abs/2304.13013
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        vector_wise_quantization: bool = False,
        mem_efficient: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        suffix = "_vectorwise" * vector_wise_quantization + "_mem_efficient" * mem_efficient
        self.formats = format_named(f"int8_switchback{suffix}")
