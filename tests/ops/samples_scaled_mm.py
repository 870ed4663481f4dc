"""Samples of scaled_mm.py's ops."""

from collections.abc import Callable
from itertools import product as pairs

import torch
from hostile import FLOATS, Arguments, Samples, SampleTable, cut_out
from samples_rowwise import after_each_third
from torch import Tensor

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def products() -> Samples:
    """For scaled_mm: sizes that leave tails in every tile, all forms of scales, every stride order."""
    sizes = {"one value": (1, 1, 1), "odd": (37, 100, 129), "vector": (1, 1000, 37), "even K": (40, 128, 70)}
    for name, (M, K, N) in sizes.items():
        for dtype in FLOATS:
            yield f"{name} {dtype}", product(M, K, N, dtype)
    a, b, scale_a, scale_b, bias, _ = product(37, 70, 130)
    yield "no bias", (a, b, scale_a, scale_b, None, torch.bfloat16)
    yield "matrix scale of b", (a, b, scale_a, scale_b[:, :1], bias, torch.bfloat16)
    yield "matrix scales", (a, b, scale_a[:1], scale_b[:, :1], None, torch.float32)
    yield (
        "strided scales and bias",
        (
            a,
            b,
            cut_out(scale_a, "every_other"),
            cut_out(scale_b, "every_other"),
            cut_out(bias[None, :], "every_other")[0],
            torch.float16,
        ),
    )
    yield "rows of b contiguous", (a, cut_out(b), scale_a, scale_b, bias, torch.float32)
    yield "columns of a contiguous", (cut_out(a, "columns"), cut_out(b), scale_a, scale_b, bias, torch.float32)
    yield "every other", (cut_out(a, "every_other"), cut_out(b, "every_other"), scale_a, scale_b, bias, torch.float32)
    yield "expanded", (a[:1].expand(37, 70), b[:, :1].expand(70, 130), scale_a, scale_b, bias, torch.float32)
    extremes = torch.full((3, 4000), -128, dtype=torch.int8)
    yield "extremes", (cut_out(extremes), cut_out(extremes).t(), scale_a[:3], scale_b[:, :3], None, torch.float32)
    poisoned = scale_a.clone()
    poisoned[:2, 0] = torch.tensor([float("nan"), float("inf")])
    yield "not finite", (a, b, poisoned, scale_b, bias, torch.bfloat16)
    yield "overflows float16", (a, b, scale_a * 1e6, scale_b, bias, torch.float16)
    yield "precise", (a, b, scale_a, scale_b, bias, torch.float32, "precise")
    yield "no K", (a[:, :0], b[:0], scale_a, scale_b, bias, torch.bfloat16)
    yield "no K, no bias", (a[:, :0], b[:0], scale_a, scale_b, None, torch.bfloat16)
    yield "no rows", (a[:0], b, scale_a[:0], scale_b, bias, torch.bfloat16)
    yield "no columns", (a, b[:, :0], scale_a, scale_b[:, :0], bias[:0], torch.bfloat16)


def product(M: int, K: int, N: int, dtype: torch.dtype = torch.float32) -> Arguments:
    """Arguments of scaled_mm with the strides that the layers use: rows of a and columns of b contiguous."""
    a = cut_out(torch.randint(-127, 128, (M, K), dtype=torch.int8))
    b = cut_out(torch.randint(-127, 128, (K, N), dtype=torch.int8), "columns")
    return a, b, *_scales_and_bias(M, N, dtype), dtype


def fp8_products() -> Samples:
    """For scaled_mm: every pair of types, then what strides and masks can get wrong."""
    for types, accumulation in pairs(pairs(FP8, FP8), ("fast", "precise")):
        name = " and ".join(str(dtype).removeprefix("torch.float8_") for dtype in types)
        yield f"{name}, {accumulation}", (*fp8_product(37, 200, 129, types), accumulation)
    mixed = (FP8[1], FP8[0])
    yield "fp8, one value", fp8_product(1, 1, 1, mixed, torch.bfloat16)
    yield "fp8, even K", fp8_product(40, 256, 70, mixed, torch.float16)
    a, b, scale_a, scale_b, bias, dtype = fp8_product(37, 70, 130, mixed)
    yield "fp8, no bias", (a, b, scale_a, scale_b, None, torch.bfloat16)
    yield "fp8, matrix scales", (a, b, scale_a[:1], scale_b[:, :1], None, torch.float32)
    yield "fp8, rows of b contiguous", (a, cut_out_fp8(b), scale_a, scale_b, bias, dtype)
    yield "fp8, columns of a contiguous", (cut_out_fp8(a, "columns"), b, scale_a, scale_b, bias, dtype)
    yield "fp8, every other", (cut_out_fp8(a, "every_other"), b, scale_a, scale_b, bias, dtype)
    poisoned = a.clone()
    poisoned.view(torch.uint8)[3, 69] = 0x7F  # NaN
    yield "fp8, not finite", (poisoned, b, scale_a, scale_b, bias, dtype)
    yield "fp8, no K", (a[:, :0], b[:0], scale_a, scale_b, bias, torch.bfloat16)


def fp8_product(
    M: int, K: int, N: int, types: tuple[torch.dtype, torch.dtype], dtype: torch.dtype = torch.float32
) -> Arguments:
    a, b = (torch.randn(M, K) * torch.exp(2 * torch.randn(M, K)), torch.randn(K, N) * torch.exp(2 * torch.randn(K, N)))
    a, b = a.clamp(-448, 448).to(types[0]), b.clamp(-448, 448).to(types[1])
    return cut_out_fp8(a), cut_out_fp8(b, "columns"), *_scales_and_bias(M, N, dtype), dtype


def cut_out_fp8(values: Tensor, strides_of: str = "rows") -> Tensor:
    """`cut_out`, with NaN or infinities around the values."""
    view = cut_out(values.float(), strides_of)
    buffer = view._base
    assert buffer is not None
    return buffer.to(values.dtype).as_strided(view.shape, view.stride(), view.storage_offset())


def _scales_and_bias(M: int, N: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    scale_a, scale_b = torch.rand(M, 1) * torch.exp(torch.randn(M, 1)) / 127, torch.rand(1, N) / 127
    return scale_a, scale_b, torch.randn(N).to(dtype)


def scaled_products() -> Samples:
    return after_each_third(list(products()), list(fp8_products()))


def sums() -> Samples:
    """For int8_mm."""
    for name, (a, b, *_) in products():
        yield name, (a, b)


def bound(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    accumulation: str = "fast",
) -> Tensor:
    """How far a kernel may be from the reference: int8 not at all, fp8 as far as `sum_bound` lets two results round."""
    if a.dtype == torch.int8:
        return torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64)
    sums, errors = sum_bound(a.double(), b.double(), accumulation)
    scaled, error = (x * (scale_a.double() * scale_b.double()) for x in (sums, errors))
    out = (scaled if bias is None else scaled + bias.double()).abs() + error
    # In each of the two: the cast, two products and the bias, then the cast to out_dtype.
    roundings = 4 * 2.0**-24 * (scaled.abs() + error + out) + torch.finfo(out_dtype).eps / 2 * out
    return error + 2 * roundings + torch.finfo(out_dtype).smallest_normal


def sum_bound(a: Tensor, b: Tensor, accumulation: str) -> tuple[Tensor, Tensor]:
    """a @ b in float64 and by how much matrix units, and the float32 reference, may miss it.

    The units align 32 products and the running sum to the largest and keep 14 bits of each, so that each of the 33
    loses less than 2^-12 of the largest (2^-13 of the power of two above it). https://arxiv.org/abs/2412.19437, 3.5.2.
    "precise" starts a running sum at each multiple of 256, 128 or 64; their float32 sums are as exact as
    the reference: K roundings of at most 2^-24 of the sum of magnitudes.
    """
    K = a.shape[1]
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64)
    of_64, of_128, of_256, errors = (total.clone() for _ in range(4))
    for start in range(0, K, 32):
        x, y = a[:, start : start + 32], b[start : start + 32]
        products = (x.abs()[:, :, None] * y.abs()[None]).amax(1)
        if accumulation == "precise":
            of_64 = of_64 * (start % 64 > 0)
            of_128 = of_128 * (start % 128 > 0)
            of_256 = of_256 * (start % 256 > 0)
        largest = torch.maximum(torch.maximum(of_64.abs(), of_128.abs()), of_256.abs())
        running = largest if accumulation == "precise" else total.abs()
        errors += 33 * 2.0**-12 * torch.maximum(products, running + errors)
        step = x @ y
        total, of_64, of_128, of_256 = total + step, of_64 + step, of_128 + step, of_256 + step
    return total, errors + 2 * K * 2.0**-24 * (a.abs() @ b.abs())


SAMPLES: SampleTable = {"scaled_mm": scaled_products, "int8_mm": sums}
BOUNDS: dict[str, Callable[..., Tensor]] = {"scaled_mm": bound}
