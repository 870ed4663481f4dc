"""Lion: steps of one size in the direction of a momentum, https://arxiv.org/abs/2302.06675."""

from typing import Any

from lq_kernels.momentum_rules import Lion as LionRule
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lq_plugin.optim.base import LowBitOptimizer, check_hyper


class Lion(LowBitOptimizer):
    """Defaults of bitsandbytes. The arguments after `maximize` are those of `Options`."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        chosen = self.options_of(options)
        hyper = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        check_hyper(hyper)
        super().__init__(params, hyper | {"maximize": maximize})
        self.adopt(chosen)

    def rule(self, group: dict[str, Any]) -> LionRule:
        return LionRule(
            lr=group["lr"],
            maximize=group["maximize"],
            betas=group["betas"],
            weight_decay=group["weight_decay"],
        )

    def moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)


class Lion8bit(Lion):
    """Lion whose state is kept in 8 bits unless `state` says otherwise."""

    default_state = "8bit"


class Lion32bit(Lion):
    """Lion whose state is kept in float32 unless `state` says otherwise."""
