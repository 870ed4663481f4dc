"""The state of an optimizer in a checkpoint: ours, bitsandbytes' or torch's, by what it is kept in."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lq_kernels.optimizer_state import format_of
from lq_kernels.percentile_clipping import CLIPPED, RECORDED, SKIPPED
from torch import Tensor

from lq_plugin.audit.facts import BROKEN, UNKNOWN, Audit, few
from lq_plugin.optim.options import FORMAT_VERSION

_NAMES = {"dynamic": "8 bits, dynamic map", "e4m3": "8 bits, e4m3", "float32": "float32"}
_BITSANDBYTES = "__bnb_optimizer_quant_state__"  # in newer versions its tensors lie in a dict under this key


def is_optimizer_state(content: Any) -> bool:
    """Whether it is what `optimizer.state_dict()` gives."""
    return isinstance(content, Mapping) and {"state", "param_groups"} <= content.keys()


def add_optimizer(audit: Audit, content: Mapping[str, Any], where: str = "optimizer") -> None:
    """Adds rows, facts and findings; tensors are looked through."""
    groups, states = content["param_groups"], content["state"]
    owner = _owner(groups, states)
    versions = {group["format_version"] for group in groups if "format_version" in group}
    if versions - {FORMAT_VERSION}:
        audit.add(UNKNOWN, f"{where} has format_version {sorted(versions)}, this lq_plugin reads {FORMAT_VERSION}")
    audit.facts[where] = f"{owner}; {len(states)} tensors in {len(groups)} groups{_steps(states)}"
    if percentiles := {group["percentile_clipping"] for group in groups if group.get("percentile_clipping")}:
        audit.facts[f"{where}, clipping"] = f"percentile {', '.join(map(str, sorted(percentiles)))}{_clipped(states)}"
    wrong = []
    for number, group in enumerate(groups):
        for index in group["params"]:
            state = states.get(index)
            if state is None:
                continue
            name = f"tensor {index} of group {number}"
            problem = _add(audit, where, state, group)
            if problem:
                wrong.append(f"{name} ({problem})")
    if wrong:
        audit.add(BROKEN, f"{where}: {few(wrong)}")
    _add_readers(audit, owner)


def _owner(groups: list[dict[str, Any]], states: Mapping[Any, Any]) -> str:
    if any("format_version" in group for group in groups):
        return "lq_plugin.optim"
    keys = {key for state in states.values() if isinstance(state, Mapping) for key in state}
    if keys & {_BITSANDBYTES, "qmap1", "absmax1"}:
        return "bitsandbytes"
    return "torch"


def _add(audit: Audit, where: str, state: Mapping[str, Any], group: Mapping[str, Any]) -> str:
    """Adds the tensors of one parameter's state; returns what is wrong with them, or nothing."""
    flat = {**state, **state.get(_BITSANDBYTES, {})}
    tensors = {key: value for key, value in flat.items() if isinstance(value, Tensor) and value.ndim}
    moments = {key: t for key, t in tensors.items() if key.startswith(("codes", "state", "exp_avg", "momentum"))}
    eight_bit = any(t.itemsize == 1 for t in moments.values())
    if not eight_bit:
        format, block, codes = "float32", "", "float32"
    elif "codes1" in state:
        kind = format_of(dict(state))
        format, block = _NAMES[kind], f"{group.get('block_size', 256)}, within rows"
        maps = [str(group[key]) for key in sorted(group) if key.startswith("code")]
        codes = ", ".join(maps) if kind == "dynamic" else "e4m3"
    else:
        format, block, codes = "8 bits of bitsandbytes", f"{_block_of(flat)}, flat", "its dynamic maps"
    row = audit.row(where, format, block, codes, eight_bit)
    row.tensors += 1
    row.values += sum(t.numel() for t in moments.values())
    row.bytes += sum(t.numel() * t.itemsize for t in tensors.values())
    wrong = [key for key, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t.float()).all()]
    return f"{', '.join(wrong)} not finite" if wrong else _misfit(state)


def _misfit(state: Mapping[str, Any]) -> str:
    """Codes and scales of our format whose shapes do not belong together."""
    for key in (key for key in state if key.startswith("codes")):
        codes, scale = state[key], state.get(key.replace("codes", "scale"))
        if scale is None:
            return f"{key} without a scale"
        rows = codes.shape[0] if codes.ndim else 1
        expected = (rows, -(-(codes.numel() // max(rows, 1)) // 256))
        if tuple(scale.shape) != expected:
            return f"{key} {tuple(codes.shape)} has scales {tuple(scale.shape)}, expected {expected}"
    return ""


def _block_of(state: Mapping[str, Any]) -> int:
    codes, scale = state.get("state1"), state.get("absmax1")
    if codes is None or scale is None or not scale.numel():
        return 256
    size = codes.numel() / scale.numel()
    return 2 ** math.ceil(math.log2(size)) if size > 1 else 1


def _steps(states: Mapping[Any, Any]) -> str:
    steps = sorted({int(state["step"]) for state in states.values() if isinstance(state, Mapping) and "step" in state})
    if not steps:
        return ""
    return f", at step {steps[0]}" if len(steps) == 1 else f", at steps {steps[0]} to {steps[-1]}"


def _clipped(states: Mapping[Any, Any]) -> str:
    counts = [state["gnorm_counts"].long() for state in states.values() if "gnorm_counts" in state]
    if not counts:
        return ""
    total = torch.stack(counts).sum(0)
    norms, clipped, skipped = (int(total[i]) for i in (RECORDED, CLIPPED, SKIPPED))
    return f"; {clipped:,} of {norms:,} gradients were clipped, {skipped:,} were not finite"


def _add_readers(audit: Audit, owner: str) -> None:
    if owner == "lq_plugin.optim":
        audit.readers["lq_plugin.optim"] = "yes: optimizer.load_state_dict"
        audit.readers["torch.optim"] = "no: its state has other keys, so that it cannot be taken for torch's"
    elif owner == "bitsandbytes":
        audit.readers["lq_plugin.optim"] = "yes: through lq_plugin.optim.bitsandbytes_state.from_bitsandbytes"
        audit.readers["bitsandbytes"] = "yes"
    else:
        audit.readers["lq_plugin.optim"] = "yes: it is converted"
        audit.readers["torch.optim"] = "yes"
