"""What the optimizers with few-bit state share: how a step goes, how state begins, and what it is called in messages.

A subclass gives `rule`, the arithmetic of a param group's step. One with a torch.optim parent takes from it the
constructor's checks, param_groups, hooks and zero_grad. State is created at a parameter's first gradient and never
changes its format after that; what it is can be read from its keys and types.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from lq_kernels.multi_tensor import State
from lq_kernels.optimizer_rules import Rule
from lq_kernels.optimizer_state import format_of, new_state
from lq_kernels.optimizer_step import Job
from lq_kernels.percentile_clipping import CLIPPED, RECORDED, SKIPPED, last_factors, new_history
from torch import Tensor

from lq_plugin.optim.gradient_release import GradientRelease
from lq_plugin.optim.offload import Offload, Resident
from lq_plugin.optim.options import (
    DROPPED,
    Options,
    check_options,
    check_released,
    checked_percentile,
    code_names,
    moment_bytes,
    refuse,
    state_format,
)
from lq_plugin.optim.plan import How, Plan, Planned, check_shared_norm
from lq_plugin.optim.state_dict import loaded

PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Components of a dotted name that stand for an embedding: embed_tokens, word_embeddings, token_emb; GPT-2's wte, wpe.
_EMBEDDING_NAME = re.compile(r"(^|_)emb|embed|^wte$|^wpe$")


def check_hyper(hyper: Mapping[str, Any]) -> None:
    """Raises ValueError for hyper-parameters out of range, of optimizers whose parent does not check them."""
    for name, value in hyper.items():
        if name == "betas":
            if any(not 0 <= beta < 1 for beta in value):
                raise ValueError(f"betas are in [0, 1), got {value!r}")
        elif value is not None and not value >= 0:
            raise ValueError(f"{name} cannot be negative, got {value!r}")


class LowBitOptimizer(torch.optim.Optimizer):
    """Base of the optimizers whose state is an argument; not to be used alone."""

    default_state: ClassVar[str] = "32bit"
    default_offload: ClassVar[bool] = False
    takes_update_clip: ClassVar[bool] = False
    updates_tensors_apart: ClassVar[bool] = True  # else neither offload nor gradient_release

    memory: Resident  # where states are between steps, and how they come to the kernels
    releases_gradients: bool
    _release: GradientRelease
    _names: list[tuple[Tensor, str]]
    _embeddings: list[Tensor]
    _warned_skipped: bool
    _plan: Plan

    def rule(self, group: dict[str, Any]) -> Rule:
        """The arithmetic of a step with the hyper-parameters of a param group."""
        raise NotImplementedError

    def moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """What torch's state calls the moments of `rule`, in its order."""
        raise NotImplementedError

    @classmethod
    def options_of(cls, arguments: dict[str, Any]) -> Options:
        """The options among a constructor's arguments; raises TypeError for others."""
        unknown = sorted(arguments.keys() - Options.__dataclass_fields__.keys())
        if unknown:
            raise TypeError(f"{cls.__name__} got {', '.join(unknown)}; it takes the options {_OPTION_NAMES}")
        return Options(**{"state": cls.default_state, "offload": cls.default_offload, **arguments})

    @classmethod
    def check_running(cls, options: Options) -> None:
        """Raises ValueError for options that an optimizer of this class cannot run with."""
        if (options.offload or options.gradient_release) and not cls.updates_tensors_apart:
            raise ValueError(f"{cls.__name__} updates tensors together: leave out offload and gradient_release")

    def refuse(self, **arguments: Any) -> None:
        """Raises for arguments of the torch parent that are set and that we do not compute."""
        refuse(type(self).__name__, arguments)

    def adopt(self, options: Options) -> None:
        """Writes options and state format into defaults and param_groups, where a checkpoint finds them."""
        self.check_running(options)
        self.memory = Offload() if options.offload else Resident()
        self.releases_gradients = options.gradient_release
        self._set_up()
        self.defaults.update(options.as_group())
        for group in self.param_groups:
            self._complete_group(group, self.defaults)
            self.check_group(group)
        self.start_gradient_release()

    def start_gradient_release(self) -> None:
        """Hooks on all parameters, if the options ask for them; again after `stop_gradient_release`."""
        if self.releases_gradients:
            self._release.attach()

    def stop_gradient_release(self) -> None:
        """Takes the hooks away: gradients stay until `step`, which computes the same."""
        self._release.detach()

    def _set_up(self) -> None:
        if "_release" not in self.__dict__:
            self._release = GradientRelease(self)
        for name, value in (("_names", []), ("_embeddings", []), ("_warned_skipped", False), ("_plan", Plan())):
            self.__dict__.setdefault(name, value)

    def _complete_group(self, group: dict[str, Any], options: Mapping[str, Any]) -> None:
        for key in Options().as_group():
            group.setdefault(key, options[key])
        for key, value in code_names(self.rule(group).signs).items():
            group.setdefault(key, value)

    def check_group(self, group: dict[str, Any]) -> None:
        refuse(type(self).__name__, group)
        check_options(group)
        if group["update_clip"] is not None and not self.takes_update_clip:
            raise ValueError(f"{type(self).__name__} has no update_clip, Adam and AdamW have; leave it out")
        if self.releases_gradients:
            check_released(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if "format_version" in self.defaults:  # else torch's constructor is running, and `adopt` checks
            try:
                self._complete_group(self.param_groups[-1], self.defaults)
                self.check_group(self.param_groups[-1])
            except ValueError:
                self.param_groups.pop()
                raise
            self.start_gradient_release()

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

    def state_format(self, group: dict[str, Any], param: Tensor) -> str:
        """The kernels' name for the format in which state created now for `param` would be kept."""
        return state_format(param, group, self._is_embedding(param))

    def keeps_8bit_state(self, group: dict[str, Any], param: Tensor) -> bool:
        """Whether state created now for `param` would be in the 8-bit codes of the dynamic map."""
        return self.state_format(group, param) == "dynamic"

    def state_bytes(self, group: dict[str, Any], param: Tensor) -> tuple[int, int]:
        """Bytes of the moments of `param`: torch's, in its own type, and ours. Steps and norms are left out."""
        moments = len(self.moment_names(group))
        before = moments * param.numel() * param.element_size()
        return before, moments * moment_bytes(param, self.state_format(group, param))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` may compute the loss, which is returned. Raises before anything is modified."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [param for group in self.param_groups for param in group["params"]]
        grads = [param.grad for param in params]
        if not self._release.updated_all(grads):
            rules = list(map(self.rule, self.param_groups))
            self._plan_for(params, grads, rules)
            self.memory.step([self._job(planned, grads, rules) for planned in self._plan.batches])
        self._release.finish()
        self.memory.join()
        return loss

    def _job(self, planned: Planned, grads: list[Tensor | None], rules: list[Rule]) -> Job:
        seeds = [self.param_groups[i]["rounding_seed"] for i in planned.groups] if planned.how.stochastic else None
        return Job(planned.batch, planned.grads(grads), [rules[i] for i in planned.groups], planned.how.clipping, seeds)

    def _plan_for(self, params: list[Tensor], grads: list[Tensor | None], rules: list[Rule]) -> None:
        """Makes the batches again if parameters, types or state tensors are not those they were made from."""
        hows = list(map(How.of, self.param_groups, rules))
        if not {grad.layout for grad in grads if grad is not None} <= {torch.strided}:
            self._check_types(grads)
        if self._plan.fits(params, grads, hows, self.state):
            return
        self._check_types(grads)
        check_shared_norm(hows)
        of_group = [i for i, group in enumerate(self.param_groups) for _ in group["params"]]
        for param, grad, i in zip(params, grads, of_group, strict=True):
            if grad is not None or self.state.get(param):
                self._ready_state(self.param_groups[i], rules[i], param)
        self._plan.make(params, grads, hows, of_group, self.state)

    def _check_types(self, grads: list[Tensor | None]) -> None:
        places = [(group, param) for group in self.param_groups for param in group["params"]]
        for (group, param), grad in zip(places, grads, strict=True):
            if grad is not None:
                self._check_type(group, param, grad)

    def _check_type(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        self._check_tensor(param, param, "parameters")
        self._check_tensor(param, grad, "gradients")
        if param.dtype == torch.float16 and (group["stochastic_rounding"] or group["master_weights"] == "8bit"):
            raise TypeError(
                f"{type(self).__name__} rounds stochastically and keeps 8-bit master weights for bfloat16; "
                f"{self.describe(param)} has {param.dtype}. Nothing was updated; take master_weights='32bit'."
            )

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

    def make_ready(self, index: int, param: Tensor, grad: Tensor) -> None:
        """Checks a parameter of group number `index` and its gradient, and creates what its state lacks."""
        group = self.param_groups[index]
        self._check_type(group, param, grad)
        self._ready_state(group, self.rule(group), param)

    def _ready_state(self, group: dict[str, Any], rule: Rule, param: Tensor) -> None:
        """Creates what is missing of a parameter's state, and puts all of it where it is kept between steps."""
        state: State = self.state[param]
        if not state and param.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{self.describe(param)} has no state yet: run one step before CUDA graph capture")
        kind = format_of(state) if {"codes1", "state1"} & state.keys() else self.state_format(group, param)
        last = len(rule.signs)
        if not state or (last and not {f"codes{last}", f"state{last}"} & state.keys()):
            for key, value in new_state(param, kind, rule.signs, rule.initial).items():
                state.setdefault(key, value)
        if checked_percentile(group["percentile_clipping"]) is not None and "gnorm_history" not in state:
            state.update(new_history(param.device))
        if group["master_weights"] is not None and param.dtype != torch.float32 and "master" not in state:
            state["master"] = _new_master(param, group["master_weights"])
        self._put_home(param, state)

    def _put_home(self, param: Tensor, state: State) -> None:
        for key, value in state.items():
            state[key] = self.memory.at_home(param, key, value)

    def bring_state_home(self) -> None:
        """Puts states where they are kept between steps, after something has moved them; the next step does it too."""
        for param, state in self.state.items():
            self._put_home(param, state)

    def clip_statistics(self) -> dict[str, Tensor]:
        """As tensors on the device: of all steps so far the share of recorded gradients that were clipped, and how many
        were skipped because their norm was not finite; and the factor by which each tensor's last recorded gradient
        was multiplied, the mean over the tensors that are clipped. Nothing waits; see `read_clip_statistics`.
        """
        clipped: dict[int | None, list[State]] = {}
        for group in self.param_groups:
            states = (self.state[param] for param in group["params"] if "gnorm_counts" in self.state.get(param, ()))
            clipped.setdefault(checked_percentile(group["percentile_clipping"]), []).extend(states)
        total = _stacked("gnorm_counts", list(chain.from_iterable(clipped.values()))).sum(dim=0)
        if not len(total):
            return {}
        factors = [
            last_factors(_stacked("gnorm_history", states), _stacked("gnorm_counts", states), percentile)
            for percentile, states in clipped.items()
            if percentile is not None and states
        ]
        share = total[CLIPPED] / total[RECORDED].clamp(min=1)
        statistics = {"clip/share_clipped": share, "clip/skipped_nonfinite": total[SKIPPED]}
        return statistics | (
            {"clip/factor": torch.cat([of.to(share.device) for of in factors]).mean()} if factors else {}
        )

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

    def wait_for_state(self) -> None:
        """Returns when `state` may be read on the host; with offload it may still be on its way there after a step."""
        self.memory.wait()

    def state_dict(self) -> dict[str, Any]:
        """torch's, after `wait_for_state`."""
        self.wait_for_state()
        return super().state_dict()

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
        self.wait_for_state()
        kept = ("_names", "_embeddings", "releases_gradients")
        offloads = isinstance(self.memory, Offload)
        return super().__getstate__() | {name: self.__dict__[name] for name in kept} | {"offloads": offloads}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = state.copy()
        if "memory" not in self.__dict__:  # a copy, or from a file
            self.memory = Offload() if state.pop("offloads") else Resident()
        super().__setstate__(state)
        self._set_up()
        self._plan.clear()
        defaults = Options().as_group() | {key: value for key, value in self.defaults.items() if key not in DROPPED}
        for group in self.param_groups:
            self._complete_group(group, defaults)
        self.start_gradient_release()


_OPTION_NAMES = ", ".join(Options.__dataclass_fields__)


def _stacked(key: str, states: Sequence[State]) -> Tensor:
    """One row for each state, on the device of the first."""
    rows = [state[key] for state in states]
    return torch.stack([row.to(rows[0].device, non_blocking=True) for row in rows]) if rows else torch.empty(0, 0)


def _new_master(param: Tensor, kind: str) -> Tensor:
    if kind == "32bit":
        return param.detach().float().contiguous()
    return torch.zeros(param.shape, dtype=torch.int8, device=param.device)
