"""What the optimizers with few-bit state share: which tensors go together into a launch, and how state begins.

A subclass has a torch.optim parent, from which it takes the constructor's checks, param_groups, hooks and
zero_grad, and gives `update`, one step over the tensors of a batch. State is created at a parameter's first gradient
and never moves between 8 and 32 bits after that; what it is can be read from its keys.
"""

import operator
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from lq_kernels.multi_tensor import Batch, State
from lq_kernels.optimizer_state import new_state
from lq_kernels.percentile_clipping import CLIPPED, RECORDED, SKIPPED, new_history
from torch import Tensor

from lq_plugin.optim.options import FORMAT, Options, check_state, checked_percentile, keeps_8bit_state, refuse
from lq_plugin.optim.state_dict import loaded

PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Components of a dotted name that stand for an embedding: embed_tokens, word_embeddings, token_emb; GPT-2's wte, wpe.
_EMBEDDING_NAME = re.compile(r"(^|_)emb|embed|^wte$|^wpe$")


@dataclass(eq=False)
class _Plan:
    """Batches by param group, and what they were made from."""

    groups: list["_GroupPlan"] = field(default_factory=list)
    state_tensors: list[Tensor] = field(default_factory=list)
    captured: list[Batch] = field(default_factory=list)  # a CUDA graph reads their tables

    def clear(self) -> None:
        self.captured += [batch for group in self.groups for batch, _ in group.batches if batch.captured]
        self.groups.clear()
        self.state_tensors.clear()


@dataclass(eq=False)
class _GroupPlan:
    params: list[Tensor]
    grad_types: list[torch.dtype | None]  # None: no state yet
    percentile: int | None
    batches: list[tuple[Batch, list[int]]]

    def fits(self, group: dict[str, Any], grads: list[Tensor | None]) -> bool:
        return (
            self.percentile == checked_percentile(group["percentile_clipping"])
            and len(self.params) == len(group["params"])
            and all(map(operator.is_, self.params, group["params"]))
            and self._fit_types([None if grad is None else grad.dtype for grad in grads])
            and all(batch.params[0].device == batch.device for batch, _ in self.batches)
        )

    def _fit_types(self, types: list[torch.dtype | None]) -> bool:
        """Equal, as in almost every step, or absent where a batch knows what to expect."""
        return types == self.grad_types or all(
            actual is None or actual is known for actual, known in zip(types, self.grad_types, strict=True)
        )


class LowBitOptimizer(torch.optim.Optimizer):
    """Base of the optimizers whose state is an argument; not to be used alone."""

    _names: list[tuple[Tensor, str]]
    _embeddings: list[Tensor]
    _warned_skipped: bool
    _plan: _Plan

    def update(self, group: dict[str, Any], batch: Batch, grads: list[Tensor | None]) -> None:
        """One step of the algorithm over a batch, in place; a gradient of None leaves its tensor alone."""
        raise NotImplementedError

    def adopt(self, options: Options) -> None:
        """Writes options and state format into defaults and param_groups, where a checkpoint finds them."""
        self._set_up()
        entries = options.as_group()
        self.defaults.update(entries)
        for group in self.param_groups:
            for key, value in entries.items():
                group.setdefault(key, value)
            self.check_group(group)

    def _set_up(self) -> None:
        for name, value in (("_names", []), ("_embeddings", []), ("_warned_skipped", False), ("_plan", _Plan())):
            self.__dict__.setdefault(name, value)

    def check_group(self, group: dict[str, Any]) -> None:
        refuse(type(self).__name__, group)
        check_state("state", group["state"])
        check_state("embedding_state", group["embedding_state"])
        checked_percentile(group["percentile_clipping"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "format_version" in self.defaults:  # else torch's constructor is running, and `adopt` checks
            self.check_group(self.defaults | param_group)
        super().add_param_group(param_group)

    def mark_embeddings(self, parameters: Iterable[Tensor]) -> None:
        """Says which parameters are embeddings; state that exists already stays as it is."""
        known = set(map(id, self._embeddings))
        self._embeddings.extend(param for param in parameters if id(param) not in known)

    def name_parameters(self, names: Mapping[int, str]) -> None:
        """Gives parameters their names, by id(parameter), for messages."""
        params = [param for group in self.param_groups for param in group["params"]]
        unchanged = [(param, name) for param, name in self._names if id(param) not in names]
        self._names[:] = unchanged + [(param, names[id(param)]) for param in params if id(param) in names]

    def parameter_name(self, param: Tensor) -> str | None:
        """The name that the constructor or `name_parameters` gave, or None."""
        known = (name for named, name in self._names if named is param)
        return next(known, None) or self._constructor_name(param)

    def _constructor_name(self, param: Tensor) -> str | None:
        """The name that came with `named_parameters()`."""
        for group in self.param_groups:
            for named, name in zip(group["params"], group.get("param_names", ()), strict=False):
                if named is param:
                    return name
        return None

    def describe(self, param: Tensor) -> str:
        name = self.parameter_name(param)
        return repr(name) if name is not None else f"a parameter of shape {tuple(param.shape)}"

    def _is_embedding(self, param: Tensor) -> bool:
        """By `mark_embeddings`, or by the name that came with `named_parameters()`."""
        components = (self._constructor_name(param) or "").split(".")
        return any(known is param for known in self._embeddings) or any(map(_EMBEDDING_NAME.search, components))

    def keeps_8bit_state(self, group: dict[str, Any], param: Tensor) -> bool:
        """Whether state created now for `param` would be in 8 bits."""
        names = ("state", "min_8bit_size", "block_size", "embedding_state")
        return keeps_8bit_state(param, Options(**{name: group[name] for name in names}), self._is_embedding(param))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` may compute the loss, which is returned. Raises before anything is modified."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [[param.grad for param in group["params"]] for group in self.param_groups]
        self._plan_for(grads)
        for group, plan, of_group in zip(self.param_groups, self._plan.groups, grads, strict=True):
            for batch, indices in plan.batches:
                self.update(group, batch, [of_group[i] for i in indices])
        return loss

    def _plan_for(self, grads: list[list[Tensor | None]]) -> None:
        """Makes the batches again if parameters, types or state tensors are not those they were made from."""
        layouts = {grad.layout for of_group in grads for grad in of_group if grad is not None}
        if not layouts <= {torch.strided}:
            self._check_types(grads)
        present = list(chain.from_iterable(map(dict.values, self.state.values())))
        known = self._plan.state_tensors
        if (
            len(self._plan.groups) == len(self.param_groups)
            and len(known) == len(present)
            and all(map(operator.is_, known, present))
            and all(map(_GroupPlan.fits, self._plan.groups, self.param_groups, grads))
        ):
            return
        self._check_types(grads)
        self._plan.clear()
        self._plan.groups += map(self._plan_group, self.param_groups, grads)
        self._plan.state_tensors += chain.from_iterable(map(dict.values, self.state.values()))

    def _check_types(self, grads: list[list[Tensor | None]]) -> None:
        for group, of_group in zip(self.param_groups, grads, strict=True):
            for param, grad in zip(group["params"], of_group, strict=True):
                if grad is not None:
                    self._check_tensor(param, param, "parameters")
                    self._check_tensor(param, grad, "gradients")

    def _check_tensor(self, param: Tensor, tensor: Tensor, what: str) -> None:
        if hasattr(tensor, "device_mesh"):
            raise TypeError(
                f"{type(self).__name__} takes whole tensors; {self.describe(param)} is sharded, a "
                f"{type(tensor).__name__}. Nothing was updated; give sharded parameters an optimizer of torch's."
            )
        if tensor.layout is not torch.strided or tensor.dtype not in PARAMETER_DTYPES:
            kind = tensor.dtype if tensor.layout is torch.strided else f"{tensor.layout} {tensor.dtype}"
            raise TypeError(
                f"{type(self).__name__} takes dense float32, bfloat16 or float16 {what}; {self.describe(param)} has "
                f"{kind}. Nothing was updated; give this parameter an optimizer of torch's."
            )

    def _plan_group(self, group: dict[str, Any], grads: list[Tensor | None]) -> _GroupPlan:
        params, percentile = group["params"], checked_percentile(group["percentile_clipping"])
        grad_types: list[torch.dtype | None] = []
        members: dict[tuple[torch.device, torch.dtype, torch.dtype], list[int]] = {}
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            if grad is None and not self.state.get(param):
                grad_types.append(None)
                continue
            self._ready_state(group, param)
            grad_type = param.dtype if grad is None else grad.dtype
            grad_types.append(grad_type)
            members.setdefault((param.device, param.dtype, grad_type), []).append(i)
        batches = [
            (Batch([params[i] for i in indices], [self.state[params[i]] for i in indices], grad_type), indices)
            for (_, _, grad_type), indices in members.items()
        ]
        return _GroupPlan(list(params), grad_types, percentile, batches)

    def _ready_state(self, group: dict[str, Any], param: Tensor) -> None:
        """Creates what is missing of a parameter's state, and follows the parameter to its device."""
        state: State = self.state[param]
        if not state:
            if param.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"{self.describe(param)} has no state yet: run one step before CUDA graph capture")
            state.update(new_state(param, self.keeps_8bit_state(group, param)))
        if checked_percentile(group["percentile_clipping"]) is not None and "gnorm_history" not in state:
            state.update(new_history(param.device))
        for key, value in state.items():
            if value.device != param.device:
                state[key] = value.to(param.device)

    def clip_statistics(self) -> dict[str, Tensor]:
        """Of all steps so far, as tensors on the device: the share of recorded gradients that were clipped, and how
        many were skipped because their norm was not finite. Nothing waits; see `read_clip_statistics`.
        """
        counts = [state["gnorm_counts"] for state in self.state.values() if "gnorm_counts" in state]
        if not counts:
            return {}
        total = torch.stack([count.to(counts[0].device, non_blocking=True) for count in counts]).sum(dim=0)
        share = total[CLIPPED] / total[RECORDED].clamp(min=1)
        return {"clip/share_clipped": share, "clip/skipped_nonfinite": total[SKIPPED]}

    def read_clip_statistics(self) -> dict[str, float]:
        """`clip_statistics` as numbers, for a monitor: waits for the device, and at the first skipped gradient warns
        with the names of the tensors.
        """
        statistics = {name: value.item() for name, value in self.clip_statistics().items()}
        if statistics.get("clip/skipped_nonfinite") and not self._warned_skipped:
            self._warned_skipped = True
            skipped = [
                f"{self.describe(param)} ({int(state['gnorm_counts'][SKIPPED])}x)"
                for param, state in self.state.items()
                if "gnorm_counts" in state and state["gnorm_counts"][SKIPPED]
            ]
            warnings.warn(
                f"gradients that were NaN or infinite were skipped, their parameters left alone: {', '.join(skipped)}",
                stacklevel=2,
            )
        return statistics

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state_dict of this class or of its torch parent, whose moments are converted.

        Codes stay uint8 and scales float32 whatever the parameter's type; everything moves to its device. Format
        version, code names, block size, keys and shapes are checked first; nothing changes when they do not fit.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        self.__setstate__(loaded(self, state_dict))
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_names": self._names, "_embeddings": self._embeddings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._set_up()
        self._plan.clear()
        for group in self.param_groups:
            for key, value in FORMAT.items():
                group.setdefault(key, value)
