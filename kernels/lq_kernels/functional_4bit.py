"""bitsandbytes' 4-bit functions by its names: two codes to a byte, absmax of each block, all else in a QuantState.

    A = code[codes] * absmax        code: the map "nf4" or "fp4"

A NaN or an infinity shows in its whole block (with compressed statistics in the whole tensor); a zero block has absmax
0 and the codes of zero. The packed tensor is (bytes / itemsize, 1): a view of the bytes as `quant_storage`.
"""

import torch
from torch import Tensor

from lq_kernels import blockwise_4bit, nested_scales
from lq_kernels.blockwise_4bit import NESTED_BLOCK_SIZE, blocks_of, bytes_of, check_quantize
from lq_kernels.codebooks import four_bit_map
from lq_kernels.functional_8bit import plain_absmax
from lq_kernels.functional_arguments import check_devices, check_dtype, map_on
from lq_kernels.packed_4bit import Nested, Packed4bit
from lq_kernels.quant_state import QuantState

BLOCK_SIZE_4BIT = 64


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """A float -> packed codes (bytes / itemsize, 1) of dtype quant_storage, and the state to read them back.

    A is float32, bfloat16 or float16; blocksize a power of two from 32 to 4096, None is 64; quant_type "nf4" or "fp4";
    anything else is a ValueError. `out` and `absmax` (ceil(numel / blocksize),) float32 are written if given.
    compress_statistics quantises absmax less its mean, `offset`, in 8 bits and blocks of 256.
    """
    blocksize = BLOCK_SIZE_4BIT if blocksize is None else blocksize
    check_quantize(A, blocksize, quant_type, quant_storage)
    state = QuantState(A, A.shape, map_on(quant_type, A.device), blocksize, quant_type, A.dtype)
    if out is None and absmax is None and compress_statistics:
        packed, *nested = nested_scales.quantize_4bit_double(A, blocksize, quant_type, quant_storage)
        return packed, _with_nested(state, *nested)
    if out is None and absmax is None:
        packed, state.absmax = blockwise_4bit.quantize_4bit(A, blocksize, quant_type, quant_storage)
        return packed, state
    if out is None:
        size = bytes_of(A.numel()) // quant_storage.itemsize
        out = torch.empty(size, 1, dtype=quant_storage, device=A.device)
    state.absmax = torch.empty(blocks_of(A.numel(), blocksize), device=A.device) if absmax is None else absmax
    check_devices(A, out=out, absmax=state.absmax)
    blockwise_4bit.quantize_4bit_out(A, blocksize, quant_type, out, state.absmax)
    return out, _with_nested(state, *nested_scales.quantize_scales(state.absmax)) if compress_statistics else state


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """Packed codes -> values of the state's shape and dtype; the product is float32, rounded once.

    With a state the arguments after it do not count, except `out`. Without one absmax and out are needed, else
    ValueError, and out says shape and dtype. A packed row, (1, n) with n > 1, is taken for a transposed column and
    gives the transposed matrix.
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("dequantize_4bit needs quant_state, or absmax and out: pass what quantize_4bit gave")
        blocksize = BLOCK_SIZE_4BIT if blocksize is None else blocksize
        quant_state = QuantState(absmax, out.shape, None, blocksize, quant_type, out.dtype)
    packed = as_packed(A, quant_state)
    values = packed.dequantize() if out is None else _dequantize_into(packed, out)
    transposed = A.ndim == 2 and A.shape[0] == 1 and A.shape[1] > 1
    return values.t() if transposed and values.ndim == 2 else values


def quantize_fp4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """`quantize_4bit` with quant_type "fp4"."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def quantize_nf4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """`quantize_4bit` with quant_type "nf4"."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def dequantize_fp4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """`dequantize_4bit` of fp4; ValueError for a state of another type."""
    _check_type(quant_state, "fp4")
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def dequantize_nf4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """`dequantize_4bit` of nf4; ValueError for a state of another type."""
    _check_type(quant_state, "nf4")
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> Tensor:
    """The (16,) float32 map of "nf4" or "fp4"; NotImplementedError for the others that bitsandbytes has a table of.

    device None is the GPU where there is one. blocksize does not change these two maps.
    """
    if typename not in QuantState.valid_quant_types:
        raise NotImplementedError(f"no op takes {typename!r}; there are {QuantState.valid_quant_types}")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    return four_bit_map(typename).clone().to(device)


def as_packed(A: Tensor, state: QuantState) -> Packed4bit:
    """The packed codes A and their state in one."""
    if state.quant_type is None or state.shape is None:
        raise ValueError("this is the state of 8-bit codes: dequantize_blockwise reads those")
    block_size, dtype = state.form()
    inner, offset = state.state2, state.offset
    if inner is None or offset is None or inner.blocksize != NESTED_BLOCK_SIZE:
        check_devices(A, **{"quant_state.absmax": state.absmax})
        return Packed4bit(A, plain_absmax(state), block_size, state.quant_type, tuple(state.shape), dtype)
    check_devices(A, **{"quant_state.absmax": state.absmax, "quant_state.state2": inner.absmax, "offset": offset})
    nested = Nested(state.absmax, inner.absmax, offset)
    return Packed4bit(A, None, block_size, state.quant_type, tuple(state.shape), dtype, nested)


def _dequantize_into(packed: Packed4bit, out: Tensor) -> Tensor:
    check_devices(packed.packed, out=out)
    check_dtype(out, packed.dtype, "out")
    if out.shape != packed.shape:
        raise ValueError(f"out must have the shape of the state, {packed.shape}, got {tuple(out.shape)}")
    form = packed.block_size, packed.quant_type, out
    if packed.nested is None:
        blockwise_4bit.dequantize_4bit_out(packed.packed, packed.plain_scale(), *form)
    else:
        scales = packed.nested.scale_codes, packed.nested.nested_scale, packed.nested.offset
        nested_scales.dequantize_4bit_double_out(packed.packed, *scales, *form)
    return out


def _with_nested(state: QuantState, codes: Tensor, absmax: Tensor, offset: Tensor) -> QuantState:
    state.absmax, state.offset = codes, offset
    code = map_on("dynamic", absmax.device)
    state.state2 = QuantState(absmax, code=code, blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32)
    return state


def _check_type(state: QuantState | None, quant_type: str) -> None:
    if state is not None and state.quant_type != quant_type:
        raise ValueError(f"dequantize_{quant_type} got a state of {state.quant_type}: dequantize_4bit reads any")
