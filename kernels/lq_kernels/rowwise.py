"""Quantisation to 8 bits with one scale for a row, a column or a whole matrix: x = codes * scale.

    amax  = max(|x|) over what shares the scale          (float32)
    scale = amax / largest                               (largest: 127 for int8, 448 for e4m3, 57344 for e5m2)
    codes = round(x * (largest / amax))                  (product and quotient rounded to float32)

Source: LLM.int8(), section 3.1, https://arxiv.org/abs/2208.07339; the transposed forms: SwitchBack, section 2,
https://arxiv.org/abs/2304.13013; fp8: https://arxiv.org/abs/2209.05433, section 3. bitsandbytes returns amax where this
returns amax / 127.

Every op takes x (M, N) float32, bfloat16 or float16 with any strides and any size, 0 included, and
  * dtype: int8, float8_e4m3fn or float8_e5m2. fp8 on a GPU without it (before sm_89; gfx942) is a RuntimeError;
  * rounding: "nearest", ties to even, or "stochastic": each value goes to one of the two codes around it, such that
    the expectation of codes * scale is x (rounding.py). The largest codes are never passed;
  * seed: for "stochastic" only, int64 with one element on the device of x. The random bits depend on it and on the
    index of a value in x in row-major order;
  * power_of_two: scales are rounded up to powers of two, so that multiplying by them rounds nothing.

A transposed op writes the transpose of what its namesake writes, contiguously. What shares a scale is
  * all zeros, or with an amax below `ElementType.smallest_amax` (2^-118, 2^-107, 2^-93): codes 0, scale 0;
  * not finite somewhere: codes 0, and the scale is NaN or infinite, so that codes * scale is NaN and the loss shows it.
Both backends give the same bits: the maximum does not depend on the order, and the quotients are IEEE divisions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lq_kernels._op import Op, op
from lq_kernels.element_types import ELEMENT_TYPES, require_element_type
from lq_kernels.rounding import random_bits
from lq_kernels.rowwise_rows import launch_rows
from lq_kernels.rowwise_tiles import launch_columns, launch_matrix

Result = tuple[Tensor, Tensor]
ScaleShape = Callable[[int, int], tuple[int, int]]
Launch = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], None]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@op
def quantize_rowwise(
    x: Tensor,
    dtype: torch.dtype = torch.int8,
    rounding: str = "nearest",
    seed: Tensor | None = None,
    power_of_two: bool = False,
) -> Result:
    """x (M, K) float -> codes (M, K) int8 or fp8, scale (M, 1) float32."""
    check(x, dtype, rounding, seed, "quantize_rowwise")
    amax = x.abs().amax(dim=1, keepdim=True) if x.shape[1] else x.new_zeros(x.shape[0], 1)
    return quantize_reference(x, amax, dtype, seed, power_of_two)


@op
def quantize_columnwise(
    x: Tensor,
    dtype: torch.dtype = torch.int8,
    rounding: str = "nearest",
    seed: Tensor | None = None,
    power_of_two: bool = False,
) -> Result:
    """x (M, N) float -> codes (M, N) int8 or fp8, scale (1, N) float32."""
    check(x, dtype, rounding, seed, "quantize_columnwise")
    amax = x.abs().amax(dim=0, keepdim=True) if x.shape[0] else x.new_zeros(1, x.shape[1])
    return quantize_reference(x, amax, dtype, seed, power_of_two)


@op
def quantize_columnwise_transposed(
    x: Tensor,
    dtype: torch.dtype = torch.int8,
    rounding: str = "nearest",
    seed: Tensor | None = None,
    power_of_two: bool = False,
) -> Result:
    """x (M, N) float -> codes (N, M) int8 or fp8, contiguous, scale (N, 1) float32."""
    check(x, dtype, rounding, seed, "quantize_columnwise_transposed")
    codes, scale = quantize_columnwise.reference(x, dtype, rounding, seed, power_of_two)
    return codes.t().clone(memory_format=torch.contiguous_format), scale.reshape(-1, 1)


@op
def quantize_tensorwise(
    x: Tensor,
    dtype: torch.dtype = torch.int8,
    rounding: str = "nearest",
    seed: Tensor | None = None,
    power_of_two: bool = False,
) -> Result:
    """x (M, N) float -> codes (M, N) int8 or fp8, scale (1, 1) float32."""
    check(x, dtype, rounding, seed, "quantize_tensorwise")
    amax = x.abs().amax().view(1, 1) if x.numel() else x.new_zeros(1, 1)
    return quantize_reference(x, amax, dtype, seed, power_of_two)


@op
def quantize_tensorwise_transposed(
    x: Tensor,
    dtype: torch.dtype = torch.int8,
    rounding: str = "nearest",
    seed: Tensor | None = None,
    power_of_two: bool = False,
) -> Result:
    """x (M, N) float -> codes (N, M) int8 or fp8, contiguous, scale (1, 1) float32."""
    check(x, dtype, rounding, seed, "quantize_tensorwise_transposed")
    codes, scale = quantize_tensorwise.reference(x, dtype, rounding, seed, power_of_two)
    return codes.t().clone(memory_format=torch.contiguous_format), scale


def quantize_reference(
    x: Tensor, amax: Tensor, dtype: torch.dtype, seed: Tensor | None, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    """codes and scale of x (M, N), whose amax is (M, 1), (1, N) or (1, 1)."""
    bits = None if seed is None else random_bits(seed, torch.arange(x.numel(), device=x.device).view(x.shape))
    return ELEMENT_TYPES[dtype].quantize(x, amax, bits, power_of_two)


def check(x: Tensor, dtype: torch.dtype, rounding: str, seed: Tensor | None, name: str) -> None:
    if x.ndim != 2:
        raise ValueError(f"{name} takes a matrix, got shape {tuple(x.shape)}: flatten it, x.reshape(-1, x.shape[-1])")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} takes float32, bfloat16 or float16, got {x.dtype}: cast it, x.float()")
    if dtype not in ELEMENT_TYPES:
        raise TypeError(f"{name} returns codes of {', '.join(map(str, ELEMENT_TYPES))}, not {dtype}")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"{name} takes rounding 'nearest' or 'stochastic', got {rounding!r}")
    if (seed is not None) != (rounding == "stochastic"):
        raise ValueError(f"{name} takes a seed with rounding='stochastic', and only then; got {rounding!r}, {seed}")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device):
        raise ValueError(
            f"{name} takes a seed of one int64 on {x.device}, got {tuple(seed.shape)} {seed.dtype} on {seed.device}"
        )


def _complete(op: Op[..., Result], scale_shape: ScaleShape, launch: Launch, transposed: bool = False) -> None:
    """Gives an op its fake and its launcher; they differ in the shape of scale and in the order of the codes only."""

    @op.fake
    def fake(
        x: Tensor,
        dtype: torch.dtype = torch.int8,
        rounding: str = "nearest",
        seed: Tensor | None = None,
        power_of_two: bool = False,
    ) -> Result:
        check(x, dtype, rounding, seed, op.name)
        M, N = x.shape
        codes = x.new_empty((N, M) if transposed else (M, N), dtype=dtype)
        return codes, x.new_empty(scale_shape(M, N), dtype=torch.float32)

    @op.triton
    def _launch(
        x: Tensor,
        dtype: torch.dtype = torch.int8,
        rounding: str = "nearest",
        seed: Tensor | None = None,
        power_of_two: bool = False,
    ) -> Result:
        codes, scale = fake(x, dtype, rounding, seed, power_of_two)
        require_element_type(dtype, x.device, op.name)
        launch(x, codes.t() if transposed else codes, scale, seed, power_of_two)
        return codes, scale


_complete(quantize_rowwise, lambda M, N: (M, 1), launch_rows)
_complete(quantize_columnwise, lambda M, N: (1, N), launch_columns)
_complete(quantize_columnwise_transposed, lambda M, N: (N, 1), launch_columns, transposed=True)
_complete(quantize_tensorwise, lambda M, N: (1, 1), launch_matrix)
_complete(quantize_tensorwise_transposed, lambda M, N: (1, 1), launch_matrix, transposed=True)
