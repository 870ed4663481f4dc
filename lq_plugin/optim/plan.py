"""Which tensors of an optimizer go together into a launch, and whether that still holds.

A batch holds the tensors of one device, parameter type, gradient type and way of being updated, from all param groups.
Plans are made at the first step, and again when parameters, their types or their state tensors are others.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from lq_kernels.multi_tensor import State
from lq_kernels.optimizer_batch import Batch
from lq_kernels.optimizer_facts import Clipping
from lq_kernels.optimizer_rules import Rule
from torch import Tensor

from lq_plugin.optim.options import checked_percentile

Group = dict[str, Any]


@dataclass(frozen=True)
class How:
    """What is compiled apart or clipped apart: tensors that share it may share a launch."""

    clipping: Clipping
    variant: str
    moments: int
    measured: bool
    stochastic: bool

    @classmethod
    def of(cls, group: Group, rule: Rule) -> "How":
        clipping = Clipping(checked_percentile(group["percentile_clipping"]), group["clip_scope"])
        return cls(clipping, rule.variant, len(rule.signs), rule.measured, group["stochastic_rounding"])


def check_shared_norm(hows: Sequence[How]) -> None:
    """Raises where one norm over all tensors is asked for by some param groups only."""
    clippings = {how.clipping for how in hows}
    if len(clippings) > 1 and any(clipping.is_global for clipping in clippings):
        raise ValueError(
            "clip_scope='global' takes one norm over all param groups: give each the same percentile_clipping and "
            f"clip_scope, got {sorted(map(str, clippings))}"
        )


@dataclass(frozen=True)
class Planned:
    """A batch; `members` are the places of its tensors among all parameters, `groups` its param groups in order."""

    batch: Batch
    members: list[int]
    groups: list[int]
    how: How

    def grads(self, of_all: list[Tensor | None]) -> list[Tensor | None]:
        return of_all if len(self.members) == len(of_all) else [of_all[i] for i in self.members]


class Plan:
    """Batches, and what they were made from."""

    def __init__(self) -> None:
        self.batches: list[Planned] = []
        self._made_from: tuple[list[Tensor], list[torch.dtype | None], list[How]] = [], [], []
        self._state_tensors: list[Tensor] = []
        self._captured: list[Batch] = []  # a CUDA graph reads their tables

    def clear(self) -> None:
        self._captured += [planned.batch for planned in self.batches if planned.batch.captured]
        self.batches = []
        self._made_from = [], [], []
        self._state_tensors = []

    def fits(
        self, params: list[Tensor], grads: list[Tensor | None], hows: list[How], states: dict[Tensor, State]
    ) -> bool:
        known_params, known_types, known_hows = self._made_from
        present = list(chain.from_iterable(map(dict.values, states.values())))
        return (
            len(known_params) == len(params)
            and all(map(operator.is_, known_params, params))
            and known_hows == hows
            and len(self._state_tensors) == len(present)
            and all(map(operator.is_, self._state_tensors, present))
            and _fit_types(known_types, [None if grad is None else grad.dtype for grad in grads])
            and all(planned.batch.params[0].device == planned.batch.device for planned in self.batches)
        )

    def make(
        self, params: list[Tensor], grads: list[Tensor | None], hows: list[How], of_group: list[int], states: Any
    ) -> None:
        """of_group[i] is the param group of params[i]; parameters without state or gradient are left out."""
        self.clear()
        types = [_grad_type(param, grad, states) for param, grad in zip(params, grads, strict=True)]
        members: dict[tuple[Any, ...], list[int]] = {}
        for i, (param, grad_type) in enumerate(zip(params, types, strict=True)):
            if grad_type is not None:
                master = states[param].get("master")
                kept = None if master is None else master.dtype
                key = param.device, param.dtype, grad_type, kept, hows[of_group[i]]
                members.setdefault(key, []).append(i)
        for (_, _, grad_type, _, how), indices in members.items():
            groups = sorted({of_group[i] for i in indices})
            batch = Batch(
                [params[i] for i in indices],
                [states[params[i]] for i in indices],
                grad_type,
                [groups.index(of_group[i]) for i in indices],
                indices,
            )
            self.batches.append(Planned(batch, indices, groups, how))
        self._made_from = params, types, hows
        self._state_tensors = list(chain.from_iterable(map(dict.values, states.values())))


def _grad_type(param: Tensor, grad: Tensor | None, states: Any) -> torch.dtype | None:
    """None where there is nothing to update yet."""
    if grad is not None:
        return grad.dtype
    return param.dtype if states.get(param) else None


def _fit_types(known: list[torch.dtype | None], actual: list[torch.dtype | None]) -> bool:
    """Equal, as in almost every step, or absent where a batch knows what to expect."""
    return actual == known or all(a is None or a is k for a, k in zip(actual, known, strict=True))
