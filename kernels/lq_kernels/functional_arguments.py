"""What the functions with bitsandbytes' names accept and return: dtypes, statistics, tensors to write into.

They raise ValueError where bitsandbytes does, also for a wrong dtype, for which our own ops raise TypeError. int8
statistics are plain maxima there, amax / 127 in our ops.
"""

from functools import cache

import torch
from torch import Tensor

from lq_kernels.codebooks import dynamic_map, four_bit_map
from lq_kernels.element_types import INT8

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def rows_of(A: Tensor) -> Tensor:
    """A (..., K) as a matrix (rows, K)."""
    return A.reshape(A.shape[:-1].numel(), A.shape[-1])


def check_float(A: Tensor, name: str) -> None:
    if A.dtype not in FLOATS:
        raise ValueError(f"{name} takes float32, bfloat16 or float16, got {A.dtype}: cast it, A.float()")


def check_dtype(tensor: Tensor, dtype: torch.dtype, what: str) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{what} must be {dtype}, got {tensor.dtype}")


def check_stats(stats: Tensor, length: int, what: str) -> None:
    if stats.numel() != length or stats.dtype != torch.float32:
        raise ValueError(f"{what} must be float32 with {length} values, got {stats.dtype} {tuple(stats.shape)}")


def check_devices(A: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.device != A.device:
            raise ValueError(f"{name} is on {other.device}, the first tensor on {A.device}: move it with .to()")


def check_threshold(threshold: float) -> None:
    if not threshold >= 0:
        raise ValueError(f"the threshold of outliers must not be negative, got {threshold}; 0 is none")


def refuse_second_gradient(name: str) -> None:
    """To be called in backward, where gradients are enabled only for create_graph=True."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{name} has no gradient of its gradient, and create_graph=True asks for one")


def written(result: Tensor, out: Tensor | None, what: str = "out") -> Tensor:
    """`result`, or `out` with the result in it."""
    if out is None:
        return result
    if (out.shape, out.dtype, out.device) != (result.shape, result.dtype, result.device):
        raise ValueError(
            f"{what} must be {result.dtype} {tuple(result.shape)} on {result.device}, "
            f"got {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    return out.copy_(result)


def written_without_gradient(result: Tensor, out: Tensor | None, name: str) -> Tensor:
    """`written`, or RuntimeError where a gradient would be lost."""
    if out is not None and result.requires_grad:
        raise RuntimeError(f"{name} with out= has no gradients: call it under torch.no_grad(), or without out")
    return written(result, out)


def absmax_of(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The amax that each scale = amax / 127 was made from, of values of `dtype`: float32, of one dimension.

    Exact for values of 16 bits, whose amax has fewer digits than the float32 product; for float32 one ulp off at most.
    """
    return (scale * INT8.largest).to(dtype).float().view(-1)


def scale_of(absmax: Tensor) -> Tensor:
    """absmax / 127, float32 (rows, 1)."""
    return (absmax.float() / INT8.largest).view(-1, 1)


@torch.compiler.assume_constant_result
def map_on(name: str, device: torch.device) -> Tensor:
    """The map "nf4", "fp4" or "dynamic" (bitsandbytes' signed one) on `device`; shared, so do not write to it."""
    return _cached_map_on(name, device)


@cache
def _cached_map_on(name: str, device: torch.device) -> Tensor:
    return _MAPS[name].to(device)


# Made on import: under a FakeTensorMode the caches would keep fake tensors.
_MAPS = {"dynamic": dynamic_map("dynamic"), "nf4": four_bit_map("nf4"), "fp4": four_bit_map("fp4")}
