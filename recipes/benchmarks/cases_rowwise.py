"""I2: 8-bit codes with one scale for a row, a column or a matrix, and L1's quantisation around outlier columns."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from lq_kernels._op import Op
from lq_kernels.outliers import quantize_rowwise_outliers
from lq_kernels.rowwise import (
    quantize_columnwise,
    quantize_columnwise_transposed,
    quantize_rowwise,
    quantize_tensorwise,
    quantize_tensorwise_transposed,
)
from torch import Tensor

from lq_plugin.recipes.benchmarks import peers
from lq_plugin.recipes.benchmarks.cases import Case, Inputs, Outputs, assert_equal, ends, normal

OUTLIERS, THRESHOLD = 5, 6.0  # outlier columns; LLM.int8(), section 3.2, https://arxiv.org/abs/2208.07339
TYPES = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}

Check = Callable[[Inputs, Outputs], None]


def rowwise_cases(device: torch.device, rows: int, columns: int) -> Iterator[Case]:
    """On a bfloat16 matrix."""
    checks: dict[Op[Any, Any], Callable[[Op[Any, Any], torch.dtype], Check]] = {
        quantize_rowwise: _of_rows,
        quantize_columnwise: _of_columns,
        quantize_columnwise_transposed: _of_columns,
        quantize_tensorwise: _of_all,
        quantize_tensorwise_transposed: _of_all,
    }
    for dtype, name in TYPES.items():
        for op, check in checks.items():
            theirs = op is quantize_rowwise and dtype == torch.int8
            yield Case(
                name="I2",
                op=op.name,
                shape=f"{rows} x {columns}",
                dtype=f"bf16 to {name}",
                make=lambda: (normal(device, rows, columns),),
                ours=partial(_quantized, op, dtype),
                check=check(op, dtype),
                bytes=3 * rows * columns,  # what is read twice counts once
                peers=peers.bitsandbytes(partial(peers.quantize_rows, threshold=0.0)) if theirs else {},
            )
    yield _with_outliers(device, rows, columns)


def _quantized(op: Op[Any, Any], dtype: torch.dtype, x: Tensor) -> Outputs:
    return op(x, dtype)


def _of_rows(op: Op[Any, Any], dtype: torch.dtype) -> Check:
    def check(inputs: Inputs, outputs: Outputs) -> None:
        for some in ends(len(inputs[0])):
            for got, expected in zip(outputs, op.reference(inputs[0][some].cpu(), dtype), strict=True):
                assert_equal(got[some], expected)

    return check


def _of_columns(op: Op[Any, Any], dtype: torch.dtype) -> Check:
    transposed = op.name.endswith("_transposed")

    def check(inputs: Inputs, outputs: Outputs) -> None:
        for some in ends(inputs[0].shape[1]):
            for got, expected in zip(outputs, op.reference(inputs[0][:, some].cpu(), dtype), strict=True):
                assert_equal(got[some] if transposed else got[:, some], expected)

    return check


def _of_all(op: Op[Any, Any], dtype: torch.dtype) -> Check:
    """One scale depends on every value, so the reference takes all of them, where they are."""

    def check(inputs: Inputs, outputs: Outputs) -> None:
        for got, expected in zip(outputs, op.reference(inputs[0], dtype), strict=True):
            assert_equal(got, expected)

    return check


def with_outliers(device: torch.device, rows: int, columns: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Normal values below the threshold, and OUTLIERS columns above it."""
    x = torch.randn(rows, columns, device=device, dtype=dtype).clamp_(1 - THRESHOLD, THRESHOLD - 1)
    x[:, :: columns // OUTLIERS + 1] = THRESHOLD + 2
    return x


def _with_outliers(device: torch.device, rows: int, columns: int) -> Case:
    def check(inputs: Inputs, outputs: Outputs) -> None:
        for got, expected in zip(outputs, quantize_rowwise_outliers.reference(inputs[0], THRESHOLD), strict=True):
            assert_equal(got, expected)

    return Case(
        name="L1",
        op="quantize_rowwise_outliers",
        shape=f"{rows} x {columns}, {OUTLIERS} columns",
        dtype="fp16 to int8",
        make=lambda: (with_outliers(device, rows, columns),),
        ours=lambda x: quantize_rowwise_outliers(x, THRESHOLD),
        check=check,
        bytes=3 * rows * columns,
        peers=peers.bitsandbytes(partial(peers.quantize_rows, threshold=THRESHOLD)),
    )
