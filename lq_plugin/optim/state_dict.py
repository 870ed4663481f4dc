"""Reading a state_dict back into an optimizer with few-bit state: checked, moved, never cast.

torch's own load_state_dict casts every state tensor to the parameter's type, which would turn codes into floats.
"""

import logging
from collections import defaultdict
from collections.abc import Set
from copy import deepcopy
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from lq_kernels.multi_tensor import State
from lq_kernels.optimizer_state import new_state, store_moment
from lq_kernels.percentile_clipping import new_history
from torch import Tensor

from lq_plugin.optim.options import DROPPED, FORMAT, Options, code_names, refuse

if TYPE_CHECKING:
    from lq_plugin.optim.base import LowBitOptimizer

logger = logging.getLogger("lq_plugin")

_ADDED = {"param_names", *Options().as_group()}  # kept where a state_dict of ours does not say otherwise


def loaded(optimizer: "LowBitOptimizer", state_dict: dict[str, Any]) -> dict[str, Any]:
    """{"state", "param_groups"} of `state_dict` for `optimizer`, which is not changed."""
    saved_groups = deepcopy(state_dict["param_groups"])
    _check_groups(optimizer, saved_groups)
    groups = [_merged(group, saved) for group, saved in zip(optimizer.param_groups, saved_groups, strict=True)]
    group_of = {
        saved_id: (group, param)
        for group, saved in zip(groups, saved_groups, strict=True)
        for saved_id, param in zip(saved["params"], group["params"], strict=True)
    }
    state: dict[Tensor, State] = defaultdict(dict)
    converted = 0
    for saved_id, saved_state in state_dict["state"].items():
        if saved_id not in group_of:
            raise ValueError(f"the state_dict has state for parameter {saved_id!r}, which is in none of its groups")
        group, param = group_of[saved_id]
        if is_torch_state(optimizer, group, saved_state):
            state[param] = convert_state(optimizer, group, param, saved_state)
            converted += 1
        elif saved_state:
            state[param] = _own_state(optimizer, group, param, saved_state)
    if converted:
        logger.info("%s: converted torch's state of %d tensors", type(optimizer).__name__, converted)
    return {"state": state, "param_groups": groups}


def is_torch_state(optimizer: "LowBitOptimizer", group: dict[str, Any], state: dict[str, Any]) -> bool:
    return any(name in state for name in optimizer.moment_names(group))


def convert_state(optimizer: "LowBitOptimizer", group: dict[str, Any], param: Tensor, saved: dict[str, Any]) -> State:
    """torch's state as ours: moments quantised where this parameter's state is kept in few bits.

    SGD counts no steps and may have no momentum yet: a buffer that is there has taken one at least.
    """
    where, names = optimizer.describe(param), optimizer.moment_names(group)
    step = float(saved.get("step", 1))
    if step == 0 or all(saved.get(name) is None for name in names):
        return {}
    _check_keys(where, saved.keys() - {"step"}, set(names))
    signs = optimizer.rule(group).signs
    state = new_state(param, optimizer.state_format(group, param), signs)
    state["step"].fill_(step)
    for i, (name, signed) in enumerate(zip(names, signs, strict=True), 1):
        _check_shape(where, name, saved[name], param.shape)
        store_moment(state, i, saved[name].to(device=param.device, dtype=torch.float32), signed)
    return {key: optimizer.memory.at_home(param, key, value) for key, value in state.items()}


def _check_groups(optimizer: "LowBitOptimizer", saved_groups: list[dict[str, Any]]) -> None:
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"the state_dict has param groups of {saved_sizes} parameters, {type(optimizer).__name__} has {sizes}"
        )
    for group, own in zip(saved_groups, optimizer.param_groups, strict=True):
        for key, expected in (FORMAT | code_names(optimizer.rule(own | group).signs)).items():
            if group.get(key, expected) != expected:
                raise ValueError(
                    f"the state_dict was written with {key}={group[key]!r}, this version reads {expected!r}: "
                    f"load it with the version that wrote it"
                )
        refuse(type(optimizer).__name__, group, accepted=DROPPED)
    ids = list(chain.from_iterable(group["params"] for group in saved_groups))
    if len(set(ids)) != len(ids):
        raise ValueError("the state_dict names a parameter twice in its groups")


def _merged(group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """`saved` with the parameters of `group`, and with its options where `saved` is torch's and has none."""
    own = "format_version" in saved
    kept = {key: value for key, value in group.items() if (key in _ADDED or not own) and key not in saved}
    return kept | saved | {"params": group["params"], **dict.fromkeys(DROPPED)}


def _own_state(optimizer: "LowBitOptimizer", group: dict[str, Any], param: Tensor, saved: dict[str, Any]) -> State:
    """Tensors of our own format, on the parameter's device, their types unchanged."""
    where = optimizer.describe(param)
    if "codes1" in saved and param.ndim < 2:
        raise ValueError(f"{where}: the state_dict has 8-bit state, which needs two dimensions or more")
    kind = "float32" if "codes1" not in saved else "dynamic"
    if kind == "dynamic" and torch.as_tensor(saved["codes1"]).dtype == torch.float8_e4m3fn:
        kind = "e4m3"
    expected = new_state(param.to("meta"), kind, optimizer.rule(group).signs)
    if "gnorm_history" in saved:
        expected |= new_history(torch.device("meta"))
    if "master" in saved:
        correction = torch.as_tensor(saved["master"]).dtype == torch.int8
        expected["master"] = torch.empty_like(param, device="meta", dtype=torch.int8 if correction else torch.float32)
    _check_keys(where, saved.keys(), set(expected))
    state: State = {}
    for key, like in expected.items():
        value = torch.as_tensor(saved[key])
        _check_shape(where, key, value, like.shape)
        if value.dtype != like.dtype:
            raise ValueError(f"{where}: {key} is {value.dtype}, expected {like.dtype}: was the state_dict cast?")
        own = value.detach().clone(memory_format=torch.contiguous_format)
        state[key] = optimizer.memory.at_home(param, key, own)
    return state


def _check_keys(where: str, saved: Set[str], expected: set[str]) -> None:
    missing, unknown = sorted(expected - saved), sorted(saved - expected)
    if missing or unknown:
        raise ValueError(f"{where}: the state_dict lacks {missing} and has unknown {unknown}")


def _check_shape(where: str, key: str, value: Tensor, expected: torch.Size) -> None:
    if value.shape != expected:
        raise ValueError(
            f"{where}: {key} has shape {tuple(value.shape)}, expected {tuple(expected)}: "
            f"another model, or another block size"
        )
