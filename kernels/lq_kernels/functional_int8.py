"""bitsandbytes' int8 functions of LLM.int8(), by its names; statistics are plain maxima: A = codes * row_stats / 127.

Nothing here waits for the device but one thing: an int64 tensor of outlier columns has as many entries as there are
outliers, so whoever asks for it waits. `int8_mixed_scaled_mm` also takes the columns as `quantize_rowwise_outliers`
lists them, and then nothing waits.
"""

import torch
from torch import Tensor

from lq_kernels import scaled_mm
from lq_kernels.double_quantize import double_quantize
from lq_kernels.functional_arguments import (
    absmax_of,
    check_devices,
    check_dtype,
    check_float,
    check_stats,
    check_threshold,
    rows_of,
    scale_of,
    written,
)
from lq_kernels.mixed_scaled_mm import mixed_scaled_mm
from lq_kernels.outliers import quantize_rowwise_outliers
from lq_kernels.rescale_int32 import rescale_int32
from lq_kernels.rowwise import quantize_columnwise_transposed, quantize_rowwise

OutlierColumns = Tensor | tuple[Tensor, Tensor]


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """A (..., K) float -> codes int8 of its shape, row_stats (rows,) float32, and the outlier columns.

    With a threshold above 0, columns that hold an |a| >= threshold have the codes 0, and are returned, ascending, as
    int64 (waits for the device); None without one. row_stats leaves the outliers out. A zero row has row_stats 0.
    ValueError: a negative threshold, a dtype that is not float32, bfloat16 or float16.
    """
    check_float(A, "int8_vectorwise_quant")
    check_threshold(threshold)
    rows = rows_of(A)
    if not threshold:
        codes, scale = quantize_rowwise(rows)
        return codes.view(A.shape), absmax_of(scale, A.dtype), None
    codes, scale, columns, count = quantize_rowwise_outliers(rows, threshold)
    return codes.view(A.shape), absmax_of(scale, A.dtype), _listed(columns, count)


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """A (..., K) int8, stats (rows,) float32 -> A * stats / 127 of its row, float32 of A's shape."""
    check_dtype(A, torch.int8, "A")
    rows = rows_of(A)
    check_stats(stats, len(rows), "stats")
    return (rows.float() * scale_of(stats)).view(A.shape)


def int8_linear_matmul(A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.int32) -> Tensor:
    """A (..., K) int8, B (N, K) int8 -> A @ B.t() (..., N) int32, exact. No other dtype is defined: ValueError."""
    check_dtype(A, torch.int8, "A")
    check_dtype(B, torch.int8, "B")
    _check_weight(A, B)
    if dtype != torch.int32:
        raise ValueError(f"int8_linear_matmul gives int32, not {dtype}: cast the result")
    total = scaled_mm.int8_mm(rows_of(A), B.t())
    return written(total.view(*A.shape[:-1], len(B)), out)


def int8_mm_dequant(
    A: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """A (..., N) int32 -> A * row_stats / 127 * col_stats / 127 + bias, float16 or of the dtype of `out`, in A's shape.

    row_stats (rows,), col_stats (N,) float32; bias (N,) float. Everything is float32 and rounded once, so that a
    bfloat16 or float32 result does not overflow where float16 would.
    """
    check_dtype(A, torch.int32, "A")
    rows = rows_of(A)
    check_stats(row_stats, len(rows), "row_stats")
    check_stats(col_stats, A.shape[-1], "col_stats")
    dtype = torch.float16 if out is None else out.dtype
    result = rescale_int32(rows, scale_of(row_stats), scale_of(col_stats).t(), bias, dtype)
    return written(result.view(A.shape), out)


def int8_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """int8_linear_matmul and int8_mm_dequant in one: (..., N) in `dtype`, None is float16."""
    check_dtype(A, torch.int8, "A")
    check_dtype(B, torch.int8, "B")
    _check_weight(A, B)
    rows = rows_of(A)
    check_stats(row_stats, len(rows), "row_stats")
    check_stats(col_stats, len(B), "col_stats")
    scale_a, scale_b = scale_of(row_stats), scale_of(col_stats).t()
    result = scaled_mm.scaled_mm(rows, B.t(), scale_a, scale_b, bias, dtype or torch.float16)
    return result.view(*A.shape[:-1], len(B))


def int8_mixed_scaled_mm(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: OutlierColumns | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """int8_scaled_mm in A's dtype plus, in floats, the outlier columns: A[:, cols] @ dequantised CB[:, cols].t().

    A (..., K) float; CA (..., K), CB (N, K) int8; SCA (rows,), SCB (N,) float32. outlier_cols is the int64 tensor of
    `int8_vectorwise_quant`, or the pair (columns, count) of `quantize_rowwise_outliers`, with which nothing waits for
    the device. Also returns A[:, cols], which needs the number of columns: None with the pair and without outlier_cols.
    """
    check_float(A, "int8_mixed_scaled_mm")
    if outlier_cols is None:
        return int8_scaled_mm(CA, CB, SCA, SCB, bias, A.dtype), None
    rows = rows_of(A)
    columns, count = outlier_cols if isinstance(outlier_cols, tuple) else _counted(outlier_cols, A.shape[-1])
    _check_weight(A, CB)
    if CA.shape != A.shape:
        raise ValueError(f"CA, the codes of A, must have its shape {tuple(A.shape)}, got {tuple(CA.shape)}")
    check_stats(SCA, len(rows), "SCA")
    check_stats(SCB, len(CB), "SCB")
    result = mixed_scaled_mm(rows, rows_of(CA), scale_of(SCA), CB, scale_of(SCB), columns, count, bias, A.dtype)
    sub_A = None if isinstance(outlier_cols, tuple) else rows.index_select(1, outlier_cols)
    return result.view(*A.shape[:-1], len(CB)), sub_A


def int8_double_quant(
    A: Tensor,
    col_stats: Tensor | None = None,
    row_stats: Tensor | None = None,
    out_col: Tensor | None = None,
    out_row: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """A (..., K) float -> codes by row and codes by column, both int8 of A's shape, row_stats, col_stats, outliers.

    col_stats is (K,) float32; the rest as in `int8_vectorwise_quant`, for columns as for rows. The codes by column lie
    transposed in memory, as the product that takes them wants. The tensors that are given are written and returned.
    """
    check_float(A, "int8_double_quant")
    check_threshold(threshold)
    rows = rows_of(A)
    if threshold:
        by_row, by_column, scale, column_scale, columns, count = double_quantize(rows, threshold)
        outlier_cols: Tensor | None = _listed(columns, count)
    else:
        by_row, scale = quantize_rowwise(rows)
        by_column, column_scale = quantize_columnwise_transposed(rows)
        outlier_cols = None
    return (
        written(by_row.view(A.shape), out_row, "out_row"),
        written(by_column.t().reshape(A.shape) if A.ndim != 2 else by_column.t(), out_col, "out_col"),
        written(absmax_of(scale, A.dtype), row_stats, "row_stats"),
        written(absmax_of(column_scale, A.dtype), col_stats, "col_stats"),
        outlier_cols,
    )


def _listed(columns: Tensor, count: Tensor) -> Tensor:
    """The int64 tensor of outlier columns; waits for the device."""
    return columns[: int(count)].long()


def _counted(outlier_cols: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """(columns, count) as `quantize_rowwise_outliers` gives them."""
    columns = outlier_cols.new_full((K,), K, dtype=torch.int32)
    columns[: len(outlier_cols)] = outlier_cols
    return columns, outlier_cols.new_full((1,), len(outlier_cols), dtype=torch.int32)


def _check_weight(A: Tensor, B: Tensor) -> None:
    if B.ndim != 2 or A.shape[-1] != B.shape[1]:
        raise ValueError(f"expected A (..., K) and B (N, K), got {tuple(A.shape)} and {tuple(B.shape)}")
    check_devices(A, B=B)
