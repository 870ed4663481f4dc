"""Experts kept as three-dimensional parameters, as transformers fuses them, frozen in few bits.

Told by structure: a module with the flags by which transformers runs any experts (has_gate, has_bias, is_transposed),
`down_proj` and `gate_up_proj` or `up_proj`. With tokens sorted by expert, e(t) the expert of token t,

    h      = act(x W_up[e(t)] + b_up[e(t)])            (gated: `_apply_gate` of the experts' own class)
    output = sum over the experts of a token: routing weight * (h W_down[e(t)] + b_down[e(t)])

A weight is read back in the dtype of its input, for the product and again for backward, which keeps codes only. A few
tokens read the weights of their experts alone. int8 codes are read back too: experts run in 16 bits.

Source: https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/moe.py
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lq_plugin.formats.frozen import FrozenFormat
from lq_plugin.layers.frozen import FrozenWeight, output_dtype

_FLAGS = ("has_gate", "has_bias", "is_transposed", "num_experts")
_FURTHER_FLAGS = ("has_post_expert_norm",)
_GROUPED_ALIGNMENT = 16  # bytes; what grouped_mm asks of strides


def projections(module: nn.Module) -> tuple[str, ...]:
    """Names of the three-dimensional float parameters of experts that can be frozen; of other modules none."""
    if not all(hasattr(module, flag) for flag in _FLAGS):
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    found = [getattr(module, name, None) for name in names]
    fit = all(isinstance(p, nn.Parameter) and p.ndim == 3 and p.is_floating_point() for p in found)
    return names if fit else ()


def unknown_experts(module: nn.Module) -> tuple[str, ...]:
    """Names of three-dimensional parameters that look like those of experts in a module whose forward is not known."""
    found = [(name, p) for name, p in module.named_parameters(recurse=False) if p.ndim == 3 and p.is_floating_point()]
    alike = len({p.shape[0] for _, p in found}) == 1 and len(found) > 1
    return tuple(name for name, _ in found) if alike and not projections(module) else ()


def expert_weights(module: nn.Module) -> dict[str, "FrozenExpertWeight"]:
    """name -> weight of frozen experts, those inside of adapters too; of other modules none."""
    if not isinstance(module, FrozenExperts):
        return {}
    return {name: module.frozen_weight(name) for name in module.names}


@dataclass(frozen=True)
class Routing:
    """expert (S,) int64, ascending: that of each row. ends (E,) int32: the row behind the last one of each expert."""

    expert: Tensor
    ends: Tensor


class FrozenExpertWeight(FrozenWeight):
    """The weights (E, O, I) of E experts: x (S, I), sorted by expert -> (S, O) in the dtype that nn.Linear returns.

    transposed: checkpoints hold the float weights as (E, I, O).
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int, format: FrozenFormat) -> None:
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.format = format
        self.rows = format.rows((num_experts, out_features, in_features))
        self.requantize(torch.empty(self.rows.shape, device="meta"))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        return _ExpertProduct.apply(x.to(output_dtype(x)), self, routing)

    def select(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """index (n,) -> the weights (n, O, I) of these experts."""
        return self.rows.select(self.code_tensors(), index, dtype)

    def extra_repr(self) -> str:
        return f"{self.num_experts}, {self.in_features}, {self.out_features}, format={self.format.name}"


class _ExpertProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenExpertWeight, routing: Routing) -> Tensor:
        ctx.weight, ctx.routing = weight, routing
        return _product(x, weight, routing, transposed=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        return _product(grad, ctx.weight, ctx.routing, transposed=False), None, None


def _product(x: Tensor, weight: FrozenExpertWeight, routing: Routing, transposed: bool) -> Tensor:
    """x (S, K) @ the (K, N) weight of each row's expert; `transposed` swaps the (O, I) in which they are kept."""
    if len(x) <= weight.num_experts // 2:
        chosen = weight.select(routing.expert, x.dtype)
        return torch.bmm(x[:, None], chosen.transpose(1, 2) if transposed else chosen)[:, 0]
    if are_grouped(x.dtype, weight.in_features, weight.out_features):
        every = weight.dequantize(x.dtype)
        return F.grouped_mm(x, every.transpose(1, 2) if transposed else every, offs=routing.ends)
    return _one_by_one(x, weight, routing, transposed)


def are_grouped(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether grouped_mm takes matrices of these sizes."""
    return all(size * dtype.itemsize % _GROUPED_ALIGNMENT == 0 for size in sizes)


def _one_by_one(x: Tensor, weight: FrozenExpertWeight, routing: Routing, transposed: bool) -> Tensor:
    """For sizes that grouped_mm does not take; waits for the device."""
    parts, start = [], 0
    for end in routing.ends.tolist():
        if end > start:
            chosen = weight.select(routing.expert[start : start + 1], x.dtype)[0]
            parts.append(x[start:end] @ (chosen.t() if transposed else chosen))
        start = end
    return torch.cat(parts)


class FrozenExperts(nn.Module):
    """Experts with frozen weights, in the place of `experts`, whose attributes and activation it takes over.

    names: of the projections, each a FrozenExpertWeight, which an adapter may wrap. Biases stay what they are.
    """

    names: tuple[str, ...]
    experts_class: Any
    format: FrozenFormat
    num_experts: int
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    @classmethod
    def frozen_from(
        cls, experts: nn.Module, format: FrozenFormat, device: torch.device | str | None = None
    ) -> "FrozenExperts":
        """See `FrozenFormat.freeze`; weights on the meta device give some there."""
        names = projections(experts)
        if getattr(experts, "_is_expert_parallel", False):
            raise ValueError(f"{type(experts).__name__} is split over processes, and frozen experts are not")
        frozen = cls.__new__(cls)
        nn.Module.__init__(frozen)
        for name, value in vars(experts).items():
            setattr(frozen, name, dict(value) if name in ("_parameters", "_modules", "_buffers") else value)
        for flag in (*_FLAGS, *_FURTHER_FLAGS):  # of the class or of the instance
            setattr(frozen, flag, getattr(experts, flag, False))
        frozen.names, frozen.experts_class, frozen.format = names, type(experts), format
        for name in names:
            weight = getattr(experts, name).detach()
            weight = weight.transpose(1, 2) if experts.is_transposed else weight
            held = FrozenExpertWeight(weight.shape[0], weight.shape[2], weight.shape[1], format)
            held.transposed = bool(experts.is_transposed)
            held.requantize(weight if device is None else weight.to(device))
            del frozen._parameters[name]
            frozen.add_module(name, held)
        return frozen

    def frozen_weight(self, name: str) -> FrozenExpertWeight:
        """Of a projection, inside of an adapter too."""
        module = getattr(self, name)
        while not isinstance(module, FrozenExpertWeight):
            module = module.base_layer
        return module

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (T, H), top_k_index and top_k_weights (T, k) -> (T, H) in the dtype of hidden_states."""
        tokens, k = top_k_index.shape
        expert, order = top_k_index.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(expert, torch.arange(self.num_experts, device=expert.device), right=True)
        routing = Routing(expert, ends.to(torch.int32))
        up = self._project(self.names[0], hidden_states[order // k], routing)
        inner = self.experts_class._apply_gate(self, up) if self.has_gate else self.act_fn(up)
        out = self._project("down_proj", inner, routing)
        if self.has_post_expert_norm:
            out = self.post_expert_norm(out)
        weighted = out * top_k_weights.reshape(-1)[order, None]
        return weighted[order.argsort()].view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)

    def _project(self, name: str, x: Tensor, routing: Routing) -> Tensor:
        out = getattr(self, name)(x, routing)
        return out + getattr(self, f"{name}_bias")[routing.expert].to(out.dtype) if self.has_bias else out

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """A checkpoint that was not frozen holds the projections as parameters of this module."""
        for name in self.names:
            plain = state_dict.pop(f"{prefix}{name}", None)
            if plain is not None:
                state_dict[f"{prefix}{self._weight_path(name)}weight"] = plain
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _weight_path(self, name: str) -> str:
        path, module = f"{name}.", getattr(self, name)
        while not isinstance(module, FrozenExpertWeight):
            path, module = f"{path}base_layer.", module.base_layer
        return path

    def extra_repr(self) -> str:
        return f"{self.experts_class.__name__}, format={self.format.name}"


FrozenFormat.experts = FrozenExperts
