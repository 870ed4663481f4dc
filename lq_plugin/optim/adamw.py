"""AdamW with state in few bits: torch.optim.AdamW's arithmetic, weight decay decoupled."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lq_plugin.optim.adam import AdamStep


class AdamW(AdamStep, torch.optim.AdamW):
    """torch.optim.AdamW. The arguments after `differentiable` are those of `Options`.

    `capturable` is accepted and changes nothing: every step can be captured in a CUDA graph once each parameter has
    taken one. For a learning rate that changes between replays pass `lr` as a tensor on the parameters' device.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        **options: Any,
    ) -> None:
        chosen = self.options_of(options)
        self.refuse(amsgrad=amsgrad, differentiable=differentiable, foreach=foreach, fused=fused, betas=betas)
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize, capturable=capturable)
        self.adopt(chosen)


class AdamW8bit(AdamW):
    """AdamW whose state is kept in 8 bits unless `state` says otherwise."""

    default_state = "8bit"


class AdamW32bit(AdamW):
    """AdamW whose state is kept in float32 unless `state` says otherwise."""
