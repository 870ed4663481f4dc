"""Samples of the ops of blockwise_4bit.py and nested_scales.py."""

import torch
from hostile import FLOATS, Samples, SampleTable, cut_out, heavy_tailed, not_finite, tiny
from lq_kernels.blockwise_4bit import quantize_4bit
from lq_kernels.codebooks import four_bit_map, midpoints
from lq_kernels.layout_4bit import BLOCK_SIZES, QUANT_TYPES
from lq_kernels.nested_scales import quantize_4bit_double, quantize_scales
from torch import Tensor

DEFAULTS = (64, "nf4", torch.uint8)
STORAGES = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32)


def flat(values: Tensor) -> Tensor:
    """The values in one row of a poisoned buffer: contiguous, so that a kernel reads them where they are."""
    return cut_out(values.reshape(1, -1))[0]


def neighbours(values: Tensor) -> Tensor:
    return torch.cat([values, torch.nextafter(values, values + 1), torch.nextafter(values, values - 1)])


def bounds_4bit(quant_type: str) -> Tensor:
    """Where the code changes, of both signs."""
    values = four_bit_map(quant_type)
    bounds = midpoints(values[:8].sort().values if quant_type == "fp4" else values)
    return torch.cat([bounds, -bounds])


def blocks_of_scale_one(values: Tensor, block_size: int) -> Tensor:
    """Blocks that begin with 1, so that v is the value itself."""
    values = torch.nn.functional.pad(values, (0, -len(values) % (block_size - 1))).view(-1, block_size - 1)
    return torch.nn.functional.pad(values, (1, 0), value=1.0)


def hostile_4bit(quant_type: str) -> Tensor:
    """Ties and their neighbours, ends of the kernel's buckets and their neighbours, and zeros of both signs."""
    edges = (torch.arange(32) * 4 - 60.5) / 60
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-30, -1e-45, 1.0, -1.0])
    return torch.cat([neighbours(bounds_4bit(quant_type)), neighbours(edges), special]).clamp(-1, 1)


def values() -> Samples:
    """For quantize_4bit."""
    for quant_type in QUANT_TYPES:
        for dtype in FLOATS:
            yield f"{quant_type}, odd size, {dtype}", (flat(heavy_tailed(37, 131, dtype)), 64, quant_type)
            yield f"{quant_type}, whole tiles, {dtype}", (flat(heavy_tailed(64, 128, dtype)), 64, quant_type)
        for block_size in BLOCK_SIZES:
            yield f"{quant_type}, blocks of {block_size}", (flat(heavy_tailed(3, 4097)), block_size, quant_type)
        ties = blocks_of_scale_one(hostile_4bit(quant_type), 64)
        yield f"{quant_type}, ties", (flat(ties), 64, quant_type)
        yield f"{quant_type}, ties of another scale", (flat(ties * 0.25), 64, quant_type)
        yield f"{quant_type}, one value", (flat(torch.full((1, 1), -3.0)), 64, quant_type)
        yield f"{quant_type}, zeros", (torch.zeros(5, 100), 32, quant_type)
        yield f"{quant_type}, not finite", (flat(not_finite(9, 70)), 64, quant_type)
        yield f"{quant_type}, tiny", (flat(tiny(64)), 64, quant_type)
        yield f"{quant_type}, huge", (flat(torch.randn(3, 70).clamp(-1, 1) * 3.4e38), 64, quant_type)
        yield f"{quant_type}, empty", (torch.empty(0, 5), 64, quant_type)
    yield "transposed", (cut_out(heavy_tailed(130, 37), "columns"), 64)
    yield "every other", (cut_out(heavy_tailed(37, 130), "every_other"), 64)
    yield "three dimensions", (heavy_tailed(30, 40).view(3, 10, 40), 128)
    for storage in STORAGES:
        yield f"kept as {storage}", (flat(heavy_tailed(10, 100)), 64, "nf4", storage)


def values_and_outputs() -> Samples:
    """For quantize_4bit_out: filled with what the op should overwrite."""
    for name, given in list(values())[::3]:
        x, block_size, quant_type, storage = given + DEFAULTS[len(given) - 1 :]
        packed, scale = quantize_4bit.reference(x, block_size, quant_type, storage)
        packed = flat(packed.view(torch.uint8)).fill_(0xA5).view(storage)
        yield name, (x, block_size, quant_type, packed, flat(scale).fill_(-1.0))


def codes() -> Samples:
    """For dequantize_4bit."""
    for quant_type in QUANT_TYPES:
        for dtype in FLOATS:
            for shape in ([37, 131], [64, 128], [1], [3, 5, 7], [0, 4]):
                packed, scale = quantize_4bit(heavy_tailed(shape[0], torch.Size(shape[1:]).numel()), 64, quant_type)
                arguments = (flat(packed), flat(scale), 64, quant_type, shape, dtype)
                yield f"{quant_type} {shape} to {dtype}", arguments
        for block_size in BLOCK_SIZES:
            packed, scale = quantize_4bit(heavy_tailed(3, 4097), block_size, quant_type)
            arguments = (flat(packed), flat(scale), block_size, quant_type, [3, 4097], torch.float32)
            yield f"{quant_type}, blocks of {block_size}", arguments
        packed, scale = quantize_4bit(not_finite(9, 70), 64, quant_type)
        yield f"{quant_type}, not finite", (packed, scale, 64, quant_type, [9, 70], torch.float16)
    for storage in STORAGES:
        packed, scale = quantize_4bit(heavy_tailed(10, 100), 64, "nf4", storage)
        yield f"kept as {storage}", (packed, scale, 64, "nf4", [10, 100], torch.bfloat16)
    packed, scale = quantize_4bit(heavy_tailed(10, 100), 64)
    spread = cut_out(torch.cat([packed, packed], dim=1))[:, :1]
    yield "strided", (spread, cut_out(scale[:, None])[:, 0], 64, "nf4", [10, 100], torch.float32)
    yield "one row of bytes", (packed.t(), scale, 64, "nf4", [1000], torch.float32)
    yield "overflow", (packed, scale * 1e6, 64, "nf4", [1000], torch.float16)


def codes_and_output() -> Samples:
    """For dequantize_4bit_out."""
    for name, (packed, scale, block_size, quant_type, shape, dtype) in list(codes())[::3]:
        out = flat(torch.full(shape, -1.0, dtype=dtype)).view(shape)
        yield name, (packed, scale, block_size, quant_type, out)


def double_values() -> Samples:
    """For quantize_4bit_double; blocks of 32, so that few values make many scales."""
    for dtype in FLOATS:
        yield f"odd size, {dtype}", (flat(heavy_tailed(37, 331, dtype)), 32)
    yield "fp4", (flat(heavy_tailed(37, 331)), 32, "fp4")
    yield "kept as bfloat16", (flat(heavy_tailed(10, 100)), 64, "nf4", torch.bfloat16)
    yield "one value", (torch.tensor([-3.0]), 64)
    yield "zeros", (torch.zeros(5, 100), 64)
    yield "not finite", (flat(not_finite(9, 70)), 64)
    yield "transposed", (cut_out(heavy_tailed(130, 37), "columns"), 64)
    yield "empty", (torch.empty(0, 5), 64)


def double_codes() -> Samples:
    """For dequantize_4bit_double."""
    for quant_type in QUANT_TYPES:
        for shape in ([37, 331], [64, 128], [256, 256], [1], [0, 4]):
            for dtype in FLOATS:
                packed, *nested = quantize_4bit_double(heavy_tailed(shape[0], (*shape, 1)[1]), 32, quant_type)
                nested = [flat(nested[0]), flat(nested[1]), nested[2]]
                yield f"{quant_type} {shape} to {dtype}", (flat(packed), *nested, 32, quant_type, shape, dtype)
    for block_size in BLOCK_SIZES:
        packed, *nested = quantize_4bit_double(heavy_tailed(3, 4097), block_size)
        yield f"blocks of {block_size}", (packed, *nested, block_size, "nf4", [3, 4097], torch.float32)
    packed, *nested = quantize_4bit_double(not_finite(9, 70), 32)
    yield "not finite", (packed, *nested, 32, "nf4", [9, 70], torch.float32)


def double_codes_and_output() -> Samples:
    """For dequantize_4bit_double_out."""
    for name, (packed, codes, nested_scale, offset, block_size, quant_type, shape, dtype) in list(double_codes())[::3]:
        out = flat(torch.full(shape, -1.0, dtype=dtype)).view(shape)
        yield name, (packed, codes, nested_scale, offset, block_size, quant_type, out)


def scales() -> Samples:
    """For quantize_scales. 70 000 scales fill all lanes of the sum, and some twice."""
    for size in (1, 2, 37, 256, 257, 1025, 5003, 70_000):
        yield f"{size} scales", (flat(torch.randn(size).abs() * torch.exp(torch.randn(size))),)
    yield "every other", (cut_out(torch.rand(1, 1000), "every_other")[0],)
    yield "all alike", (torch.full((1000,), 0.1),)
    yield "zeros", (torch.zeros(300),)
    yield "tiny", (tiny(64).abs().flatten(),)
    yield "subnormal differences", (2.0**-126 * (1 + 0.2 * torch.rand(300)),)
    yield "a NaN", (torch.tensor([1.0, torch.nan, 2.0]),)
    yield "an infinity", (torch.tensor([1.0, torch.inf, 2.0]),)
    yield "empty", (torch.empty(0),)


def scale_codes() -> Samples:
    """For dequantize_scales."""
    for name, (scale,) in scales():
        codes, nested_scale, offset = quantize_scales(scale)
        yield name, (flat(codes), flat(nested_scale), offset)
    codes = torch.arange(256, dtype=torch.uint8).repeat(20)
    yield "every code", (codes, torch.rand(20), torch.tensor(0.7))
    yield "every other", (torch.stack([codes, codes], dim=1)[:, 0], torch.rand(40)[::2], torch.tensor(0.7))


SAMPLES: SampleTable = {
    "quantize_4bit": values,
    "quantize_4bit_out": values_and_outputs,
    "dequantize_4bit": codes,
    "dequantize_4bit_out": codes_and_output,
    "quantize_4bit_double": double_values,
    "dequantize_4bit_double": double_codes,
    "dequantize_4bit_double_out": double_codes_and_output,
    "quantize_scales": scales,
    "dequantize_scales": scale_codes,
}
