"""Adam with 8-bit or float32 state: torch.optim.Adam's arithmetic, weight decay as L2."""

from typing import Any

import torch
from lq_kernels.multi_tensor import Batch
from lq_kernels.optimizer_8bit import Adam, adam_step
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lq_plugin.optim.base import LowBitOptimizer
from lq_plugin.optim.options import Options, checked_percentile, refuse


class AdamUpdate(LowBitOptimizer):
    """The step that Adam and AdamW share; which of the two is in the param_group, as in torch."""

    def update(self, group: dict[str, Any], batch: Batch, grads: list[Tensor | None]) -> None:
        adam = Adam(
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            maximize=group["maximize"],
            percentile=checked_percentile(group["percentile_clipping"]),
        )
        adam_step(batch, grads, adam)


class Adam8bit(AdamUpdate, torch.optim.Adam):
    """torch.optim.Adam with state in 8 bits; `weight_decay` is L2, as in torch.

    The arguments after `decoupled_weight_decay` are those of `Options`. `capturable` is accepted and changes nothing:
    every step can be captured in a CUDA graph once each parameter has taken one. For a learning rate that changes
    between replays pass `lr` as a tensor on the parameters' device.
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
        state: str = "8bit",
        percentile_clipping: int | None = None,
        min_8bit_size: int = 4096,
        block_size: int = 256,
        embedding_state: str = "32bit",
    ) -> None:
        options = Options(state, percentile_clipping, min_8bit_size, block_size, embedding_state)
        torch_arguments = {"amsgrad": amsgrad, "differentiable": differentiable, "foreach": foreach, "fused": fused}
        refuse(type(self).__name__, torch_arguments | {"betas": betas})
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
        self.adopt(options)
