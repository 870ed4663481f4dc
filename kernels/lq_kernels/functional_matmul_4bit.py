"""bitsandbytes' products with a packed 4-bit weight, by its names: A @ W.t(), W read back from codes and QuantState.

The packed weight may be passed as it is or as its transpose: the state says how it lies. It has no gradient.
"""

import warnings

import torch
from torch import Tensor

from lq_kernels.functional_4bit import as_packed
from lq_kernels.functional_arguments import check_devices, check_float, written_without_gradient
from lq_kernels.packed_4bit import matmul_4bit as packed_matmul_4bit
from lq_kernels.quant_state import QuantState


def matmul_4bit(
    A: Tensor,
    B: Tensor,
    quant_state: QuantState,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """A (..., K) @ W.t() + bias (N,) -> (..., N) in A's dtype; quant_state.shape is that of W, (N, K).

    A is float32, bfloat16 or float16; inside autocast it is cast. Gradients reach A and bias. `out` is written and
    returned, without gradients. A state of an old file, whose shape is (K, N), is read with a DeprecationWarning where
    K is not N. An empty A gives an empty result.
    """
    if quant_state is None:
        raise ValueError("matmul_4bit needs quant_state: pass what quantize_4bit gave with B")
    check_float(A, "matmul_4bit")
    check_devices(A, B=B, bias=bias)
    packed = as_packed(B, quant_state)
    if len(packed.shape) != 2 or A.shape[-1] not in packed.shape:
        raise ValueError(f"matmul_4bit takes A (..., K) and W (N, K), got {tuple(A.shape)} and {packed.shape}")
    if A.shape[-1] == packed.shape[1]:
        result = packed_matmul_4bit(A, packed, bias)
    else:
        warnings.warn(
            f"matmul_4bit: the weight was quantised as (K, N) = {packed.shape}; quantise its transpose instead",
            DeprecationWarning,
            stacklevel=2,
        )
        result = torch.nn.functional.linear(A, packed.dequantize(A.dtype).t(), bias)
    return written_without_gradient(result, out, "matmul_4bit")


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """A (..., K) of one row @ W.t() -> (..., N) in A's dtype, without gradients; state.shape is that of W, (N, K).

    transposed_A and transposed_B are not read: the state says how B lies. ValueError: no state, more than one row.
    """
    if state is None:
        raise ValueError("gemv_4bit needs state: pass what quantize_4bit gave with B")
    if A.numel() != A.shape[-1]:
        raise ValueError(f"gemv_4bit takes one row, got A of shape {tuple(A.shape)}: matmul_4bit takes any number")
    with torch.no_grad():
        return matmul_4bit(A, B, state, out)
