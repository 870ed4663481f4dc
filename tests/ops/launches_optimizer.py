"""Launches of the optimizers' kernels."""

from typing import Any

import torch
from compile_only import LaunchTable, meta
from lq_kernels.adam_rules import LAMB, Adam, AdEMAMix
from lq_kernels.adaptive_rules import Adagrad, RMSprop
from lq_kernels.functional_optim import launch_flat
from lq_kernels.momentum_rules import LARS, SGD, Lion
from lq_kernels.optimizer_batch import Batch
from lq_kernels.optimizer_facts import NO_CLIPPING, Clipping
from lq_kernels.optimizer_rules import Rule
from lq_kernels.optimizer_state import new_state
from lq_kernels.optimizer_step import Job, launch_step
from lq_kernels.percentile_clipping import new_history

MATRICES: list[tuple[int, ...]] = [(4096, 4096), (83, 331)]
MOMENTS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
ADAMW = Adam(lr=1e-3, decoupled=True, **MOMENTS)


def _launch(
    rule: Rule,
    kind: str = "dynamic",
    shapes: list[tuple[int, ...]] = MATRICES,
    clipping: Clipping = NO_CLIPPING,
    seeds: list[int] | None = None,
    master: torch.dtype | None = None,
) -> None:
    params = [meta(*shape) for shape in shapes]
    states = [new_state(param, kind, rule.signs) | new_history(param.device) for param in params]
    for param, state in zip(params, states, strict=True):
        if master is not None:
            state["master"] = torch.empty_like(param, dtype=master)
    launch_step([Job(Batch(params, states, torch.bfloat16), params, [rule], clipping, seeds)])


def _launch_flat() -> None:
    p, state1, state2 = meta(4096), meta(4096, dtype=torch.float32), meta(4096, dtype=torch.float32)
    trust = meta(dtype=torch.float32)
    launch_flat(ADAMW, p, p, [state1, state2], meta(16, dtype=torch.float32), 0.5, trust, True, 0.99)


LAUNCHES: LaunchTable = {
    "AdamW, 8-bit state, clipped": lambda: _launch(ADAMW, clipping=Clipping(5)),
    "AdamW, e4m3 state, one norm": lambda: _launch(ADAMW, "e4m3", clipping=Clipping(5, "global")),
    "Adam, float32 state": lambda: _launch(Adam(lr=1e-3, **MOMENTS), "float32", [(4096,), (331,)]),
    "StableAdamW, stochastic rounding": lambda: _launch(Adam(lr=1e-3, stable=True, **MOMENTS), seeds=[1]),
    "AdamW, 8-bit correction": lambda: _launch(ADAMW, master=torch.int8),
    "AdamW, float32 master": lambda: _launch(ADAMW, master=torch.float32),
    "AdEMAMix": lambda: _launch(
        AdEMAMix(lr=1e-3, betas=(0.9, 0.999, 0.9999), eps=1e-8, weight_decay=0.01, alpha=5.0, t_alpha=9, t_beta3=9)
    ),
    "LAMB": lambda: _launch(LAMB(lr=1e-3, **MOMENTS)),
    "LARS": lambda: _launch(LARS(lr=1e-3, momentum=0.9, weight_decay=0.01, trust_coefficient=1e-3)),
    "SGD, nesterov": lambda: _launch(SGD(lr=1e-3, momentum=0.9, nesterov=True)),
    "SGD, no momentum": lambda: _launch(SGD(lr=1e-3), "float32"),
    "Lion": lambda: _launch(Lion(lr=1e-4, betas=(0.9, 0.99), weight_decay=0.01)),
    "RMSprop, centered, momentum": lambda: _launch(
        RMSprop(lr=1e-2, alpha=0.99, eps=1e-8, momentum=0.9, centered=True), "e4m3"
    ),
    "Adagrad": lambda: _launch(Adagrad(lr=1e-2, eps=1e-10)),
    "functional update": _launch_flat,
}
