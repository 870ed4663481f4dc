"""RMSprop with state in few bits: torch.optim.RMSprop's arithmetic, with momentum, centered, or neither."""

from typing import Any

import torch
from lq_kernels.adaptive_rules import RMSprop as RMSpropRule
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lq_plugin.optim.base import LowBitOptimizer


class RMSprop(LowBitOptimizer, torch.optim.RMSprop):
    """torch.optim.RMSprop. The arguments after `differentiable` are those of `Options`.

    With `centered` and 8-bit state the variance is the small difference of two rounded numbers; it is kept from
    falling below 0.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Any,
    ) -> None:
        chosen = self.options_of(options)
        self.refuse(differentiable=differentiable, foreach=foreach)
        super().__init__(
            params, lr, alpha, eps, weight_decay, momentum, centered, capturable=capturable, maximize=maximize
        )
        self.adopt(chosen)

    def rule(self, group: dict[str, Any]) -> RMSpropRule:
        return RMSpropRule(
            lr=group["lr"],
            maximize=group["maximize"],
            alpha=group["alpha"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            centered=group["centered"],
        )

    def moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return (
            "square_avg",
            *["grad_avg"] * group["centered"],
            *["momentum_buffer"] * bool(group["momentum"]),
        )


class RMSprop8bit(RMSprop):
    """RMSprop whose state is kept in 8 bits unless `state` says otherwise."""

    default_state = "8bit"


class RMSprop32bit(RMSprop):
    """RMSprop whose state is kept in float32 unless `state` says otherwise."""
