"""bitsandbytes' research layers with simulated fp8: for its numbers; for speed use the format fp8_rowwise."""

import torch

from lq_plugin.formats.gemm import GemmFormats
from lq_plugin.formats.simulated_fp8 import sim_fp8_global, sim_fp8_mixed
from lq_plugin.layers.linear import QuantLinear


class _SimulatedLinear(QuantLinear):
    """nn.Linear in a format that every layer of the class has."""

    simulated: GemmFormats

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device, dtype)
        self.formats = self.simulated


class LinearFP8Mixed(_SimulatedLinear):
    """nn.Linear with x and grad_output rounded to 8-bit floats by row, the weight with one scale, grad_weight exact.

    bitsandbytes' blocks are flat; here they never cross a row, and are 4096 values of rows that are longer.
    """

    simulated = sim_fp8_mixed


class LinearFP8Global(_SimulatedLinear):
    """nn.Linear with x, weight and grad_output rounded to 8-bit floats, one scale each, in all three products."""

    simulated = sim_fp8_global
