"""The optimizers of `benchmark=convergence`: each algorithm with the learning rate and arguments that it trains with.

Learning rates are about the best of four, a factor of 3 apart, after 100 steps of the study's model with 32-bit state.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lq_plugin import optim
from lq_plugin.recipes.benchmarks.convergence_studies import Variant

Named = list[tuple[str, nn.Parameter]]

WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Algorithm:
    """A class, the learning rate at factor 1, and the other arguments."""

    make: Callable[..., Optimizer]
    lr: float
    arguments: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = WEIGHT_DECAY


ALGORITHMS: dict[str, Algorithm] = {
    "torch.AdamW": Algorithm(torch.optim.AdamW, 5e-4, {"betas": BETAS, "fused": True}),
    "AdamW": Algorithm(optim.AdamW, 5e-4, {"betas": BETAS}),
    "Lion": Algorithm(optim.Lion, 1e-4, {"betas": (0.9, 0.99)}, weight_decay=1.0),  # the paper: lr / 10, decay x 10
    "SGD": Algorithm(optim.SGD, 3e-2, {"momentum": 0.9}, weight_decay=0.0),
    "Adagrad": Algorithm(optim.Adagrad, 1e-3, weight_decay=0.0),
    "RMSprop": Algorithm(optim.RMSprop, 1e-4, {"alpha": 0.99}, weight_decay=0.0),
    "AdEMAMix": Algorithm(optim.AdEMAMix, 3e-4, {"betas": (0.9, 0.99, 0.9999)}),
    "LAMB": Algorithm(optim.LAMB, 5e-3, {"betas": BETAS}),
    "LARS": Algorithm(optim.LARS, 1.0, {"momentum": 0.9}, weight_decay=1e-4),
    "Muon": Algorithm(optim.Muon, 2e-3, {"adjust_lr_fn": "match_rms_adamw"}),
}


def learning_rate(variant: Variant) -> float:
    return _algorithm(variant.algorithm).lr * variant.lr_factor


def make_optimizers(model: nn.Module, variant: Variant, lr: float | Tensor) -> list[Optimizer]:
    """For all parameters of the model: matrices decay, vectors do not. Beside Muon, AdamW has what is no matrix."""
    if variant.algorithm != "Muon":
        return [_optimizer(list(model.named_parameters()), variant, variant.algorithm, lr)]
    matrices, rest = optim.split_parameters(model)
    return [_optimizer(matrices, variant, "Muon", lr), _optimizer(rest, variant, "AdamW", lr)]


def _optimizer(named: Named, variant: Variant, name: str, lr: float | Tensor) -> Optimizer:
    algorithm = _algorithm(name)
    groups: list[dict[str, Any]] = [
        {"params": [(name, p) for name, p in named if p.dim() >= 2], "weight_decay": algorithm.weight_decay},
        {"params": [(name, p) for name, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name.startswith("torch."):
        graph: dict[str, Any] = {"capturable": True} if isinstance(lr, Tensor) else {}
        return algorithm.make(groups, lr=lr, **algorithm.arguments, **graph)
    options = {
        "state": variant.state,
        "percentile_clipping": variant.percentile,
        "stochastic_rounding": variant.stochastic_rounding,
        "master_weights": variant.master_weights,
    }
    return algorithm.make(groups, lr=lr, **algorithm.arguments, **options)


def _algorithm(name: str) -> Algorithm:
    if name not in ALGORITHMS:
        raise ValueError(f"no algorithm {name!r} to train with; there are {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]
