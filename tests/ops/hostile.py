"""Inputs made to find what a kernel forgets.

Tensors are cut out of a larger buffer filled with infinities (integers: with their smallest value), so that a load
that overruns its mask changes the result.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Arguments = tuple[Any, ...]
Samples = Iterator[tuple[str, Arguments]]
SampleTable = dict[str, Callable[[], Samples]]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def cut_out(values: Tensor, strides_of: str = "rows") -> Tensor:
    """values (rows, columns) as a view into a poisoned buffer.

    "rows": rows of the buffer are longer; "columns": the same of the transpose; "every_other": steps of 2 both ways.
    """
    if strides_of == "columns":
        return cut_out(values.t()).t()
    rows, columns = values.shape
    poison = float("inf") if values.is_floating_point() else torch.iinfo(values.dtype).min
    step = 2 if strides_of == "every_other" else 1
    buffer = torch.full((step * rows + 8, step * columns + 8), poison, dtype=values.dtype)
    view = buffer[4 : 4 + step * rows : step, 4 : 4 + step * columns : step]
    view.copy_(values)
    return view


def to_device(value: Any, device: torch.device) -> Any:
    """A copy of a tensor with its strides and the buffer that it was cut from; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    buffer = torch.empty(0, dtype=torch.uint8, device=value.device).set_(value.untyped_storage()).to(device, copy=True)
    view = torch.empty(0, dtype=value.dtype, device=device)
    return view.set_(buffer.untyped_storage(), value.storage_offset(), value.shape, value.stride())


def heavy_tailed(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows whose magnitudes spread over orders of magnitude, as tokens do; the last row is zeros."""
    values = torch.randn(rows, columns) * torch.exp(2 * torch.randn(rows, 1))
    values[-1:] = 0
    return values.clamp(-60000, 60000).to(dtype)


def ties(rows: int, columns: int) -> Tensor:
    """127 first, so that the scale is 1, then halves, which have to go to the even neighbour, and their neighbours."""
    values = torch.randint(-126, 126, (rows, columns)) + 0.5
    above, below = torch.nextafter(values, torch.tensor(999.0)), torch.nextafter(values, torch.tensor(-999.0))
    values = torch.stack([values, above, below])[torch.randint(3, (rows, columns)), *_grid(rows, columns)]
    values[:, 0] = 127
    return values


def rounded_twice(rows: int, columns: int) -> Tensor:
    """Rows in which some x * (127 / amax) is a half only because it was rounded to float32."""
    amax = torch.rand(rows, 1) + 1
    values = (torch.randint(-126, 126, (rows, columns)) + 0.5) / (torch.full_like(amax, 127.0) / amax)
    values[:, :1] = amax
    return values


def not_finite(rows: int, columns: int) -> Tensor:
    """A row with a NaN, one with an infinity, one with both, one of the smallest values, and ordinary ones."""
    values = heavy_tailed(rows, columns)
    values[1, columns // 2] = float("nan")
    values[2, columns - 1] = -float("inf")
    values[3, :2] = torch.tensor([float("inf"), -float("nan")])
    return values


def tiny(columns: int) -> Tensor:
    """Rows whose amax goes from subnormal past the smallest that is quantised."""
    return torch.randn(40, columns).clamp(-1, 1) * torch.exp2(torch.arange(-149.0, -109.0))[:, None]


def _grid(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return torch.arange(rows)[:, None], torch.arange(columns)[None, :]
