"""AdEMAMix: AdamW with a second, slow average of the gradients, https://arxiv.org/abs/2409.03137."""

from typing import Any

from lq_kernels.adam_rules import AdEMAMix as AdEMAMixRule
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lq_plugin.optim.base import LowBitOptimizer, check_hyper


class AdEMAMix(LowBitOptimizer):
    """Defaults of bitsandbytes. `t_alpha` and `t_beta3` are the steps over which alpha and beta3 grow, None for none.

    The arguments after `maximize` are those of `Options`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        chosen = self.options_of(options)
        hyper = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "t_alpha": t_alpha,
            "t_beta3": t_beta3,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        check_hyper(hyper)
        super().__init__(params, hyper | {"maximize": maximize})
        self.adopt(chosen)

    def rule(self, group: dict[str, Any]) -> AdEMAMixRule:
        return AdEMAMixRule(
            lr=group["lr"],
            maximize=group["maximize"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            alpha=group["alpha"],
            t_alpha=group["t_alpha"],
            t_beta3=group["t_beta3"],
        )

    def moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq", "exp_avg_slow"


class AdEMAMix8bit(AdEMAMix):
    """AdEMAMix whose state is kept in 8 bits unless `state` says otherwise."""

    default_state = "8bit"


class AdEMAMix32bit(AdEMAMix):
    """AdEMAMix whose state is kept in float32 unless `state` says otherwise."""
