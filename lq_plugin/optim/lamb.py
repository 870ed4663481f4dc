"""LAMB: Adam's direction scaled to the norm of each tensor, https://arxiv.org/abs/1904.00962."""

from typing import Any

from lq_kernels.adam_rules import LAMB as LAMBRule
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lq_plugin.optim.base import LowBitOptimizer, check_hyper


class LAMB(LowBitOptimizer):
    """Algorithm 2 of the paper: phi is the identity, and where a norm is zero the trust ratio is 1.

    bitsandbytes' LAMB is another: it clips an update of Adam's to the norm of the weight. Defaults are its own. The
    arguments after `maximize` are those of `Options`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        chosen = self.options_of(options)
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        check_hyper(hyper)
        super().__init__(params, hyper | {"maximize": maximize})
        self.adopt(chosen)

    def rule(self, group: dict[str, Any]) -> LAMBRule:
        return LAMBRule(
            lr=group["lr"],
            maximize=group["maximize"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"


class LAMB8bit(LAMB):
    """LAMB whose state is kept in 8 bits unless `state` says otherwise."""

    default_state = "8bit"


class LAMB32bit(LAMB):
    """LAMB whose state is kept in float32 unless `state` says otherwise."""
