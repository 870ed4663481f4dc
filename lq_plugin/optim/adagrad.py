"""Adagrad with state in few bits: torch.optim.Adagrad's arithmetic."""

from typing import Any

import torch
from lq_kernels.adaptive_rules import Adagrad as AdagradRule
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lq_plugin.optim.base import LowBitOptimizer


class Adagrad(LowBitOptimizer, torch.optim.Adagrad):
    """torch.optim.Adagrad. The arguments after torch's are those of `Options`."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Any,
    ) -> None:
        chosen = self.options_of(options)
        self.refuse(differentiable=differentiable, foreach=foreach, fused=fused)
        super().__init__(params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize=maximize)
        self.state.clear()  # torch's begins with a float sum for each parameter
        self.adopt(chosen)

    def rule(self, group: dict[str, Any]) -> AdagradRule:
        return AdagradRule(
            lr=group["lr"],
            maximize=group["maximize"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            lr_decay=group["lr_decay"],
            initial_accumulator_value=group["initial_accumulator_value"],
        )

    def moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("sum",)


class Adagrad8bit(Adagrad):
    """Adagrad whose state is kept in 8 bits unless `state` says otherwise."""

    default_state = "8bit"


class Adagrad32bit(Adagrad):
    """Adagrad whose state is kept in float32 unless `state` says otherwise."""
