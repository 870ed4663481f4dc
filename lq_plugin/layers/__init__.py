"""Layers to use by hand in any nn.Module, without Lightning."""

from functools import partial

from lq_plugin.layers.linear import QuantLinear, SwitchBackLinear

SwitchBackLinearGlobal = SwitchBackLinear
SwitchBackLinearVectorwise = partial(SwitchBackLinear, vector_wise_quantization=True)
SwitchBackLinearGlobalMemEfficient = partial(SwitchBackLinear, mem_efficient=True)

__all__ = [
    "QuantLinear",
    "SwitchBackLinear",
    "SwitchBackLinearGlobal",
    "SwitchBackLinearGlobalMemEfficient",
    "SwitchBackLinearVectorwise",
]
