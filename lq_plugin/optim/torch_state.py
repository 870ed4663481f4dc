"""State of our optimizers as that of their parents in torch.optim; the other way round is `load_state_dict`."""

from typing import Any

import torch
from lq_kernels.optimizer_state import load_moment
from torch.optim import Optimizer

from lq_plugin.optim.base import LowBitOptimizer
from lq_plugin.optim.options import Options

_WITHOUT_STEP = (torch.optim.SGD, torch.optim.Muon)  # they count none


def to_torch(optimizer: LowBitOptimizer) -> dict[str, Any]:
    """A state_dict that the parent of `optimizer` in torch.optim loads; it shares no memory with `optimizer`.

    Moments are float32, of which torch makes the type of the parameter. Norms of percentile clipping and master
    weights stay behind. Loaded into an optimizer like this one, 8-bit and 32-bit state are as before. Raises TypeError
    for algorithms that torch does not have.
    """
    parent = _parent_of(optimizer)
    optimizer.wait_for_state()
    groups: list[dict[str, Any]] = []
    states: dict[int, dict[str, Any]] = {}
    first = 0
    for group in optimizer.param_groups:
        signs, names = optimizer.rule(group).signs, optimizer.moment_names(group)
        ours = Options().as_group().keys() | {f"code{i}" for i in range(1, len(signs) + 1)}
        ids = range(first, first + len(group["params"]))
        groups.append({key: value for key, value in group.items() if key not in ours} | {"params": list(ids)})
        for saved_id, param in zip(ids, group["params"], strict=True):
            state = optimizer.state.get(param)
            if state:
                moments = zip(names, enumerate(signs, 1), strict=True)
                states[saved_id] = {name: load_moment(state, i, signed).clone() for name, (i, signed) in moments}
                if not issubclass(parent, _WITHOUT_STEP):
                    states[saved_id]["step"] = state["step"].cpu().clone()
        first = ids.stop
    return {"state": states, "param_groups": groups}


def _parent_of(optimizer: LowBitOptimizer) -> type[Optimizer]:
    """The class of torch.optim's whose arithmetic this is."""
    for cls in type(optimizer).__mro__:
        if getattr(torch.optim, cls.__name__, None) is cls and cls is not Optimizer:
            return cls
    raise TypeError(f"torch has no {type(optimizer).__name__}: its state has nowhere to go")
