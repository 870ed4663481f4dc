"""fp8 in values only: operands rounded to bitsandbytes' 8-bit floats, multiplied in their own dtype, on any device.

                   sim_fp8_mixed                                sim_fp8_global
    output         rows(x) @ tensor(w).t()                      tensor(x) @ tensor(w).t()
    grad_input     rows(g, e5m2) @ tensor(w)                    tensor(g, e5m2) @ tensor(w)
    grad_weight    g.t() @ x                                    tensor(g, e5m2).t() @ tensor(x)

rows: a scale for each row, or for each 4096 values of a longer one; bitsandbytes' blocks are flat and cross rows
unless these are 64, 128, ... or 4096 long, where both are the same. For speed there is fp8_rowwise.

Source: bitsandbytes before 0.50, LinearFP8Mixed and LinearFP8Global; https://arxiv.org/abs/2304.13013, section 2.2
"""

from dataclasses import dataclass
from typing import Literal

import torch
from lq_kernels.codebooks import create_fp8_map
from lq_kernels.fake_quantize import fake_quantize_blockwise, fake_quantize_tensorwise
from lq_kernels.simulated_fp8 import simulated_block_size
from torch import Tensor

from lq_plugin.formats.gemm import GemmFormats, HighPrecision
from lq_plugin.formats.operands import Lines

_MAPS = {"e4m3": create_fp8_map(True, 4, 3), "e5m2": create_fp8_map(True, 5, 2)}
_ON_DEVICES: dict[tuple[str, torch.device], Tensor] = {}


@dataclass(frozen=True)
class Simulated:
    """Values rounded to a code book, in their dtype; a scale for the tensor, or for each row in at most 4096 values."""

    code: Literal["e4m3", "e5m2"]
    scale: Literal["rowwise", "tensorwise"]

    def lines(self, x: Tensor) -> Lines:
        code = _map_on(self.code, x.device)
        if self.scale == "tensorwise":
            return Lines(fake_quantize_tensorwise(x, code))
        features = max(x.shape[1], 1)
        return Lines(fake_quantize_blockwise(x, code, simulated_block_size(features), features))


def _map_on(code: str, device: torch.device) -> Tensor:
    """The map on a device, copied there once."""
    if device.type == "cpu":
        return _MAPS[code]
    key = (code, device)
    if torch.compiler.is_compiling():  # nothing is remembered of what is traced
        return _MAPS[code].to(device)
    if key not in _ON_DEVICES:
        _ON_DEVICES[key] = _MAPS[code].to(device)
    return _ON_DEVICES[key]


_VALUE, _GRADIENT = Simulated("e4m3", "tensorwise"), Simulated("e5m2", "tensorwise")

sim_fp8_mixed = GemmFormats(
    "sim_fp8_mixed",
    8,
    output=HighPrecision(Simulated("e4m3", "rowwise"), _VALUE),
    grad_input=HighPrecision(Simulated("e5m2", "rowwise"), _VALUE),
    grad_weight=HighPrecision(),
)
sim_fp8_global = GemmFormats(
    "sim_fp8_global",
    8,
    output=HighPrecision(_VALUE, _VALUE),
    grad_input=HighPrecision(_GRADIENT, _VALUE),
    grad_weight=HighPrecision(_GRADIENT, _VALUE),
)
