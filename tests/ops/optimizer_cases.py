"""Batches of an optimizer in the middle of training, of hostile shapes, in memory that is poisoned around them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lq_kernels.adam_rules import LAMB, Adam, AdEMAMix
from lq_kernels.adaptive_rules import Adagrad, RMSprop
from lq_kernels.momentum_rules import LARS, SGD, Lion
from lq_kernels.multi_tensor import State
from lq_kernels.muon_rules import MuonDirection, MuonWeight
from lq_kernels.optimizer_batch import Batch
from lq_kernels.optimizer_facts import NO_CLIPPING, Clipping
from lq_kernels.optimizer_rules import Rule
from lq_kernels.optimizer_state import new_state
from lq_kernels.optimizer_step import Job, step_reference
from lq_kernels.percentile_clipping import new_history
from lq_kernels.weight_rounding import join_weight
from torch import Tensor

CPU = torch.device("cpu")
MOMENTS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
ADAMW = Adam(lr=1e-2, decoupled=True, **MOMENTS)
CLIPPED = Clipping(5)
RULES: dict[str, Rule] = {
    "adam": Adam(lr=1e-2, **MOMENTS | {"eps": 1e-2}),
    "adamw": ADAMW,
    "stable adam": Adam(lr=1e-2, stable=True, **MOMENTS),
    "stable adamw": replace(ADAMW, stable=True),
    "ademamix": AdEMAMix(
        lr=1e-2, betas=(0.9, 0.999, 0.9999), eps=1e-2, weight_decay=0.1, alpha=5.0, t_alpha=4, t_beta3=5
    ),
    "lamb": LAMB(lr=1e-2, **MOMENTS | {"eps": 1e-2}),
    "sgd": SGD(lr=1e-2, weight_decay=0.1),
    "sgd, momentum": SGD(lr=1e-2, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "sgd, nesterov": SGD(lr=1e-2, momentum=0.9, nesterov=True),
    "lars": LARS(lr=0.8, momentum=0.9, weight_decay=0.1, trust_coefficient=0.02),
    "lion": Lion(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1),
    "rmsprop": RMSprop(lr=1e-2, alpha=0.9, eps=1e-2, weight_decay=0.1),
    "rmsprop, momentum": RMSprop(lr=1e-2, alpha=0.9, eps=1e-8, momentum=0.9),
    "rmsprop, centered": RMSprop(lr=1e-2, alpha=0.9, eps=1e-8, centered=True),
    "rmsprop, centered, momentum": RMSprop(lr=1e-2, alpha=0.9, eps=1e-8, momentum=0.9, centered=True),
    "adagrad": Adagrad(lr=1e-2, eps=1e-2, weight_decay=0.1, lr_decay=0.1, initial_accumulator_value=0.5),
    "muon, direction": MuonDirection(lr=1e-2, momentum=0.9, nesterov=False),
    "muon, nesterov direction": MuonDirection(lr=1e-2, momentum=0.9),
    "muon, weight": MuonWeight(lr=1e-2, weight_decay=0.1, ratio=3.0),
}

# Rows of whole blocks, ragged rows, one block over, several programs; those without rows keep float32 state.
SHAPES = [(9, 512), (3, 1000), (3, 257), (9, 3), (4, 3, 5, 7), (3, 256), (1, 1), (2048,), (2049,), (), (0,), (300,)]
FEW = [(2, 512), (3, 257), (0,), (300,)]
MARGIN = 64  # elements, a multiple of 16 bytes in every type


def poisoned(values: Tensor, margin: int) -> Tensor:
    """A contiguous view, equal to `values`, into memory of infinities (integers: 255)."""
    if values.dtype == torch.float8_e4m3fn:
        return poisoned(values.view(torch.uint8), margin).view(values.dtype)
    poison = math.inf if values.is_floating_point() else 100 if values.dtype == torch.int8 else 255
    buffer = torch.full((values.numel() + 2 * margin,), poison, dtype=values.dtype, device=values.device)
    return buffer[margin : margin + values.numel()].view(values.shape).copy_(values)


def margins(view: Tensor) -> Tensor:
    whole = torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())
    start = view.storage_offset()
    return torch.cat([whole[:start], whole[start + view.numel() :]])


@dataclass
class Case:
    batch: Batch
    grads: list[Tensor | None]

    def to(self, device: torch.device, margin: int = MARGIN) -> "Case":
        """The same values in poisoned memory of a device."""
        params = [poisoned(param.to(device), margin) for param in self.batch.params]
        states = [
            {key: poisoned(value.to(device), margin) for key, value in state.items()} for state in self.batch.states
        ]
        grads = [None if grad is None else poisoned(grad.to(device), margin) for grad in self.grads]
        return Case(Batch(params, states, self.batch.grad_type), grads)

    def job(self, rule: Rule, clipping: Clipping = NO_CLIPPING, seeds: list[int] | None = None) -> Job:
        return Job(self.batch, self.grads, [rule], clipping, seeds)


def heavy_tailed(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * torch.exp(2 * torch.randn(shape))


def trained(
    dtype: torch.dtype,
    grad_type: torch.dtype | None = None,
    rule: Rule = ADAMW,
    clipping: Clipping = NO_CLIPPING,
    kind: str = "dynamic",
    shapes: Sequence[tuple[int, ...]] = SHAPES,
) -> Case:
    """Parameters after two steps of the reference, and the gradients of the next."""
    params = [torch.randn(shape).to(dtype) for shape in shapes]
    states = [
        new_state(param, kind if param.dim() > 1 else "float32", rule.signs, rule.initial) | new_history(CPU)
        for param in params
    ]
    batch = Batch(params, states, grad_type or dtype)
    for _ in range(2):
        grads = [heavy_tailed(shape).to(batch.grad_type) for shape in shapes]
        step_reference([Job(batch, grads, [rule], clipping)])
    return Case(batch, [heavy_tailed(shape).to(batch.grad_type) for shape in shapes])


def every_tensor(case: Case) -> list[Tensor]:
    states = [value for state in case.batch.states for value in state.values()]
    return [*case.batch.params, *(grad for grad in case.grads if grad is not None), *states]


def with_masters(case: Case, kind: torch.dtype) -> Case:
    """Adds random bits that bfloat16 does not hold, as int8 corrections, or as weights in float32."""
    for state, param in zip(case.batch.states, case.batch.params, strict=True):
        correction = torch.randint(-127, 128, param.shape, dtype=torch.int8)
        state["master"] = correction if kind == torch.int8 else join_weight(param, correction)
    return case


def weight(param: Tensor, state: State) -> Tensor:
    """The float32 weight that a parameter and its master hold together."""
    master = state.get("master")
    if master is None:
        return param.float()
    return master.cpu() if master.dtype == torch.float32 else join_weight(param, master.cpu())
