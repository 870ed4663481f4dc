"""The weights in named tensors: which of them belong together, in which format they are, and what they say.

A 4-bit weight is <name> with <name>.absmax, .quant_map and .quant_state.bitsandbytes__nf4 (lq_plugin__nf4 where rows
are padded); an int8 weight is <layer>.weight with <layer>.SCB. Everything else is a plain tensor.

Source: bitsandbytes' checkpoints, as `lq_kernels.quant_state` describes them.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from lq_kernels.functional_4bit import dequantize_4bit
from lq_kernels.functional_arguments import scale_of
from lq_kernels.quant_state import QuantState
from torch import Tensor

from lq_plugin.audit.facts import BROKEN, NOTE, STATE_DICT, TENSOR_FILE, TENSOR_FOLDER, UNKNOWN, Audit, Row, few
from lq_plugin.safetensors_files import TensorFiles, TensorReader

_STATE = re.compile(r"(?P<name>.+)\.quant_state\.(?P<owner>bitsandbytes|lq_plugin)__(?P<type>nf4|fp4)")
_MAPS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_ROWS = 0  # weight_format of bitsandbytes: rows of int8


@dataclass(frozen=True)
class StoredTensors:
    """Tensors by name, of which the forms are known and the values are read when they are wanted.

    A dtype is None where torch has none of that name.
    """

    forms: Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]
    read: Callable[[str], Tensor]

    @classmethod
    def of_files(cls, files: TensorFiles, reader: TensorReader) -> "StoredTensors":
        return cls({name: (info.shape, info.dtype) for name, info in files.tensors.items()}, reader.read)

    @classmethod
    def of_dict(cls, tensors: Mapping[str, Tensor]) -> "StoredTensors":
        return cls({name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}, tensors.__getitem__)

    def bytes(self, name: str) -> int:
        shape, dtype = self.forms[name]
        return math.prod(shape) * (0 if dtype is None else dtype.itemsize)


@dataclass(frozen=True)
class StoredWeight:
    """One tensor of the model. entries: the names of all that it is kept in. padded: its rows are longer than it."""

    name: str
    format: str
    block: str
    codes: str
    shape: tuple[int, ...]
    entries: tuple[str, ...]
    values: Callable[[], Tensor]
    padded: bool = False

    @property
    def is_quantized(self) -> bool:
        return self.block != ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def weights(stored: StoredTensors, audit: Audit) -> dict[str, StoredWeight]:
    """By name; what does not fit together becomes a finding, and is left out."""
    found: dict[str, StoredWeight] = {}
    taken: set[str] = set()
    for key in stored.forms:
        entries = _entries(key, stored)
        if entries is None:
            continue
        taken |= set(entries)
        try:
            weight = _four_bit(entries, stored) if _STATE.fullmatch(key) else _int8(entries, stored)
        except ValueError as error:
            audit.add(BROKEN, f"{entries[0]}: {error}")
        else:
            found[weight.name] = weight
    for key in sorted(stored.forms.keys() - taken):
        shape, dtype = stored.forms[key]
        if dtype is None:
            audit.add(UNKNOWN, f"{key} has an element type that torch {torch.__version__} does not have")
        elif re.search(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|weight_format)$", key):
            audit.add(BROKEN, f"{key} belongs to a quantised weight whose other entries are missing")
        else:
            name = str(dtype).removeprefix("torch.")
            found[key] = StoredWeight(key, name, "", name, shape, (key,), lambda key=key: stored.read(key))  # type: ignore[misc]
    return found


def add_rows(audit: Audit, where: str, stored: StoredTensors, found: Mapping[str, StoredWeight]) -> None:
    """A row for each format, and a finding for what is not finite; all values are read."""
    wrong = []
    for weight in found.values():
        row = audit.row(where, weight.format, weight.block, weight.codes, weight.is_quantized)
        row.tensors += 1
        row.values += weight.numel
        row.bytes += sum(stored.bytes(name) for name in weight.entries)
        if not all(_is_finite(stored.read(name)) for name in weight.entries):
            wrong.append(weight.name)
    if wrong:
        audit.add(BROKEN, f"{len(wrong)} tensors hold NaN or infinities: {few(sorted(wrong))}")


def compare(audit: Audit, where: str, found: Mapping[str, StoredWeight], reference: Mapping[str, StoredWeight]) -> None:
    """The signal-to-quantisation-noise ratio of each row, and findings of names and shapes that differ.

    They are faults of what is known by its tensors only. Elsewhere they can be as they should: experts fused, a frozen
    base left out.
    """
    names = matched(found, reference)
    if not names:
        audit.add(UNKNOWN, "no tensor of the reference has the name of one here: is it the same model?")
        return
    missing = sorted(name for name in reference if name not in names.values())
    unexpected = sorted(name for name in found if name not in names)
    fault = BROKEN if audit.kind in (TENSOR_FILE, TENSOR_FOLDER, STATE_DICT) else NOTE
    if missing:
        audit.add(fault, f"{len(missing)} tensors of the reference are not here: {few(missing)}")
    if unexpected:
        audit.add(NOTE, f"{len(unexpected)} tensors here are not in the reference: {few(unexpected)}")
    for name, other in names.items():
        weight = found[name]
        row = audit.row(where, weight.format, weight.block, weight.codes, weight.is_quantized)
        ours, theirs = weight.values(), reference[other].values()
        if weight.padded:
            ours = ours[..., : theirs.shape[-1]]
        if ours.shape != theirs.shape:
            audit.add(fault, f"{name} is {tuple(ours.shape)}, and {tuple(theirs.shape)} in the reference")
        elif theirs.is_floating_point():
            _add_noise(row, name, ours.double(), theirs.double())


def matched(found: Mapping[str, StoredWeight], reference: Mapping[str, StoredWeight]) -> dict[str, str]:
    """Name here -> name in the reference, which may lack, or have, what a module around the model puts before it."""
    best: dict[str, str] = {}
    for ours, theirs in [("", ""), *((p, "") for p in _AROUND), *(("", p) for p in _AROUND)]:
        names = {
            name: f"{theirs}{name.removeprefix(ours)}"
            for name in found
            if name.startswith(ours) and f"{theirs}{name.removeprefix(ours)}" in reference
        }
        best = names if len(names) > len(best) else best
    return best


def decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


_AROUND = ("model.", "module.", "_orig_mod.", "model.model.", "base_model.model.")


def _add_noise(row: Row, name: str, ours: Tensor, theirs: Tensor) -> None:
    signal, noise = float(theirs.square().sum()), float((ours - theirs).square().sum())
    row.signal, row.noise = row.signal + signal, row.noise + noise
    if signal or noise:
        row.worst = min(row.worst or (math.inf, name), (decibels(signal, noise), name))


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())


def _entries(key: str, stored: StoredTensors) -> tuple[str, ...] | None:
    """The names of a quantised weight, itself first, if `key` is the entry by which it is known."""
    if state := _STATE.fullmatch(key):
        name = state["name"]
        return (name, key, *(f"{name}.{part}" for part in _MAPS if f"{name}.{part}" in stored.forms))
    if key == "SCB" or key.endswith(".SCB"):
        layer = key.removesuffix("SCB")
        return (f"{layer}weight", key, *(n for n in [f"{layer}weight_format"] if n in stored.forms))
    return None


def _four_bit(entries: tuple[str, ...], stored: StoredTensors) -> StoredWeight:
    name, key, *others = entries
    match = _STATE.fullmatch(key)
    assert match is not None
    packed_shape, packed_type = _form(name, stored)
    beside = {part.removeprefix(f"{name}."): stored.read(part) for part in others}
    beside[f"quant_state.bitsandbytes__{match['type']}"] = stored.read(key)
    state = QuantState.from_dict(beside, "cpu")
    size = state.form()[0]
    shape = tuple(state.shape or ())
    expected, bytes = -(-math.prod(shape) // 2), math.prod(packed_shape) * packed_type.itemsize
    if bytes != expected:
        raise ValueError(f"{bytes} bytes of codes, and its shape {shape} needs {expected}")

    def values() -> Tensor:
        state.dtype = torch.float32
        return dequantize_4bit(stored.read(name).contiguous().view(-1).view(torch.uint8).view(-1, 1), state)

    padded = match["owner"] == "lq_plugin"
    format = match["type"] + ("_dq" if state.nested else "")
    scales = f"{match['type'].upper()}, {'8-bit' if state.nested else 'float32'} scales"
    note = ", rows padded" if padded else ""
    return StoredWeight(name, format, f"{size}{note}", scales, shape, entries, values, padded)


def _int8(entries: tuple[str, ...], stored: StoredTensors) -> StoredWeight:
    name, key, *others = entries
    shape, dtype = _form(name, stored)
    amax = stored.read(key).float().view(-1)
    if dtype != torch.int8 or amax.numel() * shape[-1] != math.prod(shape):
        raise ValueError(f"{dtype} {shape} beside {amax.numel()} scales; expected int8 and one scale for each row")
    if others and (layout := int(stored.read(others[0]))) != _ROWS:
        raise ValueError(f"weight_format {layout} is a layout of old versions, which nobody reads any more")

    def values() -> Tensor:
        return stored.read(name).float() * scale_of(amax).view(*shape[:-1], 1)

    return StoredWeight(name, "llm_int8", "row", "int8, float32 scales", shape, entries, values)


def _form(name: str, stored: StoredTensors) -> tuple[tuple[int, ...], torch.dtype]:
    shape, dtype = stored.forms.get(name, ((), None))
    if dtype is None:
        raise ValueError("its codes are missing" if name not in stored.forms else "its codes are of no type of torch's")
    return shape, dtype


def quantized(found: Mapping[str, StoredWeight]) -> Iterator[StoredWeight]:
    return (weight for weight in found.values() if weight.is_quantized)
