"""Adam with state in few bits: torch.optim.Adam's arithmetic, weight decay as L2."""

from typing import Any

import torch
from lq_kernels.adam_rules import Adam as AdamRule
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lq_plugin.optim.base import LowBitOptimizer


class AdamStep(LowBitOptimizer):
    """The step that Adam and AdamW share; which of the two is in the param_group, as in torch."""

    takes_update_clip = True

    def rule(self, group: dict[str, Any]) -> AdamRule:
        return AdamRule(
            lr=group["lr"],
            maximize=group["maximize"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            stable=group["update_clip"] == "rms",
        )

    def moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"


class Adam(AdamStep, torch.optim.Adam):
    """torch.optim.Adam; `weight_decay` is L2, as in torch. The arguments after torch's are those of `Options`.

    `capturable` is accepted and changes nothing: every step can be captured in a CUDA graph once each parameter has
    taken one. For a learning rate that changes between replays pass `lr` as a tensor on the parameters' device.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        decoupled_weight_decay: bool = False,
        **options: Any,
    ) -> None:
        chosen = self.options_of(options)
        self.refuse(amsgrad=amsgrad, differentiable=differentiable, foreach=foreach, fused=fused, betas=betas)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            maximize=maximize,
            capturable=capturable,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self.adopt(chosen)


class Adam8bit(Adam):
    """Adam whose state is kept in 8 bits unless `state` says otherwise."""

    default_state = "8bit"


class Adam32bit(Adam):
    """Adam whose state is kept in float32 unless `state` says otherwise."""
