"""A weight in 4 bits as 8-bit codes with a scale for each row or each column, for 8-bit matrix units.

    amax  = the largest scale of the blocks in the row (column): no value is larger, since |map| <= 1
    scale = amax / largest                               (largest: 127 for int8, 448 for e4m3)
    codes = round(map[4-bit codes] * block scale * (largest / amax))

Both operands of 8-bit matrix units lie along the sum: x @ W.t() wants rows of W, (N, K), and grad @ W wants its columns
one by one, so that the transposed form writes (K, N).

Source: QLoRA, section 3, https://arxiv.org/abs/2305.14314, and rowwise.py.
"""

import torch
from torch import Tensor

from lq_kernels._op import op
from lq_kernels._triton import tl, triton
from lq_kernels.blockwise_4bit import dequantize_4bit
from lq_kernels.element_types import ELEMENT_TYPES, encode, magnitude_bits, require_element_type, scales
from lq_kernels.layout_4bit import as_bytes, check_codes, check_scale
from lq_kernels.nibble_codes import decode_pairs, decode_table

_TILE = 256  # scales of a program
_ROWS, _RUNS = 8, 32  # rows of a program, and runs of 16 codes of each
_TRANSPOSED_ROWS, _TRANSPOSED_RUNS = 64, 4

Result = tuple[Tensor, Tensor]


@op
def requantize_4bit(
    packed: Tensor,
    scale: Tensor,
    block_size: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype = torch.int8,
    transposed: bool = False,
) -> Result:
    """W of `shape` (N, K) as `quantize_4bit` packed it -> codes (N, K) of `dtype`, scale (N, 1) float32.

    transposed: codes (K, N), contiguous, scale (K, 1). dtype is int8, float8_e4m3fn or float8_e5m2; fp8 on a GPU
    without it is a RuntimeError. A row (column) with a block scale that is not finite has codes 0 and that scale; one
    of zeros has codes 0 and scale 0. ValueError: K is no multiple of block_size, or sizes that do not fit together.
    """
    _check(packed, scale, block_size, quant_type, shape, dtype)
    weight = dequantize_4bit.reference(packed, scale, block_size, quant_type, shape, torch.float32)
    amax = _amax(scale, block_size, shape, transposed)
    if transposed:
        weight, amax = weight.t(), amax.repeat_interleave(block_size)
    return ELEMENT_TYPES[dtype].quantize(weight, amax[:, None], None)


@requantize_4bit.fake
def _requantize_4bit_fake(
    packed: Tensor,
    scale: Tensor,
    block_size: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype = torch.int8,
    transposed: bool = False,
) -> Result:
    _check(packed, scale, block_size, quant_type, shape, dtype)
    rows, columns = reversed(shape) if transposed else shape
    return packed.new_empty(rows, columns, dtype=dtype), scale.new_empty(rows, 1)


def _amax(scale: Tensor, block_size: int, shape: list[int], transposed: bool) -> Tensor:
    """(N,) of rows or, transposed, (K / block_size,) of columns of blocks."""
    by_row = scale.view(shape[0], shape[1] // block_size)
    if by_row.numel() == 0:
        return scale.new_zeros(by_row.shape[1 if transposed else 0])
    return by_row.amax(dim=0 if transposed else 1)


def _check(
    packed: Tensor, scale: Tensor, block_size: int, quant_type: str, shape: list[int], dtype: torch.dtype
) -> None:
    if len(shape) != 2:
        raise ValueError(f"requantize_4bit takes a matrix, got shape {tuple(shape)}")
    check_codes(packed, block_size, quant_type, shape[0] * shape[1], torch.float32)
    check_scale(scale, shape[0] * shape[1], block_size)
    if shape[1] % block_size:
        raise ValueError(
            f"requantize_4bit takes rows of whole blocks, got {shape[1]} columns in blocks of {block_size}: "
            "pad them, or multiply in 16 bits"
        )
    if dtype not in ELEMENT_TYPES:
        raise TypeError(f"requantize_4bit returns codes of {', '.join(map(str, ELEMENT_TYPES))}, not {dtype}")


@triton.jit
def _scales_of_amax_kernel(
    amax_ptr,
    scale_ptr,
    factor_ptr,
    count,
    REPEAT: tl.constexpr,
    TILE: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
):
    """amax (count / REPEAT,) -> scale (count,), and the factor of each amax: 0 where there is nothing to quantise."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    amax = tl.load(amax_ptr + at // REPEAT, mask=at < count, other=0.0)
    scale, factor, quantizable = scales(magnitude_bits(amax), LARGEST, SMALLEST_AMAX)
    tl.store(scale_ptr + at, scale, mask=at < count)
    first = (at < count) & (at % REPEAT == 0)
    tl.store(factor_ptr + at // REPEAT, tl.where(quantizable, factor, 0.0), mask=first)


@triton.jit
def _requantize_4bit_kernel(
    packed_ptr,
    scale_ptr,
    factor_ptr,
    table_ptr,
    codes_ptr,
    N,
    K,
    BLOCK_N: tl.constexpr,
    RUNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """RUNS of 16 neighbours along K, which share a block, for each of BLOCK_N rows."""
    # int64: row * K passes 2^31
    run = tl.arange(0, BLOCK_N * RUNS)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + run // RUNS
    k = (tl.program_id(0) * RUNS + run % RUNS) * 16
    here = (n < N) & (k < K)
    byte = (n * (K // 2) + k // 2)[:, None] + tl.arange(0, 8)[None, :]
    packed = tl.load(packed_ptr + byte, mask=here[:, None], other=0)
    scale = tl.load(scale_ptr + n * (K // BLOCK_SIZE) + k // BLOCK_SIZE, mask=here, other=0.0)
    factor = tl.load(factor_ptr + (k // BLOCK_SIZE if TRANSPOSED else n), mask=here, other=0.0)[:, None]
    value = decode_pairs(packed, table_ptr) * scale[:, None]
    codes = encode(value, factor, factor > 0, None, codes_ptr.dtype.element_ty, LARGEST)
    if TRANSPOSED:
        codes = tl.trans(tl.reshape(codes, (BLOCK_N, 16 * RUNS)))
        n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.program_id(0) * (16 * RUNS) + tl.arange(0, 16 * RUNS)
        out = codes_ptr + k.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out, codes, mask=(k < K)[:, None] & (n < N)[None, :])
    else:
        out = (n * K + k)[:, None] + tl.arange(0, 16)[None, :]
        tl.store(codes_ptr + out, codes, mask=here[:, None])


@requantize_4bit.triton
def _launch_requantize_4bit(
    packed: Tensor,
    scale: Tensor,
    block_size: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype = torch.int8,
    transposed: bool = False,
) -> Result:
    codes, out_scale = _requantize_4bit_fake(packed, scale, block_size, quant_type, shape, dtype, transposed)
    require_element_type(dtype, packed.device, "requantize_4bit")
    (N, K), element = shape, ELEMENT_TYPES[dtype]
    if not codes.numel():
        out_scale.zero_()
        return codes, out_scale
    scale = scale.contiguous()
    amax = _amax(scale, block_size, shape, transposed)
    factor = torch.empty_like(amax)
    _scales_of_amax_kernel[(triton.cdiv(len(out_scale), _TILE),)](
        amax,
        out_scale,
        factor,
        len(out_scale),
        REPEAT=block_size if transposed else 1,
        TILE=_TILE,
        LARGEST=element.largest,
        SMALLEST_AMAX=element.smallest_amax,
        enable_fp_fusion=False,
    )
    rows, runs = (_TRANSPOSED_ROWS, _TRANSPOSED_RUNS) if transposed else (_ROWS, _RUNS)
    _requantize_4bit_kernel[(triton.cdiv(K, 16 * runs), triton.cdiv(N, rows))](
        as_bytes(packed),
        scale,
        factor,
        decode_table(quant_type, packed.device),
        codes,
        N,
        K,
        BLOCK_N=rows,
        RUNS=runs,
        BLOCK_SIZE=block_size,
        TRANSPOSED=transposed,
        LARGEST=element.largest,
        enable_fp_fusion=False,  # products are rounded one by one, as in the reference
    )
    return codes, out_scale
