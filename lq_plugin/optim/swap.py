"""Turning an optimizer of torch's into ours without making a new object.

Schedulers, Lightning and the user hold references to the optimizer, so its identity has to stay: the class of the
instance changes, its param_groups get our entries, and its state is converted.
"""

import functools
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from lq_plugin.optim.adagrad import Adagrad8bit
from lq_plugin.optim.adam import Adam8bit
from lq_plugin.optim.adamw import AdamW8bit
from lq_plugin.optim.base import LowBitOptimizer
from lq_plugin.optim.muon import Muon8bit
from lq_plugin.optim.options import DROPPED, Options, refuse
from lq_plugin.optim.rmsprop import RMSprop8bit
from lq_plugin.optim.sgd import SGD8bit
from lq_plugin.optim.state_dict import convert_state

TWINS: dict[type[Optimizer], type[LowBitOptimizer]] = {
    torch.optim.AdamW: AdamW8bit,
    torch.optim.Adam: Adam8bit,
    torch.optim.SGD: SGD8bit,
    torch.optim.RMSprop: RMSprop8bit,
    torch.optim.Adagrad: Adagrad8bit,
    torch.optim.Muon: Muon8bit,
}


@dataclass(frozen=True)
class Swap:
    """What `become` did: the class before and after, the arguments it dropped, the tensors whose state it converted."""

    before: type[Optimizer]
    after: type[LowBitOptimizer]
    dropped: tuple[str, ...] = ()
    converted: int = 0

    @property
    def changed(self) -> bool:
        return self.before is not self.after


def twin_of(optimizer_type: type[Optimizer]) -> type[LowBitOptimizer] | None:
    """Our class for exactly this type of torch's, or None; a subclass may compute something else."""
    return TWINS.get(optimizer_type)


def become(
    optimizer: Optimizer,
    options: Options,
    names: Mapping[int, str] | None = None,
    embeddings: Collection[int] = (),
) -> Swap:
    """Makes `optimizer` its twin with few-bit state, in place; one of ours is left as its user built it.

    `names` gives parameters their names and `embeddings` says which are embeddings, both by id(parameter). Raises
    TypeError for an optimizer without a twin and ValueError for amsgrad or differentiable; nothing has changed then.
    fused and foreach are dropped: they say how torch runs its step.
    """
    if isinstance(optimizer, LowBitOptimizer):
        _introduce(optimizer, names, embeddings)
        optimizer.start_gradient_release()
        return Swap(type(optimizer), type(optimizer))
    before, after = type(optimizer), twin_of(type(optimizer))
    if after is None:
        raise TypeError(f"{before.__name__} has no twin with few-bit state; there is one for {_known()}")
    for group in optimizer.param_groups:
        refuse(after.__name__, group, accepted=DROPPED)
    if options.update_clip is not None and not after.takes_update_clip:
        raise ValueError(f"{after.__name__} has no update_clip, Adam and AdamW have; leave it out")
    after.check_running(options)
    scheduled = optimizer.__dict__.get("step")  # a scheduler's wrapper, bound to the class of before
    if scheduled is not None and not hasattr(scheduled, "_wrapped_by_lr_sched"):
        raise TypeError(f"this {before.__name__} has a step of its own, {scheduled!r}; it would be lost")
    dropped = tuple(name for name in DROPPED if any(group.get(name) for group in optimizer.param_groups))
    optimizer.__dict__.pop("_step_supports_amp_scaling", None)  # torch's fused step unscales gradients itself
    for entries in (optimizer.defaults, *optimizer.param_groups):
        entries.update(dict.fromkeys(DROPPED))
    optimizer.__class__ = after
    assert isinstance(optimizer, LowBitOptimizer)
    optimizer._patch_step_function()
    optimizer.adopt(options)
    _introduce(optimizer, names, embeddings)
    converted = _convert_states(optimizer)
    if scheduled is not None:
        optimizer.step = _counted_step(optimizer)  # type: ignore[method-assign]
    return Swap(before, after, dropped, converted)


def _known() -> str:
    return ", ".join(f"torch.optim.{known.__name__}" for known in TWINS)


def _introduce(optimizer: LowBitOptimizer, names: Mapping[int, str] | None, embeddings: Collection[int]) -> None:
    optimizer.name_parameters(names or {})
    optimizer.mark_embeddings(p for group in optimizer.param_groups for p in group["params"] if id(p) in embeddings)


def _convert_states(optimizer: LowBitOptimizer) -> int:
    converted = 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            if optimizer.state.get(param):
                optimizer.state[param] = convert_state(optimizer, group, param, optimizer.state[param])
                converted += bool(optimizer.state[param])
    return converted


def _counted_step(optimizer: Optimizer) -> Callable[..., Any]:
    """The wrapper by which an LRScheduler sees that the optimizer took a step."""
    reference, function = weakref.ref(optimizer), type(optimizer).step

    @functools.wraps(function)
    def step(*args: Any, **kwargs: Any) -> Any:
        alive = reference()
        assert alive is not None
        alive._opt_called = True  # type: ignore[attr-defined]
        return function(alive, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return step
