"""LARS: SGD with momentum and a learning rate for each tensor, https://arxiv.org/abs/1708.03888."""

from typing import Any

from lq_kernels.momentum_rules import LARS as LARSRule
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lq_plugin.optim.base import LowBitOptimizer, check_hyper


class LARS(LowBitOptimizer):
    """Algorithm 1 of the paper: the momentum holds steps, learning rates included.

    `trust_coefficient` is the paper's eta. bitsandbytes' LARS is another: it clips steps of SGD. The arguments after
    `maximize` are those of `Options`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0,
        trust_coefficient: float = 1e-3,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        chosen = self.options_of(options)
        hyper = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        check_hyper(hyper)
        super().__init__(params, hyper | {"maximize": maximize})
        self.adopt(chosen)

    def rule(self, group: dict[str, Any]) -> LARSRule:
        return LARSRule(
            lr=group["lr"],
            maximize=group["maximize"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            trust_coefficient=group["trust_coefficient"],
        )

    def moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",)


class LARS8bit(LARS):
    """LARS whose state is kept in 8 bits unless `state` says otherwise."""

    default_state = "8bit"


class LARS32bit(LARS):
    """LARS whose state is kept in float32 unless `state` says otherwise."""
