"""Linear layers whose weight is trained and whose three matrix products run in a format.

    output      = x @ weight.t() + bias
    grad_input  = grad_output @ weight
    grad_weight = grad_output.t() @ x

The weight stays the parameter that it was, in its dtype, and is quantised on every forward: checkpoints, optimizers
and sharding see an nn.Linear.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lq_plugin.formats.devices import require_device
from lq_plugin.formats.gemm import GemmFormats, matmul

_INPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer with its weight (in, out)."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ in ("Conv1D", "QuantConv1D") and isinstance(weight, nn.Parameter) and weight.dim() == 2


class _Linear(torch.autograd.Function):
    """x (T, I), weight (O, I), bias (O,) or None -> (T, O) in the dtype of x, to be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, formats: GemmFormats) -> Tensor:
        trains_x, trains_weight, *_ = ctx.needs_input_grad
        a, kept_of_x = formats.input.first(x, later=trains_weight)
        b, kept_of_weight = formats.weight.first(weight, later=trains_x)
        ctx.formats, ctx.kept_of_x, ctx.dtype = formats, len(kept_of_x), x.dtype
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(*kept_of_x, *kept_of_weight)
        return formats.output.multiply(a, b, bias, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        formats = ctx.formats
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"{formats.name} has no gradient of its gradient, and create_graph=True asks for one: leave the "
                "layers that a gradient penalty goes through in 16 bits (skip=)"
            )
        kept = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        trains_x, trains_weight, trains_bias, _ = ctx.needs_input_grad
        rows, columns = formats.grad_output.both(grad_output, trains_x, trains_weight)
        if rows is not None:
            weight = formats.weight.second(kept[ctx.kept_of_x :], ctx.dtype)
            grad_input = formats.grad_input.multiply(rows, weight, None, ctx.dtype)
        if columns is not None:
            x = formats.input.second(kept[: ctx.kept_of_x], ctx.dtype)
            grad_weight = formats.grad_weight.multiply(columns, x, None, ctx.weight_dtype)
        if trains_bias:
            grad_bias = grad_output.sum(0, dtype=ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, formats: GemmFormats) -> Tensor:
    """x (..., I), weight (O, I), bias (O,) or None -> (..., O), like torch.nn.functional.linear, in a format.

    The output has the dtype that functional.linear gives: the autocast dtype inside autocast, else the dtype of x.
    TypeError: an input that is not float32, float16 or bfloat16, or outside autocast is not of the weight's dtype.
    """
    device = x.device.type
    if device == "cuda" and not torch.compiler.is_compiling():
        require_device(formats, x.device)
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
    rows = x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
    if torch.is_grad_enabled():
        output = _Linear.apply(rows, weight, bias, formats)
    else:
        output = matmul(formats.output, rows, weight.t(), bias)
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
