"""The 8-bit element types: what they hold, which GPUs have them, and how a scaled value becomes a code.

int8 is symmetric: -128 is never used. fp8 is OCP's, "8-bit floating point specification", revision 1.0, section 5,
https://www.opencompute.org/documents/ocp-8-bit-floating-point-specification-ofp8-revision-1-0-2023-12-01-pdf-1.pdf:
e4m3 ends at 448 and has no infinities, e5m2 is the upper byte of a float16 and ends at 57344.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lq_kernels._triton import tl, triton
from lq_kernels.rounding import (
    int8_nearest,
    int8_stochastic,
    mantissa_stochastic,
    round_to_int8,
    round_to_mantissa,
)


@dataclass(frozen=True)
class ElementType:
    """Codes of `dtype` up to `largest`; fp8 has so many bits of mantissa, and normal codes from `smallest_normal`."""

    dtype: torch.dtype
    largest: float
    mantissa: int = 0
    smallest_normal: float = 1.0

    @property
    def smallest_amax(self) -> float:
        """A power of two from which largest / amax is finite, amax / largest is normal, and float32's subnormal values
        are less than half of the smallest code, so that nothing depends on whether a device flushes them to zero."""
        smallest_code = self.smallest_normal * 2.0**-self.mantissa
        return 2.0 ** math.ceil(math.log2(2 * self.largest / smallest_code) - 126)

    def quantize(
        self, x: Tensor, amax: Tensor, bits: Tensor | None, power_of_two: bool = False
    ) -> tuple[Tensor, Tensor]:
        """codes, contiguous, and scale; amax has a size of 1 in each dimension that shares a scale.

        With bits of `random_bits`, one for each value, codes are rounded stochastically. With `power_of_two` the scale
        is the next power of two, and its product with a code is exact.
        """
        amax = amax.float()
        amax = torch.where(amax < self.smallest_amax, 0.0, amax)
        quantizable = (amax > 0) & amax.isfinite()
        largest = torch.full_like(amax, self.largest)  # torch computes `number / tensor` as reciprocal times number
        scale, factor = amax / largest, torch.where(quantizable, largest / amax, 0.0)
        if power_of_two:
            above = ((scale.view(torch.int32) + _MANTISSA) & ~_MANTISSA).view(torch.float32)
            scale = torch.where(quantizable, above, scale)
            factor = torch.where(quantizable, torch.ones_like(scale) / scale, 0.0)
        scaled = torch.where(quantizable, x.float() * factor, 0.0)
        return self._encode(scaled, bits).clone(memory_format=torch.contiguous_format), scale

    def _encode(self, x: Tensor, bits: Tensor | None) -> Tensor:
        """x float32 in [-largest, largest], but for one rounding."""
        if bits is None:
            return (x.round() if self.dtype == torch.int8 else x).to(self.dtype)
        x = x.clamp(-self.largest, self.largest)
        if self.dtype == torch.int8:
            return round_to_int8(x, bits)
        return round_to_mantissa(x, bits, self.mantissa, self.smallest_normal).to(self.dtype)


INT8 = ElementType(torch.int8, 127.0)
E4M3 = ElementType(torch.float8_e4m3fn, 448.0, mantissa=3, smallest_normal=2.0**-6)
E5M2 = ElementType(torch.float8_e5m2, 57344.0, mantissa=2, smallest_normal=2.0**-14)

ELEMENT_TYPES = {element.dtype: element for element in (INT8, E4M3, E5M2)}

_MANTISSA = 2**23 - 1  # the bits of a float32's mantissa
_MANTISSA_BITS = tl.constexpr(_MANTISSA)
_E4M3_MANTISSA, _E4M3_NORMAL = tl.constexpr(E4M3.mantissa), tl.constexpr(E4M3.smallest_normal)
_E5M2_MANTISSA, _E5M2_NORMAL = tl.constexpr(E5M2.mantissa), tl.constexpr(E5M2.smallest_normal)


def require_element_type(dtype: torch.dtype, device: torch.device, op: str) -> None:
    """Raises where the GPU has no arithmetic of that type; Triton's interpreter (a CPU) has all of them."""
    if dtype == torch.int8 or device.type == "cpu":
        return
    missing = _missing_fp8(triton.runtime.driver.active, device.index or 0)
    if missing:
        raise RuntimeError(
            f"{op} got {dtype}, which needs NVIDIA's sm_89 or newer or AMD's gfx950: {missing}; use int8"
        )


@cache
def _missing_fp8(driver: Any, index: int) -> str:
    target = driver.get_current_target()
    if target.backend == "cuda":
        return "" if target.arch >= 89 else f"sm_{target.arch} has no fp8"
    if target.arch.startswith(("gfx95", "gfx12")):
        return ""
    return f"{target.arch} has no fp8 of this encoding (gfx94x has the fnuz one, where the same byte is half the value)"


@triton.jit
def magnitude_bits(x):
    """|x| as the bits of a float32: they order like the values, infinity above those and NaN above infinity."""
    return tl.abs(x.to(tl.float32)).to(tl.int32, bitcast=True)


@triton.jit
def scales(amax_bits, LARGEST: tl.constexpr, SMALLEST_AMAX: tl.constexpr, POWER_OF_TWO: tl.constexpr = False):
    """The bits of amax -> scale, the factor that turns values into codes, and whether there is one."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    amax = tl.where(amax < SMALLEST_AMAX, 0.0, amax)
    quantizable = (amax > 0) & (amax < float("inf"))
    largest = tl.full(amax.shape, LARGEST, tl.float32)
    scale = tl.div_rn(amax, largest)
    if POWER_OF_TWO:
        bits = (scale.to(tl.int32, bitcast=True) + _MANTISSA_BITS) & ~_MANTISSA_BITS
        scale = tl.where(quantizable, bits.to(tl.float32, bitcast=True), scale)
        factor = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.where(quantizable, scale, 1.0))
    else:
        factor = tl.div_rn(largest, tl.where(quantizable, amax, 1.0))
    return scale, factor, quantizable


@triton.jit
def encode(x, factor, quantizable, word, element_type: tl.constexpr, LARGEST: tl.constexpr):
    """Values -> codes of that type; word is None to round to nearest, or `random_words` to round stochastically."""
    if element_type != tl.int8:
        codes = fp8_values(x, factor, quantizable, word, element_type, LARGEST).to(element_type)
    else:
        x = tl.where(quantizable, x.to(tl.float32) * factor, 0.0)
        limited = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
        codes = int8_nearest(x) if word is None else int8_stochastic(limited, word)
    return codes


@triton.jit
def fp8_values(x, factor, quantizable, word, element_type: tl.constexpr, LARGEST: tl.constexpr):
    """Values -> the float32 whose nearest code is the one wanted; word as for `encode`."""
    x = tl.where(quantizable, x.to(tl.float32) * factor, 0.0)
    if word is not None:
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
        if element_type == tl.float8e4nv:
            x = mantissa_stochastic(x, word, _E4M3_MANTISSA, _E4M3_NORMAL)
        else:
            x = mantissa_stochastic(x, word, _E5M2_MANTISSA, _E5M2_NORMAL)
    return x


@triton.jit
def _byte(x, element_type: tl.constexpr):
    return x.to(element_type).to(tl.uint8, bitcast=True).to(tl.uint32)


@triton.jit
def fp8_words(a, b, c, d, element_type: tl.constexpr, PTX: tl.constexpr):
    """Four float32 -> int32 with their nearest codes, that of a in the lowest byte.

    Codes that are converted two at a time and taken apart again come out wrong: ptxas 12.8 and 12.9 read them, in the
    first round of a loop, before they are there.
    """
    if not PTX:
        upper = _byte(c, element_type) << 16 | _byte(d, element_type) << 24
        words = (_byte(a, element_type) | _byte(b, element_type) << 8 | upper).to(tl.int32, bitcast=True)
    elif element_type == tl.float8e4nv:
        words = tl.inline_asm_elementwise(
            "{ .reg .b16 %lower, %upper; cvt.rn.satfinite.e4m3x2.f32 %lower, $2, $1; "
            "cvt.rn.satfinite.e4m3x2.f32 %upper, $4, $3; mov.b32 $0, {%lower, %upper}; }",
            "=r,f,f,f,f",
            [a, b, c, d],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        words = tl.inline_asm_elementwise(
            "{ .reg .b16 %lower, %upper; cvt.rn.satfinite.e5m2x2.f32 %lower, $2, $1; "
            "cvt.rn.satfinite.e5m2x2.f32 %upper, $4, $3; mov.b32 $0, {%lower, %upper}; }",
            "=r,f,f,f,f",
            [a, b, c, d],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return words


def has_ptx(device: torch.device) -> bool:
    """Whether it is an NVIDIA GPU; Triton's interpreter (a CPU) is none."""
    return device.type != "cpu" and _has_ptx(triton.runtime.driver.active, device.index or 0)


@cache
def _has_ptx(driver: Any, index: int) -> bool:
    return bool(driver.get_current_target().backend == "cuda")
