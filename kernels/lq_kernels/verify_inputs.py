"""Arguments for every op, a few each, made from matrices that hold what kernels get wrong.

Sizes that fill no tile, rows of zeros, of ties and of subnormal values, NaN and infinities, no rows at all, and memory
around a matrix that is full of infinities, so that a load past its end changes the result.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lq_kernels import (
    blockwise,
    blockwise_4bit,
    double_quantize,
    fake_quantize,
    gemv_4bit,
    gradient_percentile,
    linear_4bit,
    mixed_scaled_mm,
    nearest,
    nested_scales,
    outliers,
    requantize_4bit,
    rescale_int32,
    rowwise,
    rowwise_training,
    scaled_mm,
    small_batch_4bit,
)
from lq_kernels.codebooks import create_fp8_map, dynamic_map

Arguments = tuple[Any, ...]
Cases = Iterator[tuple[str, Arguments]]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCK = 64
OUTLIER = 6.0  # the threshold of LLM.int8()

# Every op's module is imported, so that OPS is full.
MODULES = (
    *(blockwise, blockwise_4bit, double_quantize, fake_quantize, gemv_4bit, gradient_percentile, linear_4bit),
    *(mixed_scaled_mm, nearest, nested_scales, outliers, requantize_4bit, rescale_int32, rowwise, rowwise_training),
    *(scaled_mm, small_batch_4bit),
)


def hostile(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(rows, columns) with heavy tails, a row of zeros, one of ties of int8, one of tiny values; infinities around."""
    random = torch.Generator().manual_seed(rows * columns)
    values = torch.randn(rows, columns, generator=random) * torch.exp(2 * torch.randn(rows, 1, generator=random))
    values[:1] = 0
    values[1:2] = torch.randint(-126, 126, (columns,), generator=random) + 0.5
    values[1:2, :1] = 127  # the scale is 1
    values[2:3] *= 2.0**-125
    buffer = torch.full((rows + 2, columns + 8), float("inf"), dtype=dtype)
    buffer[1 : rows + 1, 4:-4] = values.clamp(-60000, 60000).to(dtype)
    return buffer[1 : rows + 1, 4:-4]


def not_finite(rows: int, columns: int) -> Tensor:
    values = hostile(rows, columns)
    values[3, columns // 2] = float("nan")
    values[4, columns - 1] = -float("inf")
    return values


MATRICES: dict[str, Callable[[], Tensor]] = {
    "odd": lambda: hostile(37, 1000),
    "not finite": lambda: not_finite(37, 1000),
    "large": lambda: hostile(256, 1024, torch.bfloat16),
    "no rows": lambda: hostile(0, 1000),
}


def is_large(x: Tensor) -> bool:
    """Of the large matrix more is asked, since a kernel for each of its options is compiled once."""
    return x.dtype == torch.bfloat16


def weight(x: Tensor) -> Tensor:
    """(65, K) for a product with x (M, K)."""
    return hostile(65, x.shape[1])


def bias(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, 65).to(x.dtype)


def filled(*tensors: Tensor) -> Arguments:
    """Of the same forms, for an op to write over."""
    return tuple(torch.full_like(tensor, 77) for tensor in tensors)


def to_8_bits(x: Tensor) -> Cases:
    yield "", (x,)
    if is_large(x):
        yield ", to e4m3, stochastic", (x, E4M3, "stochastic", torch.tensor([7]))


def with_amax(x: Tensor) -> Cases:
    amax = x.abs().amax(dim=0, keepdim=True) if x.shape[0] else x.new_zeros(1, x.shape[1])
    yield "", (x, amax.float())


def both_ways(x: Tensor) -> Cases:
    yield "", (x, torch.int8, "nearest", None, False, True)


def from_8_bits(x: Tensor) -> Cases:
    yield "", (*rowwise.quantize_rowwise.reference(x), x.dtype)
    if is_large(x):
        yield ", from e4m3", (*rowwise.quantize_rowwise.reference(x, E4M3), x.dtype)


def outlier_inputs(x: Tensor) -> Cases:
    yield "", (x, OUTLIER)


def int8_operands(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes (M, K) and (K, 65), scales (M, 1) and (1, 65)."""
    (a, scale_a), (b, scale_b) = (rowwise.quantize_rowwise.reference(t) for t in (x, weight(x)))
    return a, b.t(), scale_a, scale_b.t()


def scaled_products(x: Tensor) -> Cases:
    """fp8 operands are small whole numbers, whose sums every accumulator holds exactly."""
    a, b, scale_a, scale_b = int8_operands(x)
    yield "", (a, b, scale_a, scale_b, bias(x), x.dtype)
    if is_large(x):
        small_a, small_b = a.remainder(5).float() - 2, b.remainder(5).float() - 2
        for types in ((E4M3, E4M3), (E5M2, E4M3)):
            fp8 = [value.to(dtype) for value, dtype in zip((small_a, small_b.t()), types, strict=True)]
            name = " and ".join(str(dtype).removeprefix("torch.float8_") for dtype in types)
            yield f", {name}", (fp8[0], fp8[1].t(), scale_a, scale_b, bias(x), x.dtype)


def int8_products(x: Tensor) -> Cases:
    yield "", int8_operands(x)[:2]


def mixed_products(x: Tensor) -> Cases:
    codes, scale, columns, count = outliers.quantize_rowwise_outliers.reference(x, OUTLIER)
    yield "", (x, codes, scale, *rowwise.quantize_rowwise.reference(weight(x)), columns, count, bias(x), x.dtype)


def int32_sums(x: Tensor) -> Cases:
    a, b, scale_a, scale_b = int8_operands(x)
    yield "", (scaled_mm.int8_mm.reference(a, b), scale_a, scale_b, bias(x), x.dtype)


SIGNED = dynamic_map("dynamic_symmetric")


def blocks(x: Tensor) -> Cases:
    yield "", (x, SIGNED)
    if is_large(x):
        yield ", a map that is searched", (x, create_fp8_map(), BLOCK)


def blocks_with_out(x: Tensor) -> Cases:
    yield "", (x, SIGNED, BLOCK, *filled(*blockwise.quantize_blockwise.reference(x, SIGNED, BLOCK)))


def block_codes(x: Tensor) -> Cases:
    yield "", (*blockwise.quantize_blockwise.reference(x, SIGNED, BLOCK), SIGNED, BLOCK, x.dtype)


def block_codes_with_out(x: Tensor) -> Cases:
    codes, scale = blockwise.quantize_blockwise.reference(x, SIGNED, BLOCK)
    yield "", (codes, scale, SIGNED, BLOCK, *filled(x.contiguous()))


def values(x: Tensor) -> Cases:
    yield "", (x, SIGNED)


def values_with_out(x: Tensor) -> Cases:
    yield "", (x, SIGNED, *filled(nearest.quantize_values.reference(x, SIGNED)))


def value_codes(x: Tensor) -> Cases:
    yield "", (nearest.quantize_values.reference(x, SIGNED), SIGNED, x.dtype)


def value_codes_with_out(x: Tensor) -> Cases:
    yield "", (nearest.quantize_values.reference(x, SIGNED), SIGNED, *filled(x.contiguous()))


def fake_blocks(x: Tensor) -> Cases:
    yield "", (x, SIGNED, BLOCK, x.shape[1])


def four_bits(x: Tensor) -> Cases:
    for quant_type in ("nf4", "fp4"):
        yield f", {quant_type}", (x, BLOCK, quant_type)


def four_bits_with_out(x: Tensor) -> Cases:
    yield "", (x, BLOCK, "nf4", *filled(*blockwise_4bit.quantize_4bit.reference(x, BLOCK)))


def packed(x: Tensor, quant_type: str = "nf4") -> Arguments:
    """packed, scale, block size, type and shape of x in 4 bits."""
    return *blockwise_4bit.quantize_4bit.reference(x, BLOCK, quant_type), BLOCK, quant_type, list(x.shape)


def packed_values(x: Tensor) -> Cases:
    for quant_type in ("nf4", "fp4"):
        yield f", {quant_type}", (*packed(x, quant_type), x.dtype)


def packed_values_with_out(x: Tensor) -> Cases:
    yield "", (*packed(x)[:-1], *filled(x.contiguous()))


def double_packed(x: Tensor) -> Cases:
    yield "", (*nested_scales.quantize_4bit_double.reference(x), BLOCK, "nf4", list(x.shape), x.dtype)


def double_packed_with_out(x: Tensor) -> Cases:
    given = nested_scales.quantize_4bit_double.reference(x)
    yield "", (*given, BLOCK, "nf4", *filled(x.contiguous()))


def scales(x: Tensor) -> Cases:
    yield "", (x.float().abs().flatten()[:5003],)


def scale_codes(x: Tensor) -> Cases:
    yield "", nested_scales.quantize_scales.reference(x.float().abs().flatten()[:5003])


def linears(x: Tensor) -> Cases:
    yield "", (x, *packed(weight(x)), bias(x))


def few_rows(x: Tensor) -> Cases:
    """The same for the kernels that are made for few rows."""
    yield "", (x[:5], *packed(weight(x)), bias(x))


def few_rows_of_16_bits(x: Tensor) -> Cases:
    if is_large(x):
        yield from few_rows(x)


def linear_gradients(x: Tensor) -> Cases:
    yield "", (x[:, :65], *packed(weight(x)))


def requantized(x: Tensor) -> Cases:
    whole_blocks = packed(x[:, : x.shape[1] // BLOCK * BLOCK])
    yield "", (*whole_blocks, torch.int8, False)
    if is_large(x):
        yield ", transposed", (*whole_blocks, torch.int8, True)
        yield ", to e4m3", (*whole_blocks, E4M3, False)


def gradients(x: Tensor) -> Cases:
    """Norms of 1 at most; the norm before was recorded in step 299."""
    norm = x.float().nan_to_num(0, 0, 0).norm().clamp(min=1)
    history = 0.2 + torch.rand(100, generator=torch.Generator().manual_seed(0))
    yield "", ((x.float() / norm).to(x.dtype), history, torch.empty(3), 300, 5)


INPUTS: dict[str, Callable[[Tensor], Cases]] = {
    "quantize_rowwise": to_8_bits,
    "quantize_columnwise": to_8_bits,
    "quantize_columnwise_transposed": to_8_bits,
    "quantize_tensorwise": to_8_bits,
    "quantize_tensorwise_transposed": to_8_bits,
    "quantize_rowwise_column_amax": to_8_bits,
    "quantize_tensorwise_amax": both_ways,
    "quantize_transposed": with_amax,
    "dequantize_rowwise": from_8_bits,
    "scaled_mm": scaled_products,
    "int8_mm": int8_products,
    "quantize_rowwise_outliers": outlier_inputs,
    "double_quantize": outlier_inputs,
    "mixed_scaled_mm": mixed_products,
    "rescale_int32": int32_sums,
    "quantize_blockwise": blocks,
    "quantize_blockwise_out": blocks_with_out,
    "dequantize_blockwise": block_codes,
    "dequantize_blockwise_out": block_codes_with_out,
    "quantize_values": values,
    "quantize_values_out": values_with_out,
    "dequantize_values": value_codes,
    "dequantize_values_out": value_codes_with_out,
    "fake_quantize_blockwise": fake_blocks,
    "fake_quantize_tensorwise": values,
    "quantize_4bit": four_bits,
    "quantize_4bit_out": four_bits_with_out,
    "dequantize_4bit": packed_values,
    "dequantize_4bit_out": packed_values_with_out,
    "quantize_4bit_double": four_bits,
    "dequantize_4bit_double": double_packed,
    "dequantize_4bit_double_out": double_packed_with_out,
    "quantize_scales": scales,
    "dequantize_scales": scale_codes,
    "gemv_4bit": few_rows,
    "small_batch_4bit": few_rows_of_16_bits,
    "linear_4bit": linears,
    "linear_4bit_grad_input": linear_gradients,
    "requantize_4bit": requantized,
    "record_gradient_norm": gradients,
}


def cases(op: str) -> Cases:
    for name, matrix in MATRICES.items():
        for more, arguments in INPUTS[op](matrix()):
            yield f"{name}{more}", arguments
