"""LoRA beside the fused weights of experts: each expert has an A and a B of its own.

Rows come sorted by expert, so that all experts' thin products are two grouped products. Sizes that grouped_mm does not
take (rows of a multiple of 16 bytes) go through all experts' A side by side, of which each row keeps its expert's part:
as many times the arithmetic as there are experts, and still no wait for the device.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lq_plugin.layers.experts import FrozenExpertWeight, Routing, are_grouped
from lq_plugin.layers.frozen import output_dtype
from lq_plugin.layers.lora import LoRALayer


class LoRAExperts(LoRALayer):
    """x (S, I) sorted by expert -> base(x) + scale B[e] A[e] x, with lora_A (E, r, I) and lora_B (E, O, r)."""

    base_layer: FrozenExpertWeight

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        *,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not isinstance(base_layer, FrozenExpertWeight):
            raise TypeError(f"LoRAExperts takes the weight of frozen experts, got {type(base_layer).__name__}")
        super().__init__(base_layer, r, lora_alpha, use_rslora, init_lora_weights)
        base_layer.requires_grad_(False)
        self.num_experts = base_layer.num_experts
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        options: dict[str, Any] = {"device": base_layer.weight.device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty(self.num_experts, r, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(self.num_experts, self.out_features, r, **options))
        self.lora_magnitude = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Each expert's A and B as those of LoRALinear."""
        bound_a, bound_b = 1 / math.sqrt(max(self.in_features, 1)), 1 / math.sqrt(self.r)
        if self.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.uniform_(self.lora_A, -bound_a, bound_a)
        if self.init_lora_weights is False:
            nn.init.uniform_(self.lora_B, -bound_b, bound_b)
        else:
            nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        y = self.base_layer(x, routing)
        if self._passes_through():
            return y
        dtype = output_dtype(x)
        h = _grouped(x.to(dtype), self.lora_A.to(dtype), routing)
        change = _grouped(h, self.lora_B.to(dtype), routing)
        return torch.add(y, change.to(y.dtype), alpha=self.scale)

    def adapted_weight(self) -> Tensor:
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        weight = self.base_layer.dequantize().to(wide)
        return torch.baddbmm(weight, self.lora_B.to(wide), self.lora_A.to(wide), alpha=self.scale)


def _grouped(x: Tensor, weight: Tensor, routing: Routing) -> Tensor:
    """x (S, K), weight (E, N, K) -> (S, N), each row times the weight of its expert."""
    experts, wide, deep = weight.shape
    if are_grouped(x.dtype, wide, deep):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=routing.ends)
    if wide <= deep:  # all outputs, then the part of the row's expert
        every = (x @ weight.reshape(-1, deep).t()).view(-1, experts, wide)
        index = routing.expert.view(-1, 1, 1).expand(-1, 1, wide)
        return every.gather(1, index).squeeze(1)
    spread = F.one_hot(routing.expert, experts).to(x.dtype).unsqueeze(2) * x.unsqueeze(1)  # zero in others' places
    return spread.flatten(1) @ weight.permute(0, 2, 1).reshape(-1, wide)
