"""NF4 and FP4: blocks of a row share a scale, each weight is one of sixteen values times that scale.

Blocks never cross rows. With double quantisation the scales are kept in 8 bits: 4.127 bits for a weight in blocks of
64, 4.5 without.

Source: QLoRA, section 3, https://arxiv.org/abs/2305.14314
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from lq_kernels.layout_4bit import BLOCK_SIZES

from lq_plugin.formats.frozen import FrozenFormat

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FEW_BITS = ("int8", "fp8")


@dataclass(frozen=True)
class FourBit(FrozenFormat):
    """block_size: weights that share a scale, one of BLOCK_SIZES. double_quantization: scales in 8 bits.

    compute: the dtype of the product, float32, bfloat16, float16 or their names; None is that of the input, inside
    autocast the autocast dtype. "int8" and "fp8" are that too, with both operands rounded to 8 bits by row, forward and
    for the gradient to the input (see `lq_kernels.packed_4bit.matmul_4bit`).
    """

    block_size: int = 64
    double_quantization: bool = False
    compute: torch.dtype | str | None = None

    bits: ClassVar[int] = 4
    quant_type: ClassVar[str]

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"{type(self).__name__} got block_size={self.block_size!r}, expected one of {BLOCK_SIZES}")
        compute = _DTYPES.get(self.compute, self.compute) if isinstance(self.compute, str) else self.compute
        if compute not in (None, *_DTYPES.values(), *_FEW_BITS):
            known = ", ".join((*_DTYPES, *_FEW_BITS))
            raise ValueError(
                f"{type(self).__name__} got compute={self.compute!r}, expected one of {known}, or None for the dtype "
                "of the input"
            )
        object.__setattr__(self, "compute", compute)

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype that the product runs in, None for that of its input."""
        return None if isinstance(self.compute, str) else self.compute

    @property
    def few_bits(self) -> str | None:
        """The 8-bit arithmetic that the product runs in, None for none."""
        return self.compute if isinstance(self.compute, str) else None

    @property
    def name(self) -> str:
        return f"{self.quant_type}_dq" if self.double_quantization else self.quant_type


@dataclass(frozen=True)
class NF4(FourBit):
    """Sixteen quantiles of the normal distribution."""

    quant_type: ClassVar[str] = "nf4"


@dataclass(frozen=True)
class FP4(FourBit):
    """A sign and three bits of bitsandbytes' own float, which is not OCP's E2M1."""

    quant_type: ClassVar[str] = "fp4"


def four_bit_format(
    quant_type: str, block_size: int = 64, double_quantization: bool = False, compute: torch.dtype | None = None
) -> FourBit:
    """The format of that quant_type, "nf4" or "fp4"; ValueError for another."""
    formats = {"nf4": NF4, "fp4": FP4}
    if quant_type not in formats:
        raise ValueError(f"quant_type must be one of {', '.join(formats)}, got {quant_type!r}")
    return formats[quant_type](block_size, double_quantization, compute)
