"""Samples of scaled_mm.py's ops."""

import torch
from hostile import FLOATS, Arguments, Samples, SampleTable, cut_out


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
    yield "no K", (a[:, :0], b[:0], scale_a, scale_b, bias, torch.bfloat16)
    yield "no K, no bias", (a[:, :0], b[:0], scale_a, scale_b, None, torch.bfloat16)
    yield "no rows", (a[:0], b, scale_a[:0], scale_b, bias, torch.bfloat16)
    yield "no columns", (a, b[:, :0], scale_a, scale_b[:, :0], bias[:0], torch.bfloat16)


def product(M: int, K: int, N: int, dtype: torch.dtype = torch.float32) -> Arguments:
    """Arguments of scaled_mm with the strides that the layers use: rows of a and columns of b contiguous."""
    a = cut_out(torch.randint(-127, 128, (M, K), dtype=torch.int8))
    b = cut_out(torch.randint(-127, 128, (K, N), dtype=torch.int8), "columns")
    scale_a, scale_b = torch.rand(M, 1) * torch.exp(torch.randn(M, 1)) / 127, torch.rand(1, N) / 127
    return a, b, scale_a, scale_b, torch.randn(N).to(dtype), dtype


SAMPLES: SampleTable = {"scaled_mm": products}
