"""SwitchBack's layers under the names of bitsandbytes before 0.50."""

from collections.abc import Callable
from typing import Any, Self

import torch
from lq_kernels.rowwise import quantize_rowwise, quantize_tensorwise
from lq_kernels.scaled_mm import scaled_mm
from torch import Tensor, nn

from lq_plugin.formats import TRAINABLE_FORMATS, format_named
from lq_plugin.layers.linear import QuantLinear

_LARGEST = 127.0  # of int8 codes; -128 is never used


class SwitchBackLinear(QuantLinear):
    """nn.Linear with output and grad_input in int8 and grad_weight in 16 bits.

    vector_wise_quantization: a scale for each row (for grad_input: column) of the weight instead of one for all of it.
    mem_efficient: backward keeps the int8 codes of the input instead of the input. Together they are a ValueError.

    Source: Wortsman et al. 2023, section 2, https://arxiv.org/abs/2304.13013
    """

    vector_wise_quantization = False
    mem_efficient = False
    W_int8: Tensor
    state_W: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        vector_wise_quantization: bool | None = None,
        mem_efficient: bool | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if vector_wise_quantization is not None:
            self.vector_wise_quantization = vector_wise_quantization
        if mem_efficient is not None:
            self.mem_efficient = mem_efficient
        name = "int8_switchback" + "_vectorwise" * self.vector_wise_quantization + "_mem_efficient" * self.mem_efficient
        self.formats = TRAINABLE_FORMATS[name] if name in TRAINABLE_FORMATS else format_named(name)  # type: ignore
        self._inference_only = False

    def prepare_for_eval(self) -> None:
        """Keeps the weight in int8 from here on, for inference only; a second call changes nothing.

        In its place there are the buffers W_int8 (O, I) int8 and state_W, its largest magnitudes: (O,) float32, or (1,)
        where one scale serves all. state_W stays float32 when the layer is cast.
        """
        if self._inference_only:
            return
        weight = self.weight.detach()
        by_row = self.vector_wise_quantization
        codes, _ = (quantize_rowwise if by_row else quantize_tensorwise)(weight)
        amax = weight.abs().amax(dim=1) if by_row else weight.abs().amax().view(1)
        del self.weight
        self.register_buffer("W_int8", codes)
        self.register_buffer("state_W", amax.float())
        self._inference_only = True

    def forward(self, input: Tensor) -> Tensor:
        return self._inference(input) if self._inference_only else super().forward(input)

    def _inference(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (self.training or x.requires_grad):
            raise RuntimeError(
                "this SwitchBackLinear has only int8 weights since prepare_for_eval(), and they have no gradient: call "
                "eval() and run it under torch.no_grad(), or load the weights into a new layer to train"
            )
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        codes, scale = quantize_rowwise(x.reshape(-1, x.shape[-1]))
        weight_scale = self.state_W / torch.full_like(self.state_W, _LARGEST)
        output = scaled_mm(codes, self.W_int8.t(), scale, weight_scale.view(1, -1), self.bias, x.dtype)
        return output.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.state_W if self._inference_only else None
        super()._apply(fn, recurse)
        if exact is not None and self.state_W.dtype != torch.float32:
            self.state_W = exact.to(self.state_W.device)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_inference_only", False)  # of layers that were pickled before they had it


class SwitchBackLinearGlobal(SwitchBackLinear):
    """SwitchBackLinear with one scale for the weight: the default, by name."""


class SwitchBackLinearVectorwise(SwitchBackLinear):
    """SwitchBackLinear with a scale for each row of the weight."""

    vector_wise_quantization = True


class SwitchBackLinearGlobalMemEfficient(SwitchBackLinear):
    """SwitchBackLinear that keeps the int8 codes of its input for backward, not the input."""

    mem_efficient = True


class StandardLinear(nn.Linear):
    """nn.Linear under the name that bitsandbytes compares SwitchBack with."""
