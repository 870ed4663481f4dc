"""SGD with state in few bits: torch.optim.SGD's arithmetic, with momentum, dampening and Nesterov, or without."""

from typing import Any

import torch
from lq_kernels.momentum_rules import SGD as SGDRule
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lq_plugin.optim.base import LowBitOptimizer


class SGD(LowBitOptimizer, torch.optim.SGD):
    """torch.optim.SGD; without momentum there is no state. The arguments after torch's are those of `Options`."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Any,
    ) -> None:
        chosen = self.options_of(options)
        self.refuse(differentiable=differentiable, foreach=foreach, fused=fused)
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)
        self.adopt(chosen)

    def rule(self, group: dict[str, Any]) -> SGDRule:
        return SGDRule(
            lr=group["lr"],
            maximize=group["maximize"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
        )

    def moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()


class SGD8bit(SGD):
    """SGD whose state is kept in 8 bits unless `state` says otherwise."""

    default_state = "8bit"


class SGD32bit(SGD):
    """SGD whose state is kept in float32 unless `state` says otherwise."""
