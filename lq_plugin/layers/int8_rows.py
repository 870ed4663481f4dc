"""A matrix in int8 with the largest magnitude of each row, as integer tensors, and its form in checkpoints.

    weight     int8 (rows, columns): round_half_to_even(value * 127 / row_amax)
    row_amax   int32 (rows, 1): the bits of float32

A checkpoint is that of bitsandbytes' Linear8bitLt: weight, SCB (row_amax as float32) and weight_format, 0 for rows.

Source: Dettmers et al. 2022, section 3, https://arxiv.org/abs/2208.07339
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from lq_kernels.functional_arguments import absmax_of, scale_of
from lq_kernels.rowwise import quantize_rowwise
from torch import Tensor

from lq_plugin.formats.llm_int8 import LLMInt8

# The codes of weight_format in files of bitsandbytes; it writes 0 and has stopped reading the others.
_ROW = 0
_LEGACY_FORMATS = {1: "col32", 2: "col_turing", 3: "col_ampere"}


@dataclass(frozen=True)
class Int8Rows:
    """How a tensor of `shape`, its last dimension the columns, is kept in int8; `storage` is not read."""

    shape: tuple[int, ...]
    format: LLMInt8
    storage: torch.dtype = torch.uint8

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def codes(self) -> tuple[str, ...]:
        return ("weight", "row_amax")

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        codes, scale = quantize_rowwise(weight.reshape(-1, self.columns))
        return {"weight": codes, "row_amax": absmax_of(scale, weight.dtype).view(torch.int32).view(-1, 1)}

    def amax(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(rows,) float32."""
        return tensors["row_amax"].view(torch.float32).view(-1)

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return (tensors["weight"].float() * scale_of(self.amax(tensors))).to(dtype).view(self.shape)

    def select(self, tensors: Mapping[str, Tensor], index: Tensor, dtype: torch.dtype) -> Tensor:
        codes = tensors["weight"].view(self.shape)[index]
        scale = scale_of(self.amax(tensors)).view(*self.shape[:-1], 1)[index]
        return (codes.float() * scale).to(dtype)

    def entries(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        codes = tensors["weight"]
        weight_format = torch.tensor(_ROW, dtype=torch.uint8, device=codes.device)
        return {"weight": codes, "SCB": self.amax(tensors), "weight_format": weight_format}

    def is_entry(self, name: str) -> bool:
        return name in ("weight", "SCB", "weight_format") or name.startswith("weight.")

    def absent(self, entries: Mapping[str, Tensor]) -> list[str]:
        return [] if "SCB" in entries else ["SCB"]

    def superfluous(self, entries: Mapping[str, Tensor]) -> list[str]:
        return [name for name in entries if name.startswith("weight.")]

    def read(self, entries: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], None]:
        _check_layout(entries.get("weight_format"))
        rows = torch.Size(self.shape[:-1]).numel()
        for name, dtype, shape in (("weight", torch.int8, (rows, self.columns)), ("SCB", torch.float32, (rows,))):
            found = entries[name]
            if found.dtype != dtype or tuple(found.shape) != shape:
                raise ValueError(f"{name} must be {dtype} {shape}, the file has {found.dtype} {tuple(found.shape)}")
        row_amax = entries["SCB"].contiguous().view(torch.int32).view(-1, 1)
        return {"weight": entries["weight"], "row_amax": row_amax}, None


def _check_layout(weight_format: Tensor | None) -> None:
    """A file without the entry is in rows."""
    code = _ROW if weight_format is None else int(weight_format)
    if code in _LEGACY_FORMATS:
        raise ValueError(
            f"the file has weight_format {code}, the layout {_LEGACY_FORMATS[code]} of older GPUs, which only "
            "bitsandbytes before 0.45 reads: load it there and save it again in rows, or quantise the original weights"
        )
    if code != _ROW:
        raise ValueError(f"the file has weight_format {code}, expected {_ROW} (rows)")
