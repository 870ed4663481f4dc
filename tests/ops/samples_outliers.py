"""Samples of the ops of LLM.int8(): outliers.py, double_quantize.py, mixed_scaled_mm.py and rescale_int32.py."""

import torch
from bfloat16_products import multiply_bfloat16
from hostile import (
    FLOATS,
    Arguments,
    Samples,
    SampleTable,
    cut_out,
    heavy_tailed,
    not_finite,
    rounded_twice,
    ties,
    tiny,
)
from lq_kernels.outliers import quantize_rowwise_outliers
from lq_kernels.rowwise import quantize_rowwise
from torch import Tensor

THRESHOLD = 6.0

multiply_bfloat16()


def with_outliers(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values with large ones in every 13th column, in few of its rows, and with rows of zeros."""
    values = torch.randn(rows, columns).clamp(-5, 5)
    large = (torch.rand(rows, columns) < 0.3) & (torch.arange(columns) % 13 == 5)
    values = torch.where(large, values.sign() * (THRESHOLD + 20 * torch.rand(rows, columns)), values)
    values[rows // 2 : rows // 2 + 1] = 0
    return values.to(dtype)


def at_the_threshold(dtype: torch.dtype) -> Tensor:
    """A threshold and the values around it, alone in their columns; then both signs of it, then small ones."""
    threshold = torch.tensor(THRESHOLD, dtype=dtype)
    infinity = torch.tensor(float("inf"), dtype=dtype)
    around = [torch.nextafter(threshold, -infinity), threshold, torch.nextafter(threshold, infinity)]
    values = torch.randn(5, 8).to(dtype)
    values[torch.arange(3), torch.arange(3)] = torch.stack(around)
    values[3, 4], values[4, 5] = -threshold, around[0]
    return values


def matrices() -> Samples:
    """For ops that take a matrix and a threshold."""
    for dtype in FLOATS:
        yield f"odd size {dtype}", (cut_out(with_outliers(37, 300, dtype)), THRESHOLD)
        yield f"at the threshold {dtype}", (cut_out(at_the_threshold(dtype)), THRESHOLD)
    yield "heavy tails", (cut_out(heavy_tailed(70, 200)), 3.0)
    yield "threshold that is no 16-bit number", (cut_out(heavy_tailed(20, 200, torch.float16)), 2.1)
    yield "a threshold that bfloat16 rounds down", (torch.tensor([[6.1, -3.0]]).bfloat16(), 6.1)
    yield "at a threshold that float32 rounds", (torch.tensor([[2.1, 1.0], [0.5, -2.1]]), 2.1)
    yield "no outliers", (cut_out(torch.randn(37, 100)), 100.0)
    yield "outliers only", (cut_out(heavy_tailed(37, 100)[:-1] + 1), 1e-9)
    yield "every column has one", (cut_out(torch.randn(40, 40) + 9 * torch.eye(40)), THRESHOLD)
    yield "a column of outliers", (cut_out(torch.cat([torch.full((40, 1), 9.0), torch.randn(40, 4)], 1)), THRESHOLD)
    yield "one value", (cut_out(torch.full((1, 1), -3.0)), THRESHOLD)
    yield "one outlier", (cut_out(torch.full((1, 1), -3.0)), 3.0)
    yield "one row", (cut_out(heavy_tailed(2, 37)[:1]), 1.0)
    yield "one row, at the threshold", (torch.tensor([[3.0, -6.0, 1.5, 6.0, 5.5]]), THRESHOLD)
    yield "threshold that float32 rounds to 0", (cut_out(torch.eye(5, 7)), 1e-60)
    yield "one column", (cut_out(with_outliers(1000, 6)[:, 5:]), THRESHOLD)
    yield "contiguous", (with_outliers(64, 256, torch.bfloat16), THRESHOLD)
    yield "transposed", (cut_out(with_outliers(130, 37), "columns"), THRESHOLD)
    yield "every other", (cut_out(with_outliers(37, 130, torch.bfloat16), "every_other"), THRESHOLD)
    yield "expanded", (torch.full((1, 1), 7.0).expand(33, 65), THRESHOLD)
    yield "bands of rows", (cut_out(with_outliers(2100, 33, torch.float16)), THRESHOLD)
    yield "zeros", (torch.zeros(5, 7), THRESHOLD)
    yield "ties", (cut_out(torch.cat([ties(5, 200), torch.full((5, 1), 130.0)], 1)), 128.0)
    yield "rounded twice", (rounded_twice(16, 64), THRESHOLD)
    yield "not finite", (cut_out(not_finite(9, 70)), THRESHOLD)
    yield "NaN beside an outlier", (torch.tensor([[1, 9, float("nan")], [float("nan"), 2, 3], [4, 5, 3]]), THRESHOLD)
    yield "infinities", (torch.tensor([[1, float("inf"), 2], [3, 4, -float("inf")], [4, 5, 3]]), float("inf"))
    yield "tiny", (cut_out(tiny(33)), THRESHOLD)
    yield "no rows", (torch.empty(0, 5), THRESHOLD)
    yield "no columns", (torch.empty(5, 0), THRESHOLD)


def mixed_product(
    M: int, K: int, N: int, dtype: torch.dtype = torch.float32, threshold: float = THRESHOLD, x: Tensor | None = None
) -> Arguments:
    """Arguments of mixed_scaled_mm with the strides that layers use."""
    x = cut_out(with_outliers(M, K, dtype) if x is None else x)
    codes, scale, columns, count = quantize_rowwise_outliers(x, threshold)
    weight_codes, weight_scale = quantize_rowwise(torch.randn(N, K) * torch.exp(torch.randn(N, 1)) / 8)
    return (
        x,
        cut_out(codes),
        scale,
        cut_out(weight_codes),
        weight_scale,
        columns,
        count,
        torch.randn(N).to(dtype),
        dtype,
    )


def mixed_products() -> Samples:
    """For mixed_scaled_mm: sizes that leave tails in every tile, all numbers of outliers, all strides."""
    sizes = {"one value": (1, 1, 1), "odd": (37, 100, 129), "vector": (1, 1000, 37), "even K": (40, 128, 70)}
    for name, (M, K, N) in sizes.items():
        for dtype in FLOATS:
            yield f"{name} {dtype}", mixed_product(M, K, N, dtype)
    for dtype in FLOATS:
        yield f"no outliers {dtype}", mixed_product(37, 70, 40, dtype, threshold=1e4)
        yield f"outliers only {dtype}", mixed_product(37, 70, 40, dtype, threshold=1e-6)
        for count in (1, 15, 16, 17):
            few = torch.randn(20, 40).clamp(-5, 5)
            few[3, :count] = 9
            yield f"{count} outliers {dtype}", mixed_product(20, 40, 33, dtype, x=few.to(dtype))
    x, codes, scale, weight_codes, weight_scale, columns, count, bias, _ = mixed_product(37, 70, 130, torch.float16)
    operands = columns, count
    yield "no bias", (x, codes, scale, weight_codes, weight_scale, *operands, None, torch.float32)
    yield "matrix scale", (x, codes, scale, weight_codes, weight_scale[:1], *operands, bias.float(), torch.bfloat16)
    yield "no K", mixed_product(5, 0, 7, torch.bfloat16)
    yield "no rows", mixed_product(0, 5, 7)
    yield "no columns", mixed_product(5, 7, 0)
    strided = [cut_out(t, "every_other") for t in (x, codes, scale, weight_codes, weight_scale)]
    yield "every other", (*strided, *operands, cut_out(bias[None, :], "every_other")[0], torch.float32)
    turned = [cut_out(t, "columns") for t in (x, codes, scale, weight_codes, weight_scale)]
    yield "columns contiguous", (*turned, *operands, bias, torch.float16)
    many = mixed_product(37, 70, 40, torch.float16, threshold=1e-6)
    yield "many outliers, columns of x contiguous", (cut_out(many[0], "columns"), *many[1:])
    yield "strided columns", (x, *strided[1:], cut_out(columns[None, :], "every_other")[0], count, bias, torch.float32)
    poisoned = with_outliers(9, 70, torch.bfloat16)
    poisoned[1, 3], poisoned[2, 5], poisoned[3, 6] = float("nan"), float("inf"), -float("inf")
    yield "not finite", mixed_product(9, 70, 30, torch.bfloat16, x=poisoned)


def mixed_product_bound(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    columns: Tensor,
    count: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Kernel and reference add the same terms in different orders, then round to out_dtype.

    A sum of n terms in any order is off by at most n u times the sum of their magnitudes; u is 2^-22 where matrix units
    cut off what they align, and there are two sums. The last rounding can go either way: one unit in the last place.
    """
    scaled = (codes.double() @ weight_codes.double().t()).abs() * scale.double() * weight_scale.double().t()
    outliers = columns[: int(count)]
    weight = (weight_codes[:, outliers].float() * weight_scale).to(x.dtype).double()
    magnitude = scaled + x[:, outliers].double().nan_to_num(0, 0, 0).abs() @ weight.t().abs()
    magnitude += 0 if bias is None else bias.double().abs()
    terms = int(count) + 4  # with the integer part, its two products and the bias
    finfo = torch.finfo(out_dtype)
    return 2 * terms * 2.0**-22 * magnitude + finfo.eps * magnitude + finfo.smallest_normal * finfo.eps


def sums() -> Samples:
    """For rescale_int32."""
    for dtype in FLOATS:
        yield f"odd size {dtype}", (*scaled_sums(37, 300), torch.randn(300).to(dtype), dtype)
    total, row_scale, column_scale = scaled_sums(20, 33)
    bias = torch.randn(33)
    yield "no bias", (total, row_scale, column_scale, None, torch.float16)
    yield "matrix scales", (total, row_scale[:1], column_scale[:, :1], bias, torch.bfloat16)
    strided = [cut_out(t, "every_other") for t in (total, row_scale, column_scale, bias[None, :])]
    yield "every other", (*strided[:3], strided[3][0], torch.float32)
    yield "transposed", (cut_out(total, "columns"), row_scale, column_scale, bias, torch.float32)
    yield "expanded", (total[:1].expand(20, 33), row_scale, column_scale, bias, torch.float32)
    extremes = torch.tensor([[2**31 - 1, -(2**31), 2**24 + 1, 2**24 + 3, -(2**24) - 1, 0]], dtype=torch.int32)
    yield "beyond 2^24", (extremes, torch.ones(1, 1), torch.full((1, 6), 3.0), None, torch.float32)
    yield "overflows float16", (total, row_scale * 1e9, column_scale, bias, torch.float16)
    poisoned = torch.where(torch.arange(20)[:, None] == 3, float("nan"), row_scale)
    yield "not finite", (total, poisoned, column_scale, bias, torch.bfloat16)
    yield "one value", (*scaled_sums(1, 1), None, torch.float32)
    yield "no rows", (*scaled_sums(0, 5), None, torch.float32)
    yield "no columns", (*scaled_sums(5, 0), None, torch.float32)


def scaled_sums(M: int, N: int) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.randint(-(2**25), 2**25, (M, N), dtype=torch.int32)
    return cut_out(total), torch.rand(M, 1) / 127, torch.rand(1, N) * torch.exp(torch.randn(1, N)) / 127


SAMPLES: SampleTable = {
    "quantize_rowwise_outliers": matrices,
    "double_quantize": matrices,
    "mixed_scaled_mm": mixed_products,
    "rescale_int32": sums,
}
BOUNDS = {"mixed_scaled_mm": mixed_product_bound}
