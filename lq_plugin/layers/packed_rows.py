"""A matrix in 4 bits whose blocks never cross rows, as integer tensors, and its form in checkpoints.

    weight         uint8 (rows, padded / 2)
    scale          int32 (rows, blocks of a row): the bits of float32; with double quantisation uint8 codes
    nested_scale   int32 (ceil(rows * blocks / 256),), the bits of float32; with double quantisation only
    nested_offset  int32 (), the bits of float32; with double quantisation only

`padded` is the number of columns, rounded up to whole blocks. Where nothing is padded a checkpoint is that of
bitsandbytes, a reshape of these. Where rows are padded it could not be: there blocks run from one row into the next.
Such a weight is saved under a key of its own, `quant_state.lq_plugin__nf4`, which no other reader takes for its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from lq_kernels.codebooks import dynamic_map, four_bit_map
from lq_kernels.layout_4bit import BLOCK_SIZES
from lq_kernels.nested_scales import NESTED_BLOCK_SIZE
from lq_kernels.packed_4bit import Nested, Packed4bit
from lq_kernels.quant_state import QuantState
from torch import Tensor

from lq_plugin.formats.four_bit import FourBit

_STATISTICS = ("absmax", "quant_map")
_NESTED_STATISTICS = ("nested_absmax", "nested_quant_map")


@dataclass(frozen=True)
class PackedRows:
    """How a tensor of `shape`, its last dimension the columns, is kept in `format`.

    storage: the dtype under which a checkpoint shows the bytes.
    """

    shape: tuple[int, ...]
    format: FourBit
    storage: torch.dtype = torch.uint8

    @cached_property
    def columns(self) -> int:
        return self.shape[-1]

    @cached_property
    def padded(self) -> int:
        return -(-self.columns // self.format.block_size) * self.format.block_size

    @cached_property
    def rows(self) -> int:
        return torch.Size(self.shape[:-1]).numel()

    @cached_property
    def codes(self) -> tuple[str, ...]:
        return ("weight", "scale") + (("nested_scale", "nested_offset") if self.format.double_quantization else ())

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """weight of `shape`, float -> the tensors above."""
        padding = self.padded - self.columns
        rows = weight.reshape(self.rows, self.columns)
        rows = F.pad(rows, (0, padding)) if padding else rows
        f = self.format
        return self._tensors(Packed4bit.quantize(rows, f.block_size, f.quant_type, double=f.double_quantization))

    def _tensors(self, packed: Packed4bit) -> dict[str, Tensor]:
        tensors = {"weight": packed.packed.view(torch.uint8).view(self.rows, -1)}
        if packed.nested is None:
            assert packed.scale is not None
            return tensors | {"scale": packed.scale.view(torch.int32).view(self.rows, -1)}
        nested = packed.nested
        return tensors | {
            "scale": nested.scale_codes.view(self.rows, -1),
            "nested_scale": nested.nested_scale.view(torch.int32),
            "nested_offset": nested.offset.view(torch.int32),
        }

    def packed(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Packed4bit:
        """The tensors as an operand of `matmul_4bit`, of shape (rows, padded); `dtype` is what it dequantises to."""
        scale, nested = tensors["scale"].view(-1), None
        if self.format.double_quantization:
            nested_scale, offset = tensors["nested_scale"], tensors["nested_offset"]
            nested = Nested(scale, nested_scale.view(torch.float32), offset.view(torch.float32))
        return Packed4bit(
            tensors["weight"],
            scale.view(torch.float32) if nested is None else None,
            self.format.block_size,
            self.format.quant_type,
            (self.rows, self.padded),
            dtype,
            nested,
        )

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """-> the tensor of `shape` in `dtype`."""
        return self.packed(tensors, dtype).dequantize()[:, : self.columns].reshape(self.shape)

    def check_exportable(self) -> None:
        """ValueError where bitsandbytes' layout does not exist for these rows, naming the block sizes that fit."""
        if self.padded == self.columns:
            return
        fitting = ", ".join(str(size) for size in BLOCK_SIZES if self.columns % size == 0)
        advice = (
            f"block sizes that fit: {fitting}. Quantise with one of those, or" if fitting else "no block size fits:"
        )
        raise ValueError(
            f"rows of {self.columns} are no whole blocks of {self.format.block_size}, and bitsandbytes' format has no "
            f"padding; {advice} leave the layer in 16 bits"
        )

    def select(self, tensors: Mapping[str, Tensor], index: Tensor, dtype: torch.dtype) -> Tensor:
        """index (n,) -> the tensor's [index], in `dtype`; the scales of all are read back where they are quantised."""
        count, within = self.shape[0], self.rows // max(self.shape[0], 1)
        scale = self.packed(tensors, dtype).plain_scale().view(count, -1)[index]
        codes = _as_words(tensors["weight"]).view(count, -1)[index].view(torch.uint8)
        shape, f = (len(index) * within, self.padded), self.format
        packed = Packed4bit(codes.view(-1), scale.view(-1), f.block_size, f.quant_type, shape, dtype)
        return packed.dequantize()[:, : self.columns].reshape(len(index), *self.shape[1:])

    def entries(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        packed = self.packed(tensors, dtype)
        codes = packed.packed.view(-1).view(self.storage).view(-1, 1)
        statistics = self._blank(dtype) if codes.is_meta else self._state(packed).as_dict(packed=True)
        named = {f"weight.{self._own_name(name)}": tensor.to(codes.device) for name, tensor in statistics.items()}
        return {"weight": codes} | named

    def _state(self, packed: Packed4bit) -> QuantState:
        device, nested = packed.packed.device, packed.nested
        state = QuantState(
            absmax=packed.scale if nested is None else nested.scale_codes,  # type: ignore[arg-type]
            shape=torch.Size(self._saved_shape),
            code=four_bit_map(self.format.quant_type).to(device),
            blocksize=self.format.block_size,
            quant_type=self.format.quant_type,
            dtype=packed.dtype,
        )
        if nested is not None:
            code = dynamic_map("dynamic").to(device)
            state.offset = nested.offset
            state.state2 = QuantState(nested.nested_scale, code=code, blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32)
        return state

    def _blank(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The statistics of zeros."""
        meta = torch.empty(self.shape, dtype=dtype, device="meta")
        zeros = {name: torch.zeros(x.shape, dtype=x.dtype) for name, x in self.quantize(meta).items()}
        return self._state(self.packed(zeros, dtype)).as_dict(packed=True)

    def is_entry(self, name: str) -> bool:
        return name == "weight" or name.startswith("weight.")

    def absent(self, entries: Mapping[str, Tensor]) -> list[str]:
        nested = any(f"weight.{name}" in entries for name in _NESTED_STATISTICS)
        names = _STATISTICS + (_NESTED_STATISTICS if self.format.double_quantization or nested else ())
        absent = [f"weight.{name}" for name in names if f"weight.{name}" not in entries]
        return absent + ([] if any(map(_is_state, entries)) else [f"weight.{self._state_name}"])

    def superfluous(self, entries: Mapping[str, Tensor]) -> list[str]:
        known = {"weight", *(f"weight.{name}" for name in (*_STATISTICS, *_NESTED_STATISTICS))}
        return [name for name in entries if name not in known and not _is_state(name)]

    def read(self, entries: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], torch.dtype]:
        """A checkpoint's codes, of any storage dtype, and the entries beside them -> the tensors above and a dtype.

        ValueError tells what is truncated, of another format, of other sizes, or not what it says.
        """
        weight = entries["weight"]
        other = [name for name in entries if _is_state(name) and name != f"weight.{self._state_name}"]
        if other and self.padded != self.columns:
            self.check_exportable()
        if other:
            raise ValueError(f"the layer reads {self._state_name}, the file has {', '.join(other)}: another format")
        beside = {name: tensor for name, tensor in entries.items() if name != "weight"}
        own = {name.replace("lq_plugin__", "bitsandbytes__"): tensor for name, tensor in beside.items()}
        state = QuantState.from_dict(own, weight.device)
        self._check(state, weight)
        block_size, dtype = state.form()
        scale, nested = state.absmax, None
        if state.state2 is not None:
            assert state.offset is not None
            nested = Nested(scale, state.state2.absmax, state.offset)
        codes = weight.contiguous().view(-1).view(torch.uint8)
        shape, quant_type = (self.rows, self.padded), self.format.quant_type
        return self._tensors(
            Packed4bit(codes, None if nested else scale, block_size, quant_type, shape, dtype, nested)
        ), dtype

    def _check(self, state: QuantState, weight: Tensor) -> None:
        f = self.format
        bytes_expected, bytes_found = self.rows * self.padded // 2, weight.numel() * weight.itemsize
        for what, found, expected in (
            ("blocksize", state.blocksize, f.block_size),
            ("shape", tuple(state.shape or ()), self._saved_shape),
            ("double quantisation", state.nested, f.double_quantization),
            ("number of bytes", bytes_found, bytes_expected),
        ):
            if found != expected:
                raise ValueError(f"the file has {what} {found}, the layer {expected}")
        if state.state2 is not None and state.state2.blocksize != NESTED_BLOCK_SIZE:
            raise ValueError(f"the file has nested_blocksize {state.state2.blocksize}, expected {NESTED_BLOCK_SIZE}")

    @property
    def _saved_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-1], self.padded)

    @property
    def _state_name(self) -> str:
        return self._own_name(f"quant_state.bitsandbytes__{self.format.quant_type}")

    def _own_name(self, name: str) -> str:
        return name if self.padded == self.columns else name.replace("bitsandbytes__", "lq_plugin__")


def _as_words(codes: Tensor) -> Tensor:
    """Eight bytes at a time where they lie so: a gather takes as long for a byte as for a word."""
    aligned = codes.storage_offset() % torch.int64.itemsize == 0 and codes.shape[1] % torch.int64.itemsize == 0
    return codes.view(torch.int64) if aligned else codes


def _is_state(name: str) -> bool:
    return name.startswith("weight.quant_state.")
