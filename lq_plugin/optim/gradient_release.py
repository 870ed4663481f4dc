"""Each parameter is updated as soon as its gradient is complete, in the backward pass, and the gradient is freed.

Gradients then never exist all at once: of 8-bit AdamW's 6.05 bytes for a bfloat16 parameter 4.05 are left. What an
update needs has to be known when one gradient is: no norm over all tensors, no clipping or unscaling after the backward
pass, no second backward pass before the step. There is one set of launches for each parameter.

Source of the idea: LOMO, https://arxiv.org/abs/2306.09782; the hook is Tensor.register_post_accumulate_grad_hook.
"""

import functools
import operator
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from lq_kernels.multi_tensor import capturing
from lq_kernels.optimizer_batch import Batch
from lq_kernels.optimizer_step import Job
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lq_plugin.optim.plan import How

if TYPE_CHECKING:
    from lq_plugin.optim.base import LowBitOptimizer

_WITHOUT = "leave out gradient_release"


@dataclass(frozen=True, eq=False)
class _Made:
    """The batch of one parameter, and what it was made from."""

    batch: Batch
    how: How
    states: list[Tensor]

    def fits(self, grad: Tensor, how: How, states: Sequence[Tensor]) -> bool:
        return (
            self.batch.grad_type == grad.dtype
            and grad.layout is torch.strided
            and self.how == how
            and self.batch.params[0].device == self.batch.device
            and len(self.states) == len(states)
            and all(map(operator.is_, self.states, states))
        )


class GradientRelease:
    """The hooks of an optimizer on its parameters; without `attach` there are none."""

    def __init__(self, optimizer: "LowBitOptimizer") -> None:
        self._optimizer = weakref.ref(optimizer)
        self._handles: list[RemovableHandle] = []
        self._places: dict[int, tuple[int, int]] = {}  # id(parameter) -> its number, its param group's number
        self._made: dict[int, _Made] = {}
        self._updated: set[int] = set()

    def attach(self) -> None:
        """Hooks on the parameters that the optimizer has now, in place of those from earlier."""
        self.detach()
        optimizer = self._optimizer()
        assert optimizer is not None
        hook = functools.partial(_on_gradient, weakref.ref(self))
        for index, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                self._places[id(param)] = len(self._places), index
                if param.requires_grad:
                    self._handles.append(param.register_post_accumulate_grad_hook(hook))

    def detach(self) -> None:
        """Gradients stay where they are until the step, as without the option."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._places.clear()
        self._made.clear()
        self._updated.clear()

    def updated_all(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether nothing is left to the step."""
        return bool(self._updated) and not any(grad is not None for grad in grads)

    def finish(self) -> None:
        """The step is done: the next gradients may come."""
        self._updated.clear()

    @torch.no_grad()
    def update(self, param: Tensor) -> None:
        """One step of one parameter, which loses its gradient."""
        optimizer, grad = self._optimizer(), param.grad
        if optimizer is None:
            return
        self._check(optimizer, param)
        assert grad is not None
        number, index = self._places[id(param)]
        group = optimizer.param_groups[index]
        rule = optimizer.rule(group)
        how = How.of(group, rule)
        made = self._made.get(number)
        if made is None or not made.fits(grad, how, list(optimizer.state.get(param, {}).values())):
            optimizer.make_ready(index, param, grad)
            state = optimizer.state[param]
            made = _Made(Batch([param], [state], grad.dtype, [0], [number]), how, list(state.values()))
            self._made[number] = made
        seeds = [group["rounding_seed"]] if how.stochastic else None
        optimizer.memory.step([Job(made.batch, [grad], [rule], how.clipping, seeds)])
        self._updated.add(number)
        param.grad = None

    def _check(self, optimizer: "LowBitOptimizer", param: Tensor) -> None:
        if param.grad is None:
            raise RuntimeError(
                f"the gradient of {optimizer.describe(param)} is gone: two optimizers with gradient_release hold it. "
                "Drop the one that is not in use, or call its stop_gradient_release()"
            )
        if self._places[id(param)][0] in self._updated:
            raise RuntimeError(
                f"{optimizer.describe(param)} got a second gradient before the step: gradient_release has updated it "
                "with the first and cannot take that back, so gradients cannot be accumulated, nor a closure be "
                f"evaluated twice. Call step() after each backward pass, or {_WITHOUT}"
            )
        if capturing(param.device):
            raise RuntimeError(f"a backward pass that updates parameters cannot be captured: {_WITHOUT}")
        world_size = _world_size()
        if world_size > 1:
            raise RuntimeError(
                f"gradient_release would update {optimizer.describe(param)} before its gradient is averaged over "
                f"{world_size} processes: {_WITHOUT}, or train in one process"
            )


def _world_size() -> int:
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if started else 1


def _on_gradient(reference: "weakref.ref[GradientRelease]", param: Tensor) -> None:
    release = reference()
    if release is not None:
        release.update(param)
