"""bitsandbytes' 8-bit quantisation by its names: by blocks with a QuantState, and its older form for whole tensors.

    A = code[codes] * absmax

Differences to bitsandbytes: codes are the nearest ones on every device, ties to the lower index; zero keeps the code
of zero; a NaN or an infinity shows in its whole block (with nested=True in the whole tensor).
"""

import torch
from torch import Tensor

from lq_kernels import blockwise, nearest
from lq_kernels.blockwise import SMALLEST_SCALE
from lq_kernels.functional_arguments import check_devices, check_dtype, check_float, map_on, written
from lq_kernels.quant_state import QuantState


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """A float -> codes uint8 of its shape, and the state to read them back.

    A is float32, bfloat16 or float16, else ValueError; any positive blocksize, over A in row-major order. `code`
    (256,) ascending; None is bitsandbytes' signed dynamic map, which has 1 but no -1. `out` and `absmax`
    (ceil(numel / blocksize),) float32 are written if given. `nested` quantises absmax minus its mean, `offset`, again.
    """
    check_float(A, "quantize_blockwise")
    code = _table(code, A)
    if out is None and absmax is None:
        codes, scale = blockwise.quantize_blockwise(A, code, blocksize)
    else:
        blocks = -(-A.numel() // blocksize) if blocksize > 0 else 0
        codes = torch.empty(A.shape, dtype=torch.uint8, device=A.device) if out is None else out
        scale = torch.empty(blocks, device=A.device) if absmax is None else absmax
        check_devices(A, out=codes, absmax=scale)
        blockwise.quantize_blockwise_out(A, code, blocksize, codes, scale)
    state = QuantState(scale, code=code, blocksize=blocksize, dtype=A.dtype)
    return codes, with_nested_absmax(state, blocksize) if nested else state


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """A uint8 -> code[A] * absmax of its block, in the state's dtype; the product is float32, rounded once.

    With a state the other arguments do not count, except `out`, of A's shape and the state's dtype. Without one,
    absmax is needed (else ValueError) and the result is float32, or of the dtype of `out`. `nested` says nothing: a
    state knows it.
    """
    check_dtype(A, torch.uint8, "A")
    if quant_state is None:
        if absmax is None:
            raise ValueError("dequantize_blockwise needs quant_state or absmax: pass what quantize_blockwise gave")
        dtype = torch.float32 if out is None else out.dtype
        quant_state = QuantState(absmax, code=code, blocksize=blocksize, dtype=dtype)
    check_devices(A, absmax=quant_state.absmax, out=out)
    scale, table = plain_absmax(quant_state), _table(quant_state.code, A)
    block_size, dtype = quant_state.form()
    if out is None:
        return blockwise.dequantize_blockwise(A, scale, table, block_size, dtype)
    check_dtype(out, dtype, "out")
    blockwise.dequantize_blockwise_out(A, scale, table, block_size, out)
    return out


def quantize(A: Tensor, code: Tensor | None = None, out: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A float -> codes uint8 of its shape, (absmax, code); one absmax, float32 without dimensions, for all of A."""
    check_float(A, "quantize")
    code = _table(code, A)
    amax = A.abs().amax().float() if A.numel() else torch.zeros((), device=A.device)
    absmax = torch.where(amax < SMALLEST_SCALE, 0.0, amax)
    return quantize_no_absmax(A.float() / torch.where(absmax == 0, 1.0, absmax), code, out), (absmax, code)


def dequantize(
    A: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A uint8 -> code[A] * absmax, float32; what `quantize` gave as `state`, or absmax and code by themselves."""
    if state is not None:
        absmax, code = state
    if absmax is None:
        raise ValueError("dequantize needs state or absmax: pass the state that quantize gave")
    return dequantize_no_absmax(A, _table(code, A), out).mul_(absmax)


def quantize_no_absmax(A: Tensor, code: Tensor, out: Tensor | None = None) -> Tensor:
    """A float -> the uint8 codes of the nearest values of `code` (256,), ties to the lower index; no scale."""
    check_float(A, "quantize_no_absmax")
    return written(nearest.quantize_values(A, _table(code, A)), out)


def dequantize_no_absmax(A: Tensor, code: Tensor, out: Tensor | None = None) -> Tensor:
    """A uint8 -> code[A], float32."""
    check_dtype(A, torch.uint8, "A")
    return written(nearest.dequantize_values(A, _table(code, A)), out)


def plain_absmax(state: QuantState) -> Tensor:
    """The float32 absmax of each block, read back where the state keeps it quantised."""
    if state.state2 is None:
        return state.absmax
    if state.offset is None:
        raise ValueError("a state with state2 needs offset, the mean that was taken off absmax")
    return dequantize_blockwise(state.absmax, state.state2) + state.offset


def with_nested_absmax(state: QuantState, blocksize: int) -> QuantState:
    """`state` with its absmax, less their mean, quantised in blocks of blocksize."""
    absmax = state.absmax
    state.offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    state.absmax, state.state2 = quantize_blockwise(absmax - state.offset, blocksize=blocksize)
    return state


def _table(code: Tensor | None, A: Tensor) -> Tensor:
    """`code`, or bitsandbytes' signed dynamic map, as float32 where A is."""
    return map_on("dynamic", A.device) if code is None else code.to(A.device, torch.float32)
