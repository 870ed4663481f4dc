"""QuantState: what dequantisation needs beside the codes, under bitsandbytes' name, and its form in checkpoints.

A 4-bit weight is saved as its packed codes and, beside them, these entries; nested_* only with double quantisation:

    absmax            float32 (blocks,); with double quantisation uint8 codes (blocks,)
    quant_map         float32 (16,)
    nested_absmax     float32 (ceil(blocks / nested_blocksize),)
    nested_quant_map  float32 (256,)
    quant_state.bitsandbytes__nf4 or __fp4
                      uint8, the bytes of a JSON object: quant_type, blocksize, dtype, shape and, nested,
                      nested_blocksize, nested_dtype, nested_offset

transformers, PEFT and vLLM read and write the same. What is loaded is checked before anything is built from it, and
nothing but JSON is parsed.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lq_kernels.codebooks import CODES, dynamic_map, four_bit_map
from lq_kernels.layout_4bit import BLOCK_SIZES

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_NAMES = ("absmax", "quant_map", "quant_type", "blocksize", "dtype", "shape")
_NESTED_NAMES = ("nested_absmax", "nested_quant_map", "nested_blocksize", "nested_dtype", "nested_offset")
_SAME_MAP = 1e-6  # bitsandbytes rounds its maps at every step of their formula, we once: the last bit differs


@dataclass(eq=False)
class QuantState:
    """How to read codes back.

    8-bit: absmax float32 (ceil(numel / blocksize),), code float32 (256,). 4-bit: also the `shape` of the values and
    quant_type "nf4" or "fp4", code float32 (16,). `dtype` is that of the values. With nested statistics absmax holds
    uint8 codes, state2 reads those back, and `offset` (float32, no dimensions) is added to the result.
    """

    absmax: Tensor
    shape: torch.Size | None = None
    code: Tensor | None = None
    blocksize: int | None = None
    quant_type: str | None = None
    dtype: torch.dtype | None = None
    offset: Tensor | None = None
    state2: "QuantState | None" = None

    valid_quant_types: ClassVar[tuple[str, ...]] = ("fp4", "nf4")
    valid_qs_type_keys: ClassVar[list[str]] = [f"bitsandbytes__{name}" for name in valid_quant_types]
    valid_qs_keys: ClassVar[list[str]] = [*_NAMES, *_NESTED_NAMES, "quant_state"]

    @property
    def nested(self) -> bool:
        return self.state2 is not None

    def form(self) -> tuple[int, torch.dtype]:
        """blocksize and dtype; ValueError where a state made by hand has none."""
        if self.blocksize is None or self.dtype is None:
            raise ValueError(f"the state needs blocksize and dtype, it has {self.blocksize} and {self.dtype}")
        return self.blocksize, self.dtype

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The entries of the table above; unpacked, the values of the JSON object stand among them as they are.

        `packed=True` gives tensors only, as safetensors wants them: none shares memory with another. It is defined for
        4-bit states. `nested_offset` is a Python float, so that asking for it waits for the device.
        """
        maps: dict[str, Any] = {"absmax": self.absmax, "quant_map": _copy(self.code)}
        values: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": _name(self.dtype),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.state2 is not None:
            maps |= {"nested_absmax": self.state2.absmax, "nested_quant_map": _copy(self.state2.code)}
            values |= {
                "nested_blocksize": self.state2.blocksize,
                "nested_dtype": _name(self.state2.dtype),
                "nested_offset": None if self.offset is None else self.offset.item(),
            }
        if not packed:
            return maps | values
        if self.quant_type not in self.valid_quant_types:
            raise ValueError(f"only 4-bit states have a packed form, this one has quant_type {self.quant_type!r}")
        encoded = torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
        return maps | {f"quant_state.bitsandbytes__{self.quant_type}": encoded}

    @classmethod
    def from_dict(cls, qs_dict: Mapping[str, Any], device: torch.device | str) -> "QuantState":
        """The state that `as_dict` gave, packed or not, in any order, under any prefix, with its tensors on `device`.

        ValueError names what is missing, unknown or does not fit together. A map of another format is an error too.
        """
        fields = _fields(qs_dict)
        _check(fields)
        moved = {name: value.to(device) for name, value in fields.items() if isinstance(value, Tensor)}
        fields = fields | moved
        shape = fields["shape"]
        state = cls(
            absmax=fields["absmax"],
            shape=None if shape is None else torch.Size(shape),
            code=fields["quant_map"],
            blocksize=fields["blocksize"],
            quant_type=fields["quant_type"],
            dtype=_DTYPES[fields["dtype"]],
        )
        if "nested_absmax" in fields:
            state.offset = torch.tensor(fields["nested_offset"], dtype=torch.float32, device=device)
            state.state2 = cls(
                absmax=fields["nested_absmax"],
                code=fields["nested_quant_map"],
                blocksize=fields["nested_blocksize"],
                dtype=_DTYPES[fields["nested_dtype"]],
            )
        return state

    def to(self, device: torch.device | str) -> "QuantState":
        """Moves its tensors to `device`, in place, and returns itself."""
        self.absmax = self.absmax.to(device)
        self.code = None if self.code is None else self.code.to(device)
        self.offset = None if self.offset is None else self.offset.to(device)
        if self.state2 is not None:
            self.state2.to(device)
        return self

    def __eq__(self, other: object) -> bool:
        """Whether both read the same codes alike: values within 1e-6, everything else equal."""
        if not isinstance(other, QuantState):
            return NotImplemented
        return (
            (self.shape, self.blocksize, self.quant_type, self.dtype, self.state2)
            == (other.shape, other.blocksize, other.quant_type, other.dtype, other.state2)
            and _close(self.absmax, other.absmax)
            and _close(self.code, other.code)
            and _close(self.offset, other.offset)
        )


def _copy(code: Tensor | None) -> Tensor | None:
    """States share their code books; files must not."""
    return None if code is None else code.clone()


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return torch.equal(a, b) if a.dtype == torch.uint8 else torch.allclose(a, b, rtol=0, atol=_SAME_MAP)


def _fields(qs_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Entries by the last component of their names, with the JSON object, if there is one, opened."""
    fields: dict[str, Any] = {}
    for key, value in qs_dict.items():
        name = key.rpartition(".")[2]
        if name in fields:
            raise ValueError(f"{name!r} is there twice, the second time as {key!r}: pass the entries of one weight")
        fields[name] = value
    packed = [name for name in fields if name.startswith("bitsandbytes__")]
    if not packed:
        return fields
    if len(packed) > 1 or packed[0] not in QuantState.valid_qs_type_keys:
        raise ValueError(f"expected exactly one of {QuantState.valid_qs_type_keys}, got {packed}")
    values = _parsed(packed[0], fields.pop(packed[0]))
    if values.get("quant_type") != packed[0].removeprefix("bitsandbytes__"):
        raise ValueError(f"{packed[0]!r} holds a state of quant_type {values.get('quant_type')!r}")
    if twice := sorted(fields.keys() & values.keys()):
        raise ValueError(f"{twice} stand in {packed[0]!r} and beside it")
    return fields | values


def _parsed(key: str, encoded: Any) -> dict[str, Any]:
    if not isinstance(encoded, Tensor) or encoded.dtype != torch.uint8 or encoded.ndim != 1:
        raise ValueError(f"{key!r} must be uint8 of one dimension, the bytes of a JSON object, got {_what(encoded)}")
    try:
        values = json.loads(bytes(encoded.tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key!r} does not hold a JSON object: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{key!r} does not hold a JSON object but {type(values).__name__}")
    return values


def _check(fields: dict[str, Any]) -> None:
    """Raises unless the fields describe one state that can be read."""
    nested = any(name in fields for name in _NESTED_NAMES)
    expected = {*_NAMES, *(_NESTED_NAMES if nested else ())}
    if missing := sorted(expected - fields.keys()):
        raise ValueError(f"a quant state without {', '.join(missing)} cannot be read; it has {sorted(fields)}")
    if unknown := sorted(fields.keys() - expected):
        raise ValueError(f"a quant state has no {', '.join(unknown)}; known: {sorted(expected)}")
    _check_values(fields)
    _check_tensor(fields, "absmax", torch.uint8 if nested else torch.float32, _blocks(fields))
    _check_map(fields, "quant_map", None if fields["quant_type"] is None else four_bit_map(fields["quant_type"]))
    if nested:
        _check_nested(fields)


def _check_values(fields: dict[str, Any]) -> None:
    quant_type, blocksize, shape = fields["quant_type"], fields["blocksize"], fields["shape"]
    if quant_type not in (None, *QuantState.valid_quant_types):
        raise ValueError(
            f"quant_type must be one of {QuantState.valid_quant_types} or, in 8 bits, None: {quant_type!r}"
        )
    if not _is_count(blocksize) or blocksize == 0 or (quant_type and blocksize not in BLOCK_SIZES):
        raise ValueError(f"blocksize must be one of {BLOCK_SIZES} in 4 bits, else positive; got {blocksize!r}")
    if fields["dtype"] not in tuple(_DTYPES):
        raise ValueError(f"dtype must be one of {list(_DTYPES)}, got {fields['dtype']!r}")
    if shape is None and quant_type is None:
        return
    if not isinstance(shape, (tuple, list)) or not all(map(_is_count, shape)):
        raise ValueError(f"shape must be a list of sizes, got {shape!r}")


def _check_nested(fields: dict[str, Any]) -> None:
    blocksize, offset = fields["nested_blocksize"], fields["nested_offset"]
    if not _is_count(blocksize) or blocksize == 0:
        raise ValueError(f"nested_blocksize must be positive, got {blocksize!r}")
    if fields["nested_dtype"] not in tuple(_DTYPES):
        raise ValueError(f"nested_dtype must be one of {list(_DTYPES)}, got {fields['nested_dtype']!r}")
    if not isinstance(offset, (int, float)) or isinstance(offset, bool):
        raise ValueError(f"nested_offset must be a number, got {offset!r}")
    blocks = -(-fields["absmax"].numel() // blocksize)
    _check_tensor(fields, "nested_absmax", torch.float32, blocks)
    _check_map(fields, "nested_quant_map", dynamic_map("dynamic") if fields["quant_type"] else None)


def _check_tensor(fields: dict[str, Any], name: str, dtype: torch.dtype, length: int | None) -> None:
    value = fields[name]
    fits = isinstance(value, Tensor) and value.ndim == 1 and value.dtype == dtype
    if not fits or (length is not None and len(value) != length):
        size = "any length" if length is None else f"length {length}"
        raise ValueError(
            f"{name} must be {dtype} of one dimension and {size} (shape {fields['shape']}, blocksize "
            f"{fields['blocksize']}), got {_what(value)}"
        )


def _check_map(fields: dict[str, Any], name: str, expected: Tensor | None) -> None:
    """Of 256 values, or those of `expected`."""
    _check_tensor(fields, name, torch.float32, CODES if expected is None else len(expected))
    if expected is not None and not fields[name].is_meta and not _close(fields[name].cpu(), expected):
        raise ValueError(f"{name} is not the map of {fields['quant_type']!r}: these codes stand for other values")


def _blocks(fields: dict[str, Any]) -> int | None:
    """How many blocks the values make; an 8-bit state does not know their shape."""
    return None if fields["shape"] is None else -(-math.prod(fields["shape"]) // fields["blocksize"])


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _what(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
