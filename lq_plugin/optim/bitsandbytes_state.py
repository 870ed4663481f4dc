"""State of bitsandbytes' optimizers as ours, and back: training goes on where the other library stopped.

    optimizer.load_state_dict(from_bitsandbytes(torch.load(path, weights_only=True), optimizer))
    torch.save(to_bitsandbytes(optimizer), path)

bitsandbytes keeps codes in flat blocks of 256, ours never cross rows: values are quantised anew. Where the rows of a
tensor are whole blocks of the same map, that gives the same codes and scales to the bit, because each block holds its
extreme; else values move by half a code of their block at most. Its signed map has no -1: it stores a block's negative
extreme, which is -scale, as code 0 = -0.993. We read code 0 as -1, the value that was stored, and write it as code 0.
Blocks of zeros, which bitsandbytes leaves with any code, get the code of zero.

The moments of LAMB convert, though a step of bitsandbytes' LAMB is another; LARS keeps another momentum, and Muon is
not there. Formats: bitsandbytes 0.42 to 0.50.2; state from before 0.44 has blocks of 2048 and is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from lq_kernels.blockwise import BLOCK_SIZE, dequantize_blockwise, quantize_blockwise
from lq_kernels.codebooks import CODES, dynamic_map
from lq_kernels.multi_tensor import State
from lq_kernels.optimizer_state import format_of, load_moment, new_state, store_moment
from lq_kernels.percentile_clipping import HISTORY_LENGTH, RECORDED, new_history
from torch import Tensor

from lq_plugin.optim.adagrad import Adagrad
from lq_plugin.optim.adam import Adam
from lq_plugin.optim.adamw import AdamW
from lq_plugin.optim.ademamix import AdEMAMix
from lq_plugin.optim.base import LowBitOptimizer
from lq_plugin.optim.lamb import LAMB
from lq_plugin.optim.lion import Lion
from lq_plugin.optim.options import checked_percentile
from lq_plugin.optim.rmsprop import RMSprop
from lq_plugin.optim.sgd import SGD

Group = dict[str, Any]
StateDict = dict[str, Any]

NESTED = "__bnb_optimizer_quant_state__"  # in newer versions the tensors lie in a dict under this key, hidden from FSDP
OLD_BLOCK_SIZE = 2048  # before 0.44

# The maps of buffer 1 and buffer 2, as they are written and as we read them.
_WRITTEN = {"1": "dynamic", "2": "dynamic_unsigned"}
_READ = {"1": "dynamic_symmetric", "2": "dynamic_unsigned"}
_MAP_ERROR = 1e-6  # of a value; bitsandbytes computes its maps in float32 and is off by 1.5e-7


@dataclass(frozen=True)
class Hyper:
    """A param group of bitsandbytes' as entries of ours, and the other way round.

    `refused` are entries of ours with which bitsandbytes would compute something else, and the value that it computes.
    """

    read: Callable[[Group], Group]
    write: Callable[[Group], Group]
    refused: tuple[tuple[str, Any], ...] = ()


def _moments(group: Group) -> Group:
    return {"betas": tuple(group["betas"]), "eps": group["eps"], "weight_decay": group["weight_decay"]}


def _write_adam(group: Group) -> Group:
    if group["weight_decay"] and not group.get("decoupled_weight_decay", True):
        raise ValueError(f"bitsandbytes' Adam has no L2 weight decay, the optimizer has {group['weight_decay']}")
    return _moments(group) | {"alpha": 0.0, "t_alpha": None, "t_beta3": None}


def _one_buffer(betas: tuple[float, float], group: Group) -> Group:
    return {"betas": betas, "eps": group.get("eps", 0.0), "weight_decay": group["weight_decay"]}


def _schedules(group: Group) -> Group:
    return _moments(group) | {key: group[key] for key in ("alpha", "t_alpha", "t_beta3")}


HYPER: dict[type[LowBitOptimizer], Hyper] = {
    AdamW: Hyper(_moments, _write_adam),
    # bitsandbytes' Adam decays weights as AdamW does.
    Adam: Hyper(lambda g: _moments(g) | {"decoupled_weight_decay": bool(g["weight_decay"])}, _write_adam),
    LAMB: Hyper(_moments, _write_adam),
    AdEMAMix: Hyper(_schedules, _schedules),
    Lion: Hyper(
        lambda g: {"betas": tuple(g["betas"]), "weight_decay": g["weight_decay"]},
        lambda g: _one_buffer(g["betas"], g),
    ),
    SGD: Hyper(
        lambda g: {"momentum": g["betas"][0], "dampening": 0, "nesterov": False, "weight_decay": g["weight_decay"]},
        lambda g: _one_buffer((g["momentum"], 0), g),
        (("dampening", 0), ("nesterov", False)),
    ),
    RMSprop: Hyper(
        lambda g: {
            "alpha": g["betas"][0], "momentum": 0, "centered": False, "eps": g["eps"], "weight_decay": g["weight_decay"]
        },
        lambda g: _one_buffer((g["alpha"], 0), g),
        (("momentum", 0), ("centered", False)),
    ),
    Adagrad: Hyper(
        lambda g: {"lr_decay": 0, "eps": g["eps"], "weight_decay": g["weight_decay"]},
        lambda g: _one_buffer((0.0, 0.0), g),
        (("lr_decay", 0), ("initial_accumulator_value", 0)),
    ),
}  # fmt: skip


def from_bitsandbytes(state_dict: StateDict, optimizer: LowBitOptimizer) -> StateDict:
    """A state_dict of bitsandbytes as one that `optimizer` loads; neither is changed.

    Hyper-parameters are those of the file, as in torch; how state is kept (bits, embeddings, clipping) is up to
    `optimizer`. The state may be 8-bit or 32-bit, flat or nested. Raises ValueError, with the name of the parameter,
    for other parameters, blocks of 2048, other code books, state that is not blockwise, and unknown keys.
    """
    hyper = _hyper_of(optimizer)
    _check_groups(state_dict, optimizer)
    states = dict(state_dict["state"])
    groups, converted = [], {}
    for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        kept = {key: saved[key] for key in ("lr", "initial_lr", "params") if key in saved}
        group = own | kept | hyper.read(saved)
        groups.append(group)
        for param, saved_id in zip(own["params"], saved["params"], strict=True):
            if states.get(saved_id):
                converted[saved_id] = _Reader(optimizer, group, param).read(states[saved_id])
            states.pop(saved_id, None)
    if states:
        raise ValueError(f"the state_dict has state for parameters {sorted(states)}, which are in none of its groups")
    return {"state": converted, "param_groups": groups}


def to_bitsandbytes(optimizer: LowBitOptimizer) -> StateDict:
    """The state of `optimizer` as a state_dict of bitsandbytes' class of that algorithm, flat; every version loads it.

    8-bit and e4m3 state become 8-bit state, float32 state 32-bit state. Raises ValueError for hyper-parameters with
    which bitsandbytes would compute something else.
    """
    hyper = _hyper_of(optimizer)
    optimizer.wait_for_state()
    groups: list[Group] = []
    states: dict[int, dict[str, Any]] = {}
    first = 0
    for group in optimizer.param_groups:
        for key, computed in (*hyper.refused, ("maximize", False), ("update_clip", None)):
            if group.get(key, computed) != computed:
                raise ValueError(f"bitsandbytes computes {key}={computed!r}, the optimizer has {group[key]!r}")
        ids = range(first, first + len(group["params"]))
        kept = {"lr": float(group["lr"])} | ({"initial_lr": group["initial_lr"]} if "initial_lr" in group else {})
        groups.append(kept | hyper.write(group) | {"params": list(ids)})
        for saved_id, param in zip(ids, group["params"], strict=True):
            if optimizer.state.get(param):
                states[saved_id] = _written(optimizer, group, optimizer.state[param])
        first = ids.stop
    return {"state": states, "param_groups": groups}


def _hyper_of(optimizer: LowBitOptimizer) -> Hyper:
    for cls in type(optimizer).__mro__:
        if cls in HYPER:
            return HYPER[cls]
    known = ", ".join(cls.__name__ for cls in HYPER)
    raise TypeError(f"bitsandbytes has no state like that of {type(optimizer).__name__}; state converts for {known}")


def _check_groups(state_dict: StateDict, optimizer: LowBitOptimizer) -> None:
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"a state_dict of an optimizer has 'state' and 'param_groups', this one has {[*state_dict]}")
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved_sizes = [len(group["params"]) for group in state_dict["param_groups"]]
    if sizes != saved_sizes:
        name = type(optimizer).__name__
        raise ValueError(f"the state_dict has param groups of {saved_sizes} parameters, {name} has {sizes}")
    expected = {"lr", "betas", "eps", "weight_decay"}
    if isinstance(optimizer, AdEMAMix):
        expected |= {"alpha", "t_alpha", "t_beta3"}
    for group in state_dict["param_groups"]:
        if expected - group.keys():
            raise ValueError(f"a param group lacks {sorted(expected - group.keys())}: is it another optimizer's?")


@dataclass(frozen=True)
class Place:
    """Where a moment lies: `buffer` 1 in state1, absmax1 and qmap1; AdEMAMix has two averages in the rows of one."""

    buffer: str
    row: int | None = None


def _places(names: tuple[str, ...]) -> list[Place]:
    """Of the moments that torch's state, or the paper of AdEMAMix, calls so."""
    rows = {"exp_avg": 0, "exp_avg_slow": 1} if "exp_avg_slow" in names else {}
    return [Place("2" if name == "exp_avg_sq" else "1", rows.get(name)) for name in names]


@dataclass(frozen=True)
class _Reader:
    """Reads the state of one parameter."""

    optimizer: LowBitOptimizer
    group: Group
    param: Tensor

    def read(self, saved: dict[str, Any]) -> State:
        saved = {**saved, **saved.get(NESTED, {})}
        saved.pop(NESTED, None)
        places = _places(self.optimizer.moment_names(self.group))
        self._check_keys(saved, {place.buffer for place in places})
        signs = self.optimizer.rule(self.group).signs
        like = torch.empty(self.param.shape)  # on the CPU, where rows are quantised by torch
        state = new_state(like, self.optimizer.state_format(self.group, self.param), signs)
        state["step"].fill_(saved["step"])
        for i, (place, signed) in enumerate(zip(places, signs, strict=True), 1):
            values = self._values(saved, place).cpu()
            # What is never negative here may have been the code below zero there.
            store_moment(state, i, values if signed else values.clamp(min=0), signed)
        if checked_percentile(self.group["percentile_clipping"]) is not None and "gnorm_vec" in saved:
            state |= self._history(saved["gnorm_vec"], saved["step"])
        return state

    def _check_keys(self, saved: dict[str, Any], buffers: set[str]) -> None:
        expected = {"step", *(f"state{i}" for i in buffers)}
        if any(torch.is_tensor(value) and value.dtype == torch.uint8 for value in saved.values()):
            expected |= {f"{name}{i}" for name in ("absmax", "qmap") for i in buffers}
        if "max1" in saved or "new_max1" in saved:
            self._refuse("has one scale for the whole tensor (block_wise=False, before 0.50), not one for each block")
        if not isinstance(saved.get("step", 0), int):
            self._refuse(f"has step {saved['step']!r}, expected an int")
        missing, unknown = expected - saved.keys(), saved.keys() - expected - {"gnorm_vec", "unorm_vec"}
        if missing or unknown:
            self._refuse(f"lacks {sorted(missing)} and has unknown {sorted(unknown)}: is it another optimizer's?")

    def _values(self, saved: dict[str, Any], place: Place) -> Tensor:
        """A moment in float32."""
        i, rows = place.buffer, () if place.row is None else (2,)
        values = saved[f"state{i}"]
        self._check_tensor(f"state{i}", values, (*rows, *self.param.shape), (torch.uint8, torch.float32))
        if values.dtype == torch.float32:
            return values if place.row is None else values[place.row]
        scale = saved[f"absmax{i}"]
        self._check_scale(f"absmax{i}", scale, rows)
        self._check_map(f"qmap{i}", saved[f"qmap{i}"], _WRITTEN[i])
        if place.row is not None:
            values, scale = values[place.row], scale[place.row]
        return dequantize_blockwise(values, scale, dynamic_map(_READ[i]).to(values.device))

    def _history(self, squared: Tensor, step: int) -> State:
        """The norms of old versions; a history with zeros or infinities, which ours cannot have, begins anew."""
        self._check_tensor("gnorm_vec", squared, (HISTORY_LENGTH,), (torch.float32,))
        history = new_history(squared.device)
        if bool((squared.isfinite() & (squared > 0)).all()):
            # Theirs wrote norm number n into slot n % 100, ours writes it into slot (n - 1) % 100.
            history["gnorm_history"] = squared.sqrt().roll(-1)
            history["gnorm_counts"][RECORDED] = step
        return history

    def _check_scale(self, key: str, scale: Tensor, rows: tuple[int, ...]) -> None:
        blocks, old_blocks = (-(-self.param.numel() // size) for size in (BLOCK_SIZE, OLD_BLOCK_SIZE))
        if scale.shape != (*rows, blocks) and scale.shape == (*rows, old_blocks):
            self._refuse(f"has blocks of {OLD_BLOCK_SIZE} (bitsandbytes before 0.44), expected {BLOCK_SIZE}")
        self._check_tensor(key, scale, (*rows, blocks), (torch.float32,))
        if rows and self.param.numel() % BLOCK_SIZE:
            # On CUDA both averages then share a scale, on a CPU they do not, and the file does not say which it is.
            self._refuse(f"has two averages of {self.param.numel()} values, not a multiple of {BLOCK_SIZE}, in 8 bits")

    def _check_map(self, key: str, values: Tensor, name: str) -> None:
        self._check_tensor(key, values, (CODES,), (torch.float32,))
        if not torch.allclose(values.cpu(), dynamic_map(name), rtol=_MAP_ERROR, atol=0):
            self._refuse(f"has a {key} that is not bitsandbytes' {name} map, the only one that converts")

    def _check_tensor(self, key: str, value: Any, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        if not torch.is_tensor(value) or value.shape != shape or value.dtype not in dtypes:
            found = f"{value.dtype} {tuple(value.shape)}" if torch.is_tensor(value) else repr(value)
            self._refuse(f"has {key} {found}, expected {' or '.join(map(str, dtypes))} {shape}")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"{self.optimizer.describe(self.param)}: the state of bitsandbytes {what}")


def _written(optimizer: LowBitOptimizer, group: Group, state: State) -> dict[str, Any]:
    """Our state of a parameter as bitsandbytes keeps it."""
    signs, places = optimizer.rule(group).signs, _places(optimizer.moment_names(group))
    moments = [load_moment(state, i, signed) for i, signed in enumerate(signs, 1)]
    # Two averages in one buffer share a scale on CUDA unless they are whole blocks: then they are written in 32 bits.
    apart = moments[0].numel() % BLOCK_SIZE == 0 or all(place.row is None for place in places)
    written: dict[str, Any] = {"step": int(state["step"])}
    for i in sorted({place.buffer for place in places}):
        parts = [moment for place, moment in zip(places, moments, strict=True) if place.buffer == i]
        values = torch.stack(parts) if len(parts) > 1 else parts[0].clone()
        if format_of(state) == "float32" or not apart:
            written[f"state{i}"] = values
            continue
        qmap = dynamic_map(_WRITTEN[i]).to(values.device, copy=True)
        written[f"state{i}"], scale = quantize_blockwise(values, qmap)
        written |= {f"absmax{i}": scale.view(len(parts), -1) if len(parts) > 1 else scale, f"qmap{i}": qmap}
    if isinstance(optimizer, LAMB):
        written["unorm_vec"] = torch.zeros(1, device=moments[0].device)
    if "gnorm_history" in state and int(state["gnorm_counts"][RECORDED]) > 0:
        # Slots are counted from the step there, and from the recorded norms here.
        shift = written["step"] + 1 - int(state["gnorm_counts"][RECORDED])
        written["gnorm_vec"] = state["gnorm_history"].square().roll(shift)
    return written
