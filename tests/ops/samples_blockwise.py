"""Samples of blockwise.py's ops."""

import torch
from hostile import FLOATS, Samples, SampleTable, cut_out, heavy_tailed, not_finite, tiny
from lq_kernels.blockwise import quantize_blockwise
from lq_kernels.codebooks import dynamic_map, midpoints
from torch import Tensor


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


SAMPLES: SampleTable = {"quantize_blockwise": blocks, "dequantize_blockwise": block_codes}
