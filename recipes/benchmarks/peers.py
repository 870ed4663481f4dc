"""The same work by others, where they are installed: each function takes our inputs and returns the call to be timed.

What has to be made first, a state or another dtype, is made before the clock runs.
"""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lq_plugin.recipes.benchmarks.timing import Call

Peers = Mapping[str, Callable[..., Call]]


def bitsandbytes(prepare: Callable[..., Call]) -> Peers:
    """`prepare(functional, *inputs)` with bitsandbytes.functional, or no peer without bitsandbytes."""
    if find_spec("bitsandbytes") is None:
        return {}
    return {"bitsandbytes": partial(_with, "bitsandbytes.functional", prepare)}


def _with(module: str, prepare: Callable[..., Call], *inputs: Any) -> Call:
    return prepare(import_module(module), *inputs)


def quantize_blockwise(functional: Any, x: Tensor, code: Tensor, block_size: int) -> Call:
    return partial(functional.quantize_blockwise, x, code=code, blocksize=block_size)


def dequantize_blockwise(functional: Any, codes: Tensor, scale: Tensor, code: Tensor, block_size: int) -> Call:
    state = functional.QuantState(scale, code=code, blocksize=block_size, dtype=torch.bfloat16)
    return partial(functional.dequantize_blockwise, codes, state)


def quantize_nf4(functional: Any, x: Tensor, block_size: int, double: bool) -> Call:
    return partial(functional.quantize_nf4, x, blocksize=block_size, compress_statistics=double)


def dequantize_nf4(block_size: int, shape: list[int]) -> Callable[..., Call]:
    """Of our bytes, which are theirs: packed and scale, or packed, scale_codes, nested_scale and offset."""

    def prepare(functional: Any, packed: Tensor, absmax: Tensor, *nested: Tensor) -> Call:
        code = functional.get_4bit_type("nf4", device=packed.device)
        how: dict[str, Any] = {"blocksize": block_size, "quant_type": "nf4", "dtype": torch.bfloat16}
        if nested:
            of_scales = functional.create_dynamic_map().to(packed.device)
            how["offset"] = nested[1]
            how["state2"] = functional.QuantState(nested[0], code=of_scales, blocksize=256, dtype=torch.float32)
        return partial(functional.dequantize_nf4, packed, functional.QuantState(absmax, torch.Size(shape), code, **how))

    return prepare


def frozen_nf4(functional: Any, weight: Tensor, packed: Tensor, absmax: Tensor) -> Callable[[Tensor], Tensor]:
    """bitsandbytes.matmul_4bit with our bytes, which are theirs, in blocks of 64."""
    code = functional.get_4bit_type("nf4", device=packed.device)
    state = functional.QuantState(absmax, weight.shape, code, 64, "nf4", weight.dtype)
    matmul_4bit = import_module("bitsandbytes").matmul_4bit
    return lambda x: matmul_4bit(x, packed.t(), state)


def matmul_nf4(functional: Any, x: Tensor, weight: Tensor, packed: Tensor, absmax: Tensor) -> Call:
    return torch.no_grad()(partial(frozen_nf4(functional, weight, packed, absmax), x))


def quantize_rows(functional: Any, x: Tensor, threshold: float) -> Call:
    return partial(functional.int8_vectorwise_quant, x.half(), threshold=threshold)


def linear_8bit(functional: Any, x: Tensor, weight: Tensor, *ours: Tensor, threshold: float) -> Call:
    """bitsandbytes.nn.Linear8bitLt with a frozen weight; `functional` is not used."""
    layers = import_module("bitsandbytes.nn")
    layer = layers.Linear8bitLt(
        weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=threshold
    )
    layer.weight = layers.Int8Params(weight.half().cpu(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to(x.device).eval()
    return torch.no_grad()(partial(layer, x.half()))


def int_mm(a: Tensor, b: Tensor, *scales: Tensor) -> Call:
    """cuBLAS without an epilogue: int32 sums."""
    return partial(torch._int_mm, a, b)


def bfloat16_mm(a: Tensor, b: Tensor, *scales: Tensor) -> Call:
    x, y = torch.randn(a.shape, device=a.device).bfloat16(), torch.randn(b.t().shape, device=b.device).bfloat16().t()
    return partial(torch.mm, x, y)


def torch_scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Call:
    """With scales of rows and columns, and fast accumulation."""
    return partial(
        torch._scaled_mm, a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def linear(x: Tensor, weight: Tensor, *ours: Tensor) -> Call:
    return partial(F.linear, x, weight)
