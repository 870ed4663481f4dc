"""How a matrix becomes an operand of a product: codes that lie along what is summed, and what two products share.

A product a (M, K) @ b (K, N) takes the rows of a and the columns of b, both along K. Each tensor of a linear layer is
an operand of two products, once by its rows and once by its columns:

    tensor            by rows, in    by columns, in
    input (T, I)      output         grad_weight
    weight (O, I)     output         grad_input
    grad_output (T, O) grad_input    grad_weight

`Sides` makes the first and keeps what spares the second a reading: the amax, or the codes written both ways at once.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from lq_kernels.rowwise import (
    quantize_columnwise_transposed,
    quantize_rowwise,
    quantize_tensorwise,
    quantize_tensorwise_transposed,
)
from lq_kernels.rowwise_training import (
    dequantize_rowwise,
    quantize_rowwise_column_amax,
    quantize_tensorwise_amax,
    quantize_transposed,
)
from torch import Tensor


class Lines(NamedTuple):
    """An operand (R, K) whose rows lie along what is summed: values, or codes and a scale (R, 1) or (1, 1)."""

    values: Tensor
    scale: Tensor | None = None


class OperandFormat(Protocol):
    """x (R, K) of any strides -> Lines."""

    def lines(self, x: Tensor) -> Lines: ...


@dataclass(frozen=True)
class Unquantized:
    """The values as they are."""

    def lines(self, x: Tensor) -> Lines:
        return Lines(x)


UNQUANTIZED = Unquantized()


@dataclass(frozen=True)
class Quantized:
    """8-bit codes, with one scale for each row or for all.

    power_of_two: scales are rounded up to powers of two. stochastic: rounding whose expectation is the value, with
    bits from torch's generator.
    """

    dtype: torch.dtype
    scale: Literal["rowwise", "tensorwise"]
    stochastic: bool = False
    power_of_two: bool = False

    def lines(self, x: Tensor) -> Lines:
        arguments = self.arguments(x)
        if _lies_along_columns(x):
            by_row, by_tensor, x = quantize_columnwise_transposed, quantize_tensorwise_transposed, x.t()
        else:
            by_row, by_tensor = quantize_rowwise, quantize_tensorwise
        return Lines(*(by_row if self.scale == "rowwise" else by_tensor)(x, *arguments))

    def arguments(self, x: Tensor) -> tuple[torch.dtype, str, Tensor | None, bool]:
        """dtype, rounding, seed and power_of_two of the ops; each call draws another seed."""
        if self.stochastic:
            seed = torch.randint(_SEEDS, (1,), device=x.device)
            return self.dtype, "stochastic", seed, self.power_of_two
        return self.dtype, "nearest", None, self.power_of_two


_SEEDS = 2**62


@dataclass(frozen=True)
class Sides:
    """The operand that the rows of a tensor (R, C) become, and the one that its columns become.

    keeps: what lies between the two: the tensor, its codes (where both have one scale and the same type), or its codes
    by row, from which the second takes the values again.
    """

    rows: OperandFormat
    columns: OperandFormat
    keeps: Literal["tensor", "codes", "rows"] = "tensor"

    def first(self, x: Tensor, later: bool) -> tuple[Lines, tuple[Tensor, ...]]:
        """x (R, C) -> its rows, and what `second` takes; that is nothing where there is no `later`."""
        rows, columns = self.rows, self.columns
        if not later:
            return rows.lines(x), ()
        if self.keeps == "rows":
            lines = rows.lines(x)
            assert lines.scale is not None
            return lines, (lines.values, lines.scale)
        if not isinstance(rows, Quantized) or not isinstance(columns, Quantized) or _lies_along_columns(x):
            return rows.lines(x), (x,)
        if rows.scale == columns.scale == "rowwise":
            codes, scale, amax = quantize_rowwise_column_amax(x, *rows.arguments(x))
            return Lines(codes, scale), (x, amax)
        if rows == columns:
            both = self.keeps == "codes"
            codes, scale, amax, transposed = quantize_tensorwise_amax(x, *rows.arguments(x), both)
            return Lines(codes, scale), (transposed, scale) if both else (x, amax)
        return rows.lines(x), (x,)

    def second(self, kept: tuple[Tensor, ...], dtype: torch.dtype) -> Lines:
        """What `first` kept -> the columns, (C, R); values that are taken from codes again have `dtype`."""
        x, *more = kept
        if self.keeps == "rows":
            return self.columns.lines(dequantize_rowwise(x, more[0], dtype).t())
        if not more:
            return self.columns.lines(x.t())
        if x.dtype.itemsize == 1:
            return Lines(x, more[0])
        assert isinstance(self.columns, Quantized)
        return Lines(*quantize_transposed(x, more[0], *self.columns.arguments(x)))

    def both(self, x: Tensor, with_rows: bool, with_columns: bool) -> tuple[Lines | None, Lines | None]:
        """x (R, C) -> its rows and its columns, as far as they are asked for."""
        if with_rows and with_columns:
            kept: tuple[Tensor, ...]
            rows, kept = self.first(x, later=True)
            return rows, self.second(kept, x.dtype)
        return (
            self.rows.lines(x) if with_rows else None,
            self.columns.lines(x.t()) if with_columns else None,
        )


def _lies_along_columns(x: Tensor) -> bool:
    return x.stride(0) == 1 and x.stride(1) != 1
