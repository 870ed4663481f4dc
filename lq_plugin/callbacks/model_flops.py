"""Model FLOPs utilisation: the arithmetic that the model's formula asks for, as a share of the device's bf16 peak."""

from dataclasses import dataclass

import torch
from torch import nn

from lq_plugin.callbacks.peak_flops import bf16_peak

FLOPS_TRAINED = 6  # per parameter and token: a multiplication and an addition in forward, input and weight gradient
FLOPS_FROZEN = 4  # no weight gradient


@dataclass(frozen=True)
class Utilisation:
    """FLOPs of one token and FLOP/s of one device; `note` says which figures they are, or why there are none."""

    flops_per_token: float | None
    peak: float | None
    note: str

    def share(self, tokens_per_second: float) -> float | None:
        """MFU of one device that trains on so many tokens per second."""
        if self.flops_per_token is None or self.peak is None:
            return None
        return tokens_per_second * self.flops_per_token / self.peak


def utilisation(module: nn.Module, flops_per_token: float | None, device: torch.device) -> Utilisation:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = bf16_peak(name)
    flops = flops_per_token or kaplan_flops_per_token(module)
    if peak is None:
        note = f"no MFU: the dense bf16 peak of {name!r} is not in lq_plugin.callbacks.peak_flops"
    elif flops is None:
        note = "no MFU: packed parameters do not tell how many weights they hold; pass flops_per_token"
    else:
        note = f"MFU: {flops:.4g} FLOPs per token against {peak / 1e12:.4g} TFLOP/s, the dense bf16 peak of {name}"
    return Utilisation(flops, peak, note)


def kaplan_flops_per_token(module: nn.Module) -> int | None:
    """6 per trained and 4 per frozen parameter outside of nn.Embedding; None beside parameters that are packed.

    Source: Kaplan et al., section 2.1, https://arxiv.org/abs/2001.08361, which leaves attention scores out.
    """
    embedded = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    parameters = [p for p in module.parameters() if id(p) not in embedded]
    if not all(p.is_floating_point() for p in parameters):
        return None
    return sum(p.numel() * (FLOPS_TRAINED if p.requires_grad else FLOPS_FROZEN) for p in parameters)
