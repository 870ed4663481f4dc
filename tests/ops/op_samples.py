"""Arguments for every op, made to find what a kernel forgets. Adding an op to the parity tests is one line of SAMPLES.

Tensors are cut out of a larger buffer filled with infinities (integers: with their smallest value), so that a load
that overruns its mask changes the result.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lq_kernels.blockwise import quantize_blockwise
from lq_kernels.codebooks import dynamic_map, midpoints
from torch import Tensor

Arguments = tuple[Any, ...]
Samples = Iterator[tuple[str, Arguments]]

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
    """A tensor with its strides and the buffer that it was cut from; anything else as it is."""
    if not isinstance(value, Tensor) or value.device == device:
        return value
    buffer = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).to(device)
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


def matrices() -> Samples:
    """For ops that take one matrix."""
    for dtype in FLOATS:
        yield f"odd size {dtype}", (cut_out(heavy_tailed(37, 1000, dtype)),)
    yield "one value", (cut_out(torch.full((1, 1), -3.0)),)
    yield "one row", (cut_out(torch.randn(1, 37)),)
    yield "one column", (cut_out(torch.randn(1000, 1)),)
    yield "contiguous", (heavy_tailed(64, 256, torch.bfloat16),)
    yield "transposed", (cut_out(heavy_tailed(130, 37), "columns"),)
    yield "every other", (cut_out(heavy_tailed(37, 130, torch.bfloat16), "every_other"),)
    yield "expanded", (torch.randn(1, 1).expand(33, 65),)
    yield "several tiles", (cut_out(heavy_tailed(300, 200, torch.float16)),)
    yield "zeros", (torch.zeros(5, 7),)
    yield "ties", (cut_out(ties(5, 200)),)
    yield "rounded twice", (rounded_twice(16, 64),)
    yield "rounded twice, one row", (rounded_twice(1, 64),)
    yield "not finite", (cut_out(not_finite(9, 70)),)
    yield "infinite", (cut_out(not_finite(9, 70)[2:3]),)
    yield "tiny", (cut_out(tiny(33)),)
    yield "tiny, one row", (cut_out(tiny(33)[10:11]),)
    yield "no rows", (torch.empty(0, 5),)
    yield "no columns", (torch.empty(5, 0),)


def long_rows() -> Samples:
    yield from matrices()
    yield "longer than a tile", (cut_out(heavy_tailed(2, 40000, torch.bfloat16)),)
    yield "longer than a tile, transposed", (cut_out(heavy_tailed(3, 33333), "columns"),)


def code_ties(name: str, block_size: int) -> Tensor:
    """Blocks that begin with 1, then midpoints between neighbouring values of a code book, and their neighbours."""
    bounds = midpoints(dynamic_map(name))
    values = torch.cat([bounds, torch.nextafter(bounds, bounds + 1), torch.nextafter(bounds, bounds - 1)])
    values = torch.nn.functional.pad(values, (0, -len(values) % (block_size - 1))).view(-1, block_size - 1)
    return torch.nn.functional.pad(values, (1, 0), value=1.0)


def blocks() -> Samples:
    """For quantize_blockwise."""
    signed, unsigned = dynamic_map("dynamic_symmetric"), dynamic_map("dynamic_unsigned")
    for dtype in FLOATS:
        yield f"odd size {dtype}", (cut_out(heavy_tailed(37, 130, dtype)), signed)
    yield "one value", (cut_out(torch.full((1, 1), -3.0)), signed)
    yield "unsigned", (cut_out(heavy_tailed(5, 1000).abs()), unsigned)
    yield "map without -1", (cut_out(-heavy_tailed(5, 300)), dynamic_map("dynamic"))
    yield "values given twice", (cut_out(heavy_tailed(5, 300)), torch.linspace(-1, 1, 128).repeat_interleave(2))
    yield "random code", (cut_out(torch.randn(3, 700)), (torch.rand(256) * 2 - 1).sort().values)
    yield "transposed", (cut_out(heavy_tailed(130, 37), "columns"), signed, 64)
    yield "three dimensions", (heavy_tailed(30, 40).view(3, 10, 40), signed, 100)
    yield "blocks of one", (cut_out(torch.randn(3, 7)), signed, 1)
    yield "odd blocks", (cut_out(heavy_tailed(3, 700)), signed, 37)
    yield "long blocks", (cut_out(heavy_tailed(3, 5000)), signed, 4096)
    for name in ("dynamic", "dynamic_symmetric", "dynamic_unsigned"):
        yield f"ties {name}", (code_ties(name, 256), dynamic_map(name))
    yield "zeros", (torch.zeros(5, 100), signed)
    yield "not finite", (cut_out(not_finite(9, 70)), signed, 64)
    yield "tiny", (cut_out(tiny(64)), signed, 64)
    yield "empty", (torch.empty(0, 5), signed)


def block_codes() -> Samples:
    """For dequantize_blockwise; not to bfloat16, which the interpreter truncates instead of rounding."""
    for (name, (x, code, *rest)), dtype in zip(blocks(), 20 * [torch.float32, torch.float16], strict=False):
        block_size = rest[0] if rest else 256
        codes, scale = quantize_blockwise(x.float().clamp(-1000, 1000), code, block_size)
        codes = cut_out(codes) if codes.dim() == 2 and codes.numel() else codes
        yield f"{name} to {dtype}", (codes, scale, code, block_size, dtype)


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


SAMPLES: dict[str, Callable[[], Samples]] = {
    "quantize_rowwise": long_rows,
    "quantize_columnwise_transposed": matrices,
    "quantize_tensorwise": matrices,
    "quantize_tensorwise_transposed": matrices,
    "scaled_mm": products,
    "quantize_blockwise": blocks,
    "dequantize_blockwise": block_codes,
}
