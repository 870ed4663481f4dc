"""AdamW with 8-bit or float32 state: torch.optim.AdamW's arithmetic, weight decay decoupled."""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lq_plugin.optim.adam import AdamUpdate
from lq_plugin.optim.options import Options, refuse


class AdamW8bit(AdamUpdate, torch.optim.AdamW):
    """torch.optim.AdamW with state in 8 bits.

    The arguments after `differentiable` are those of `Options`. `capturable` is accepted and changes nothing: every
    step can be captured in a CUDA graph once each parameter has taken one. For a learning rate that changes between
    replays pass `lr` as a tensor on the parameters' device.
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
        state: str = "8bit",
        percentile_clipping: int | None = None,
        min_8bit_size: int = 4096,
        block_size: int = 256,
        embedding_state: str = "32bit",
    ) -> None:
        options = Options(state, percentile_clipping, min_8bit_size, block_size, embedding_state)
        torch_arguments = {"amsgrad": amsgrad, "differentiable": differentiable, "foreach": foreach, "fused": fused}
        refuse(type(self).__name__, torch_arguments | {"betas": betas})
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize, capturable=capturable)
        self.adopt(options)
