"""Samples of the products with 4-bit weights: gemv_4bit.py, small_batch_4bit.py, linear_4bit.py, requantize_4bit.py."""

from collections.abc import Callable

import torch
from bfloat16_products import multiply_bfloat16
from hostile import FLOATS, Arguments, Samples, SampleTable, cut_out, heavy_tailed, not_finite
from lq_kernels.blockwise_4bit import dequantize_4bit, quantize_4bit
from lq_kernels.layout_4bit import QUANT_TYPES
from samples_blockwise_4bit import flat
from samples_rowwise import after_each_third
from torch import Tensor

multiply_bfloat16()

HALVES = (torch.bfloat16, torch.float16)


def weight_4bit(N: int, K: int, block_size: int = 64, quant_type: str = "nf4") -> Arguments:
    """packed, scale, block_size, quant_type, shape of a W of which a row is zeros and others differ in size by far."""
    packed, scale = quantize_4bit(heavy_tailed(N, K) if N * K else torch.empty(N, K), block_size, quant_type)
    return flat(packed), flat(scale), block_size, quant_type, [N, K]


def rows(M: int, K: int, dtype: torch.dtype) -> Tensor:
    return cut_out(torch.randn(M, K).to(dtype))


def any_sizes() -> Samples:
    """For gemv_4bit: rows that begin in the middle of a byte, blocks that cross rows."""
    for dtype in FLOATS:
        for quant_type in QUANT_TYPES:
            yield f"{quant_type}, odd K, {dtype}", (rows(1, 131, dtype), *weight_4bit(37, 131, 64, quant_type))
    yield "bias", (rows(3, 70, torch.float32), *weight_4bit(9, 70, 32), torch.randn(9))
    for dtype in HALVES:
        for M in (1, 2, 3, 5):
            words = weight_4bit(19, 72, 32 if M == 2 else 64, "fp4" if M == 3 else "nf4")
            yield f"{M} of whole words, {dtype}", (rows(M, 72, dtype), *words, torch.randn(19))
    yield "two steps of words", (rows(1, 1032, torch.bfloat16), *weight_4bit(8, 1032))
    yield "whole steps of words", (rows(1, 1024, torch.float16), *weight_4bit(16, 1024))
    yield from ((f"{name}, words", given) for name, given in edges(torch.bfloat16, 72))
    yield "one value", (rows(1, 1, torch.float32), *weight_4bit(1, 1))
    yield "long", (rows(1, 1025, torch.float32), *weight_4bit(3, 1025))
    yield "one dimension", (torch.randn(64), *weight_4bit(5, 64))
    yield "three dimensions", (torch.randn(2, 2, 64), *weight_4bit(5, 64))
    yield from edges(torch.float32, 70)


def edges(dtype: torch.dtype, K: int) -> Samples:
    weight = weight_4bit(10, K)
    yield "every other", (cut_out(torch.randn(2, K).to(dtype), "every_other"), *weight, torch.randn(10).to(dtype))
    yield "no rows", (torch.randn(0, K).to(dtype), *weight)
    yield "no columns", (torch.randn(2, K).to(dtype), *weight_4bit(0, K))
    packed, scale = quantize_4bit(not_finite(10, K), 64)
    yield "not finite", (rows(2, K, dtype), packed, scale, 64, "nf4", [10, K])
    x = rows(2, K, dtype)
    x[1, 3] = float("nan")
    yield "x not finite", (x, *weight)


def whole_words() -> Samples:
    """For small_batch_4bit."""
    for quant_type in QUANT_TYPES:
        for dtype in HALVES:
            yield f"{quant_type}, {dtype}", (rows(5, 192, dtype), *weight_4bit(70, 192, 64, quant_type))
    x = torch.bfloat16
    yield "one row", (rows(1, 64, x), *weight_4bit(64, 64))
    yield "bias", (rows(3, 128, x), *weight_4bit(37, 128), torch.randn(37))
    yield "more rows than a tile", (rows(17, 64, x), *weight_4bit(64, 64))
    yield "split", (rows(3, 1088, x), *weight_4bit(20, 1088), torch.randn(20).to(x))
    yield "long blocks", (rows(2, 512, x), *weight_4bit(8, 512, 256))
    yield "blocks that cross rows", (rows(2, 192, x), *weight_4bit(8, 192, 128))
    yield "kept as float32", (rows(2, 64, x), *kept_as_float32(weight_4bit(8, 64)))
    yield "three dimensions", (torch.randn(2, 2, 64).to(x), *weight_4bit(5, 64))
    yield "one dimension", (torch.randn(64).to(x), *weight_4bit(5, 64))
    yield from edges(x, 128)


def kept_as_float32(weight: Arguments) -> Arguments:
    packed, *others = weight
    return packed.clone().view(-1).view(torch.float32).view(-1, 1), *others


def linears() -> Samples:
    """For linear_4bit: what each kernel takes."""
    yield "small batch", (rows(5, 128, torch.bfloat16), *weight_4bit(37, 128), torch.randn(37).bfloat16())
    yield "one row of odd size", (rows(1, 131, torch.bfloat16), *weight_4bit(37, 131))
    yield "large", (rows(130, 128, torch.bfloat16), *weight_4bit(37, 128), torch.randn(37).bfloat16())
    yield "one row, float32", (rows(1, 64, torch.float32), *weight_4bit(5, 64), torch.randn(5))
    yield "a few of odd size", (rows(3, 131, torch.float16), *weight_4bit(37, 131))
    yield "large, float32", (torch.randn(5, 7, 70), *weight_4bit(37, 70, 32), torch.randn(37))
    yield "short blocks", (rows(3, 128, torch.bfloat16), *weight_4bit(37, 128, 32))
    yield from edges(torch.bfloat16, 128)
    yield "no K", (torch.randn(3, 0), *weight_4bit(5, 0), torch.randn(5))


def gradients() -> Samples:
    """For linear_4bit_grad_input."""
    for dtype in FLOATS:
        yield f"{dtype}", (rows(5, 37, dtype), *weight_4bit(37, 131))
    yield "three dimensions", (torch.randn(2, 3, 8), *weight_4bit(8, 64, 64, "fp4"))
    yield "transposed", (cut_out(torch.randn(5, 37), "columns"), *weight_4bit(37, 64))
    yield "no rows", (torch.randn(0, 37), *weight_4bit(37, 64))
    yield "no columns", (torch.randn(3, 0), *weight_4bit(0, 64))
    packed, scale = quantize_4bit(not_finite(10, 64), 64)
    yield "not finite", (torch.randn(3, 10), packed, scale, 64, "nf4", [10, 64])


def weights() -> Samples:
    """For requantize_4bit."""
    for transposed in (False, True):
        form = "columns" if transposed else "rows"
        yield f"{form}", (*weight_4bit(37, 192), torch.int8, transposed)
        yield f"{form}, fp4, long blocks", (*weight_4bit(65, 256, 128, "fp4"), torch.int8, transposed)
        packed, scale = quantize_4bit(not_finite(10, 128), 64)
        yield f"{form}, not finite", (packed, scale, 64, "nf4", [10, 128], torch.int8, transposed)
        yield f"{form}, tiny", (*with_scale(weight_4bit(5, 64), 1e-38), torch.int8, transposed)
        yield f"{form}, no rows", (*weight_4bit(0, 64), torch.int8, transposed)
        yield f"{form}, no columns", (*weight_4bit(5, 0), torch.int8, transposed)
    yield "kept as float32", kept_as_float32(weight_4bit(8, 64))


def weights_in_fp8() -> Samples:
    for transposed in (False, True):
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            form = "columns" if transposed else "rows"
            yield f"{form}, {dtype}", (*weight_4bit(37, 192), dtype, transposed)
        packed, scale = quantize_4bit(not_finite(10, 128), 64)
        yield f"{form}, e4m3, not finite", (packed, scale, 64, "nf4", [10, 128], torch.float8_e4m3fn, transposed)


def all_weights() -> Samples:
    return after_each_third(list(weights()), list(weights_in_fp8()))


def with_scale(weight: Arguments, factor: float) -> Arguments:
    packed, scale, *others = weight
    return packed, scale * factor, *others


def product_bound(transposed: bool, roundings: int) -> Callable[..., Tensor]:
    """How far two results of x @ W.t() (or x @ W) may be apart.

    Each rounds its result to the dtype of x. So many times in the two of them a value of W, or of its map, was rounded
    to that dtype. Sums of K products in float32 miss by K roundings of the sum of magnitudes, each.
    """

    def bound(
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        block_size: int,
        quant_type: str,
        shape: list[int],
        bias: Tensor | None = None,
    ) -> Tensor:
        weight = dequantize_4bit(packed, scale, block_size, quant_type, shape, torch.float32).double()
        weight = weight if transposed else weight.t()
        out, magnitudes = x.double() @ weight, x.double().abs() @ weight.abs()
        if bias is not None:
            out, magnitudes = out + bias.double(), magnitudes + bias.double().abs()
        unit = torch.finfo(x.dtype).eps / 2
        inexact = magnitudes * (roundings * unit + 2 * (x.shape[-1] + 2) * 2.0**-23)
        return inexact + 2 * unit * (out.abs() + inexact) + torch.finfo(x.dtype).smallest_normal

    return bound


SAMPLES: SampleTable = {
    "gemv_4bit": any_sizes,
    "small_batch_4bit": whole_words,
    "linear_4bit": linears,
    "linear_4bit_grad_input": gradients,
    "requantize_4bit": all_weights,
}
BOUNDS: dict[str, Callable[..., Tensor]] = {
    "gemv_4bit": product_bound(transposed=False, roundings=1),
    "small_batch_4bit": product_bound(transposed=False, roundings=2),
    "linear_4bit": product_bound(transposed=False, roundings=3),
    "linear_4bit_grad_input": product_bound(transposed=True, roundings=2),
}
