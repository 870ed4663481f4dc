"""I1 and F1, products of 8-bit matrices with scales in the epilogue, and L1, the linear layer of LLM.int8()."""

from collections.abc import Iterator
from functools import partial

import torch
from lq_kernels.mixed_scaled_mm import mixed_scaled_mm
from lq_kernels.outliers import quantize_rowwise_outliers
from lq_kernels.rowwise import quantize_rowwise
from lq_kernels.scaled_mm import scaled_mm
from torch import Tensor

from lq_plugin.recipes.benchmarks import peers
from lq_plugin.recipes.benchmarks.cases import Case, Inputs, Outputs, assert_close, assert_equal, ends
from lq_plugin.recipes.benchmarks.cases_rowwise import THRESHOLD, with_outliers

# Relative errors of sums of fp8 products, https://arxiv.org/abs/2412.19437, section 3.5.2, and of bfloat16 results.
FP8_ERROR, BF16_ERROR, FP16_ERROR = 1e-2, 2.0**-8, 2.0**-10

Size = tuple[int, int, int]


def product_cases(device: torch.device, sizes: list[Size], linears: list[Size]) -> Iterator[Case]:
    """Products of (M, N, K), and linears of (tokens, in_features, out_features)."""
    for size in sizes:
        yield _int8_product(device, *size)
    for size in sizes:
        for accumulation in ("fast", "precise"):
            yield _fp8_product(device, *size, accumulation)
    for size in linears:
        for outliers in (False, True):
            yield _linear(device, *size, outliers)


def _int8(device: torch.device, *shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)


def _scales(device: torch.device, M: int, N: int) -> tuple[Tensor, Tensor]:
    return torch.rand(M, 1, device=device) / 127, torch.rand(1, N, device=device) / 127


def _int8_product(device: torch.device, M: int, N: int, K: int) -> Case:
    def check(inputs: Inputs, out: Outputs) -> None:
        a, b, scale_a, scale_b = (tensor.cpu() for tensor in inputs)
        for some in ends(M):
            assert_equal(out[some], scaled_mm.reference(a[some], b, scale_a[some], scale_b, None, torch.bfloat16))

    return Case(
        name="I1",
        op="scaled_mm",
        shape=f"{M} x {N} x {K}",
        dtype="int8 to bf16",
        make=lambda: (_int8(device, M, K), _int8(device, N, K).t(), *_scales(device, M, N)),
        ours=partial(scaled_mm, bias=None, out_dtype=torch.bfloat16),
        check=check,
        bytes=M * K + N * K + 2 * M * N,
        operations=2 * M * N * K,
        bits=8,
        peers={"_int_mm": peers.int_mm, "bf16": peers.bfloat16_mm},
    )


def _fp8_product(device: torch.device, M: int, N: int, K: int, accumulation: str) -> Case:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(torch.float8_e4m3fn)

    def check(inputs: Inputs, out: Outputs) -> None:
        a, b, scale_a, scale_b = (tensor.cpu() for tensor in inputs)
        for some in ends(M):
            assert_close(out[some], a[some].float() @ b.float() * scale_a[some] * scale_b, FP8_ERROR)

    return Case(
        name="F1",
        op=f"scaled_mm, {accumulation}",
        shape=f"{M} x {N} x {K}",
        dtype="e4m3 to bf16",
        make=lambda: (random(M, K), random(N, K).t(), *_scales(device, M, N)),
        ours=partial(scaled_mm, bias=None, out_dtype=torch.bfloat16, accumulation=accumulation),
        check=check,
        bytes=M * K + N * K + 2 * M * N,
        operations=2 * M * N * K,
        bits=8,
        peers={"_scaled_mm": peers.torch_scaled_mm, "bf16": peers.bfloat16_mm},
    )


def linear_8bit(x: Tensor, weight: Tensor, weight_codes: Tensor, weight_scale: Tensor) -> Tensor:
    codes, scale = quantize_rowwise(x)
    return scaled_mm(codes, weight_codes.t(), scale, weight_scale.t(), None, x.dtype)


def linear_8bit_with_outliers(x: Tensor, weight: Tensor, weight_codes: Tensor, weight_scale: Tensor) -> Tensor:
    codes, scale, columns, count = quantize_rowwise_outliers(x, THRESHOLD)
    return mixed_scaled_mm(x, codes, scale, weight_codes, weight_scale, columns, count, None, x.dtype)


def _linear(device: torch.device, T: int, I: int, O: int, outliers: bool) -> Case:  # noqa: E741 - the names of sizes
    def make() -> Inputs:
        weight = torch.randn(O, I, device=device, dtype=torch.float16)
        x = with_outliers(device, T, I) if outliers else torch.randn(T, I, device=device, dtype=torch.float16)
        return x, weight, *quantize_rowwise(weight)

    def check(inputs: Inputs, out: Outputs) -> None:
        x, *stored = (tensor.cpu() for tensor in inputs)
        for some in ends(T):  # each token for itself: on these columns every one has outliers, or none
            assert_close(out[some], ours(x[some], *stored), FP16_ERROR)

    ours = linear_8bit_with_outliers if outliers else linear_8bit
    theirs = partial(peers.linear_8bit, threshold=THRESHOLD if outliers else 0.0)
    return Case(
        name="L1",
        op="LLM.int8() linear" + (", outliers" if outliers else ""),
        shape=f"{T} x {O} x {I}",
        dtype="fp16",
        make=make,
        ours=ours,
        check=check,
        bytes=2 * T * I + O * I + 2 * T * O,
        operations=2 * T * I * O,
        bits=8,
        peers={**peers.bitsandbytes(theirs), "fp16": peers.linear},
    )
