"""Samples of the ops of blockwise.py and nearest.py."""

from itertools import islice

import torch
from hostile import FLOATS, Samples, SampleTable, cut_out, heavy_tailed, not_finite, tiny
from lq_kernels.blockwise import quantize_blockwise
from lq_kernels.codebooks import create_dynamic_map, create_fp8_map, create_linear_map, dynamic_map, midpoints
from torch import Tensor

SIGNED, UNSIGNED = dynamic_map("dynamic_symmetric"), dynamic_map("dynamic_unsigned")


def maps() -> dict[str, Tensor]:
    """Maps that a kernel finds codes in with one comparison, and maps in which it has to search."""
    return {
        "dynamic": dynamic_map("dynamic"),
        "dynamic_symmetric": SIGNED,
        "dynamic_unsigned": UNSIGNED,
        "e4m3, two zeros": create_fp8_map(True, 4, 3),
        "e4m3 up to 448": create_fp8_map(True, 4, 3) * 448,
        "e5m2, too fine near zero": create_fp8_map(),
        "linear, a midpoint at zero": create_linear_map(add_zero=False),
        "three bits, many zeros": create_dynamic_map(True, 3, 3),
        "random": (torch.rand(256) * 2 - 1).sort().values,
        "each value twice": torch.linspace(-1, 1, 128).repeat_interleave(2),
        "far from zero": torch.linspace(0.5, 0.501, 256),
        "negative": -torch.linspace(3.0, 2.0, 256),
        "one negative": torch.cat([torch.tensor([-1e-3]), torch.linspace(0, 1, 255)]),
        "large": SIGNED * 2.0**124,
        "small": SIGNED * 1e-30,
        "zeros": torch.zeros(256),
    }


def around_midpoints(code: Tensor) -> Tensor:
    bounds = midpoints(code)
    above, below = torch.full_like(bounds, torch.inf), torch.full_like(bounds, -torch.inf)
    return torch.cat([bounds, torch.nextafter(bounds, above), torch.nextafter(bounds, below), code])


def code_ties(name: str, block_size: int) -> Tensor:
    """Blocks that begin with 1, then midpoints between neighbouring values of a code book, and their neighbours."""
    values = around_midpoints(dynamic_map(name))
    values = torch.nn.functional.pad(values, (0, -len(values) % (block_size - 1))).view(-1, block_size - 1)
    return torch.nn.functional.pad(values, (1, 0), value=1.0)


def rounded_twice() -> Tensor:
    """Blocks of 64 in which x / amax and x * (1 / amax) lie on different sides of a midpoint, for some x."""
    amax = torch.rand(2000, 1) + 1
    values = amax * midpoints(SIGNED)[torch.randint(255, (2000, 63))]
    return torch.cat([amax, values], dim=1)


def blocks() -> Samples:
    """For quantize_blockwise."""
    for dtype in FLOATS:
        yield f"odd size {dtype}", (cut_out(heavy_tailed(37, 130, dtype)), SIGNED)
    yield "one value", (cut_out(torch.full((1, 1), -3.0)), SIGNED)
    yield "unsigned", (cut_out(heavy_tailed(5, 1000).abs()), UNSIGNED)
    for name, code in maps().items():
        yield f"map {name}", (cut_out(-heavy_tailed(5, 300)), code)
    yield "transposed", (cut_out(heavy_tailed(130, 37), "columns"), SIGNED, 64)
    yield "every other", (cut_out(heavy_tailed(13, 370, torch.bfloat16), "every_other"), SIGNED)
    yield "three dimensions", (heavy_tailed(30, 40).view(3, 10, 40), SIGNED, 100)
    yield "no dimension", (torch.tensor(-2.5), SIGNED)
    yield "blocks of one", (cut_out(torch.randn(3, 7)), SIGNED, 1)
    yield "odd blocks", (cut_out(heavy_tailed(3, 700)), SIGNED, 37)
    yield "more odd blocks than a step of all programs", (heavy_tailed(53, 1000), SIGNED, 1000)
    yield "more blocks than a step of all programs", (heavy_tailed(13, 4100, torch.bfloat16), SIGNED)
    yield "blocks of 4096", (cut_out(heavy_tailed(3, 5000)), SIGNED, 4096)
    yield "blocks of 5000, more than programs", (heavy_tailed(13, 4900, torch.bfloat16), SIGNED, 5000)
    yield "one block, longer than the values", (heavy_tailed(3, 700), SIGNED, 1 << 33)
    for name in ("dynamic", "dynamic_symmetric", "dynamic_unsigned"):
        yield f"ties {name}", (code_ties(name, 256), dynamic_map(name))
    yield "rounded twice", (rounded_twice(), SIGNED, 64)
    yield "zeros", (torch.zeros(5, 100), SIGNED)
    yield "not finite", (cut_out(not_finite(9, 70)), SIGNED, 64)
    yield "not finite, long blocks", (not_finite(9, 5000), SIGNED, 5000)
    yield "tiny", (cut_out(tiny(64)), SIGNED, 64)
    yield "huge", (torch.rand(9, 64) * torch.linspace(0.3, 3.4, 9)[:, None] * 1e38, SIGNED, 64)
    yield "empty", (torch.empty(0, 5), SIGNED)


def some(samples: Samples) -> Samples:
    """A third: enough for an op that starts the same kernel as the one that all are made for."""
    return islice(samples, 0, None, 3)


def blocks_with_out() -> Samples:
    for name, (x, code, *rest) in some(blocks()):
        block_size = rest[0] if rest else 256
        codes = torch.full(x.shape, 77, dtype=torch.uint8)
        yield name, (x, code, block_size, codes, torch.full((-(-x.numel() // block_size),), -1.0))


def block_codes() -> Samples:
    """For dequantize_blockwise, to each dtype in turn."""
    for number, (name, (x, code, *rest)) in enumerate(blocks()):
        block_size, dtype = rest[0] if rest else 256, FLOATS[number % 3]
        codes, scale = quantize_blockwise(x.float().clamp(-1000, 1000), code, block_size)
        codes = cut_out(codes) if codes.dim() == 2 and codes.numel() else codes
        yield f"{name} to {dtype}", (codes, scale, code, block_size, dtype)


def block_codes_with_out() -> Samples:
    for name, (codes, scale, code, block_size, dtype) in some(block_codes()):
        yield name, (codes, scale, code, block_size, torch.full(codes.shape, -1.0, dtype=dtype))


def values() -> Samples:
    """For quantize_values."""
    special = [0.0, -0.0, torch.nan, -torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45, 1e-38, -3e38, 3e38]
    for name, code in maps().items():
        spread = torch.randn(500) * torch.exp(3 * torch.randn(500))
        yield f"map {name}", (torch.cat([around_midpoints(code), torch.tensor(special), spread]), code)
    for dtype in FLOATS:
        yield f"odd size {dtype}", (cut_out(torch.randn(37, 130).to(dtype)), SIGNED)
    yield "more than a step of all programs", (torch.randn(13, 4100).bfloat16(), SIGNED)
    yield "transposed", (cut_out(torch.randn(13, 37), "columns"), SIGNED)
    yield "one value", (torch.tensor(0.3), UNSIGNED)
    yield "empty", (torch.empty(0, 5), SIGNED)


def values_with_out() -> Samples:
    for name, (x, code) in some(values()):
        yield name, (x, code, torch.full(x.shape, 77, dtype=torch.uint8))


def codes() -> Samples:
    """For dequantize_values."""
    for number, (rows, columns) in enumerate([(1, 1), (37, 130), (16, 256), (3, 5000), (0, 5)]):
        values = torch.randint(256, (rows, columns), dtype=torch.uint8)
        for code in (SIGNED, torch.randn(256)):
            yield f"{rows} x {columns}, map {code[0]}", (values, code, FLOATS[number % 3])
    yield "transposed", (cut_out(torch.randint(256, (13, 37), dtype=torch.uint8), "columns"), SIGNED)


def codes_with_out() -> Samples:
    for name, (values, code, *dtype) in some(codes()):
        yield name, (values, code, torch.full(values.shape, -1.0, dtype=dtype[0] if dtype else torch.float32))


SAMPLES: SampleTable = {
    "quantize_blockwise": blocks,
    "quantize_blockwise_out": blocks_with_out,
    "dequantize_blockwise": block_codes,
    "dequantize_blockwise_out": block_codes_with_out,
    "quantize_values": values,
    "quantize_values_out": values_with_out,
    "dequantize_values": codes,
    "dequantize_values_out": codes_with_out,
}
