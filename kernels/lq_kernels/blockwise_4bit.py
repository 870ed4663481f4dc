"""4-bit blockwise quantisation: each block of neighbouring values shares one float32 scale, x = map[codes] * scale.

    scale = max(|x|) of the block          (float32)
    v     = x * (1 / scale)                (quotient and product rounded to float32)
    codes = index of the value of the map that is nearest to v

Blocks are flat, in row-major order, and the last one may be short. Two codes share a byte, element 2i in the high
nibble and 2i + 1 in the low one; behind an odd number of elements lies the code of zero. The bytes may be kept as
another dtype: a view of their bits, so that whoever moves parameters of that dtype moves them too.

"nf4" holds quantiles of the normal distribution, and a tie goes to the lower value. "fp4" is a sign and three bits, and
a tie goes to the smaller magnitude; a negative v that is nearest to zero has the code 8, which stands for -0.

A zero block, and one whose amax is subnormal, has scale 0 and codes of zero. A NaN or an infinity makes the scale of
its block NaN or infinite and its codes those of zero, so that the whole block is read back as NaN.

Source: QLoRA, sections 2 and 3, https://arxiv.org/abs/2305.14314; the layout is that of bitsandbytes' checkpoints.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lq_kernels._op import op, op_with_out
from lq_kernels._triton import tl, triton
from lq_kernels.blockwise import SMALLEST_SCALE
from lq_kernels.codebooks import four_bit_map
from lq_kernels.layout_4bit import (
    blocks_of,
    bytes_of,
    check_bytes,
    check_codes,
    check_contiguous,
    check_quantize,
    check_scale,
)
from lq_kernels.nearest import NearestTable
from lq_kernels.nibble_codes import MAGNITUDES, ascending, decode_pairs, decode_table, encode_pairs, encode_table

NESTED_BLOCK_SIZE = 256  # scales that share one scale of their own

_TILE = 4096  # values per program: one block of the largest size
_VECTOR = 16  # bytes that a thread reads or writes at once
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)


@op
def quantize_4bit(
    x: Tensor, block_size: int = 64, quant_type: str = "nf4", storage: torch.dtype = torch.uint8
) -> tuple[Tensor, Tensor]:
    """x float, n values of any shape -> packed (ceil(n / 2) / itemsize, 1) of dtype `storage`, scale (blocks,) float32.

    x is float32, bfloat16 or float16, block_size one of BLOCK_SIZES, quant_type one of QUANT_TYPES, else ValueError.
    RuntimeError: the number of bytes is no multiple of the item size of `storage`.
    """
    check_quantize(x, block_size, quant_type, storage)
    packed, scale = _quantize(x, block_size, quant_type)
    return packed.view(storage).view(-1, 1), scale


@quantize_4bit.fake
def new_packed(
    x: Tensor, block_size: int = 64, quant_type: str = "nf4", storage: torch.dtype = torch.uint8
) -> tuple[Tensor, Tensor]:
    check_quantize(x, block_size, quant_type, storage)
    packed = x.new_empty(bytes_of(x.numel()) // storage.itemsize, 1, dtype=storage)
    return packed, x.new_empty(blocks_of(x.numel(), block_size), dtype=torch.float32)


@op_with_out("packed", "scale")
def quantize_4bit_out(x: Tensor, block_size: int, quant_type: str, packed: Tensor, scale: Tensor) -> None:
    """`quantize_4bit` into packed, ceil(n / 2) bytes of any shape and dtype, and scale (blocks,), both contiguous."""
    _check_quantize_out(x, block_size, quant_type, packed, scale)
    codes, amax = _quantize(x, block_size, quant_type)
    _bytes(packed).copy_(codes)
    scale.copy_(amax)


@quantize_4bit_out.fake
def _check_quantize_out(x: Tensor, block_size: int, quant_type: str, packed: Tensor, scale: Tensor) -> None:
    check_quantize(x, block_size, quant_type, torch.uint8)
    check_bytes(packed, x.numel())
    check_scale(scale, x.numel(), block_size)
    check_contiguous(packed, "packed")
    check_contiguous(scale, "scale")


@op
def dequantize_4bit(
    packed: Tensor, scale: Tensor, block_size: int, quant_type: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """packed, ceil(n / 2) bytes of any shape and dtype, scale (blocks,) float32 -> x of `shape`, n values, in `dtype`.

    The product map[codes] * scale is taken in float32 and rounded once. ValueError: a size, a dtype, a block size or a
    type of map that does not fit.
    """
    _check_dequantize(packed, scale, block_size, quant_type, math.prod(shape), dtype)
    return _dequantize(packed, scale, block_size, quant_type, math.prod(shape)).view(shape).to(dtype)


@dequantize_4bit.fake
def _dequantize_4bit_fake(
    packed: Tensor, scale: Tensor, block_size: int, quant_type: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    _check_dequantize(packed, scale, block_size, quant_type, math.prod(shape), dtype)
    return packed.new_empty(shape, dtype=dtype)


@op_with_out("out")
def dequantize_4bit_out(packed: Tensor, scale: Tensor, block_size: int, quant_type: str, out: Tensor) -> None:
    """`dequantize_4bit` into out, contiguous, of its shape and dtype."""
    _check_dequantize_out(packed, scale, block_size, quant_type, out)
    out.copy_(_dequantize(packed, scale, block_size, quant_type, out.numel()).view(out.shape))


@dequantize_4bit_out.fake
def _check_dequantize_out(packed: Tensor, scale: Tensor, block_size: int, quant_type: str, out: Tensor) -> None:
    _check_dequantize(packed, scale, block_size, quant_type, out.numel(), out.dtype)
    check_contiguous(out, "out")


def _quantize(x: Tensor, block_size: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """x -> bytes (ceil(n / 2),) uint8, scale (blocks,)."""
    flat = x.detach().reshape(-1).float()
    blocks = F.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    amax = blocks.abs().amax(dim=1)
    scale = torch.where(amax < SMALLEST_SCALE, 0.0, amax)
    inverse = torch.where(scale == 0, 0.0, torch.ones_like(scale) / scale)
    codes = _nearest(blocks * inverse[:, None], quant_type)
    codes = torch.where(scale.isfinite()[:, None], codes, _zero_code(quant_type)).view(-1, 2)
    return (codes[:, 0] << 4 | codes[:, 1])[: bytes_of(x.numel())], scale


def _nearest(v: Tensor, quant_type: str) -> Tensor:
    values, order = ascending(quant_type)
    if quant_type == "nf4":
        return NearestTable.of(values).nearest(v)
    ranks = NearestTable.of(values).nearest(v.abs())
    return order.index_select(0, ranks.view(-1).int()).view(v.shape) + (v < 0).to(torch.uint8) * MAGNITUDES


def _zero_code(quant_type: str) -> int:
    """The code of 0.0."""
    return int((four_bit_map(quant_type) == 0).nonzero()[0])


def _dequantize(packed: Tensor, scale: Tensor, block_size: int, quant_type: str, numel: int) -> Tensor:
    """(numel,) float32."""
    codes = _bytes(packed)
    missing = len(scale) * block_size // 2 - len(codes)
    codes = F.pad(codes, (0, missing)) if missing else codes
    values = _pairs(quant_type).index_select(0, codes.int()).view(torch.float32)
    return values.view(-1, block_size).mul_(scale[:, None]).view(-1)[:numel]


@cache
def _pairs(quant_type: str) -> Tensor:
    """(256,) int64: the two float32 values of each byte, the high nibble's first."""
    values = four_bit_map(quant_type)
    return torch.cartesian_prod(values, values).view(torch.int64).view(-1)


def _bytes(packed: Tensor) -> Tensor:
    """(bytes,) uint8; of a contiguous tensor a view."""
    return packed.contiguous().view(-1).view(torch.uint8)


def _check_dequantize(
    packed: Tensor, scale: Tensor, block_size: int, quant_type: str, numel: int, dtype: torch.dtype
) -> None:
    check_codes(packed, block_size, quant_type, numel, dtype)
    check_scale(scale, numel, block_size)


@triton.heuristics({"WHOLE": lambda args: args["numel"] % (args["BLOCKS"] * args["BLOCK_SIZE"]) == 0})
@triton.jit
def _quantize_4bit_kernel(
    x_ptr,
    table_ptr,
    packed_ptr,
    scale_ptr,
    numel,
    num_bytes,
    FP4: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """BLOCKS blocks per program, without masks if that makes a WHOLE tensor.

    A thread owns WIDTH neighbouring values, so that it reads 16 bytes at once and writes theirs at once.
    """
    TILE: tl.constexpr = BLOCKS * BLOCK_SIZE
    BYTES: tl.constexpr = WIDTH // 2
    ZEROS: tl.constexpr = 0x00 if FP4 else 0x77
    # int64: offsets pass 2^31
    start = tl.program_id(0).to(tl.int64) * TILE
    block = start // BLOCK_SIZE + tl.arange(0, BLOCKS)[:, None]
    index = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    byte = start // 2 + tl.arange(0, TILE // WIDTH)[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    x = tl.load(x_ptr + index, mask=None if WHOLE else index < numel, other=None if WHOLE else 0.0).to(tl.float32)
    # As an integer NaN is larger than infinity.
    amax = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True).to(tl.float32, bitcast=True)
    scale = tl.where(amax < _SMALLEST_SCALE, 0.0, amax)
    inverse = tl.where(scale == 0, 0.0, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale))
    packed = encode_pairs(tl.reshape(x * inverse, (TILE,)), table_ptr, FP4)
    packed = tl.where(scale < float("inf"), tl.reshape(packed, (BLOCKS, BLOCK_SIZE // 2)), ZEROS)
    packed = tl.reshape(packed, (TILE // WIDTH, BYTES)).to(tl.uint8)
    tl.store(packed_ptr + byte, packed, mask=None if WHOLE else byte < num_bytes)
    tl.store(scale_ptr + block, scale, mask=None if WHOLE else block * BLOCK_SIZE < numel)


@triton.heuristics({"WHOLE": lambda args: args["numel"] % (args["ROWS"] * args["WIDTH"]) == 0})
@triton.jit
def _dequantize_4bit_kernel(
    packed_ptr,
    scale_ptr,
    map_ptr,
    nested_scale_ptr,
    offset_ptr,
    table_ptr,
    out_ptr,
    numel,
    num_bytes,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """ROWS times WIDTH neighbouring values, which a thread reads and writes at once; WHOLE as above.

    With map_ptr the scales are codes of that map; those of a program share one nested scale.
    """
    TILE: tl.constexpr = ROWS * WIDTH
    BYTES: tl.constexpr = WIDTH // 2
    tl.static_assert(BLOCK_SIZE * NESTED_BLOCK_SIZE % TILE == 0)
    start = tl.program_id(0).to(tl.int64) * TILE
    row = start // WIDTH + tl.arange(0, ROWS)[:, None]
    byte = row * BYTES + tl.arange(0, BYTES)[None, :]
    index = row * WIDTH + tl.arange(0, WIDTH)[None, :]
    packed = tl.load(packed_ptr + byte, mask=None if WHOLE else byte < num_bytes, other=None if WHOLE else 0)
    mask = None if WHOLE else row * WIDTH < numel
    scale = tl.load(scale_ptr + row * WIDTH // BLOCK_SIZE, mask=mask, other=None if WHOLE else 0)
    if map_ptr is not None:
        nested_scale = tl.load(nested_scale_ptr + start // (BLOCK_SIZE * NESTED_BLOCK_SIZE))
        scale = tl.load(map_ptr + scale) * nested_scale + tl.load(offset_ptr)
    out = decode_pairs(packed, table_ptr) * scale
    tl.store(out_ptr + index, out.to(out_ptr.dtype.element_ty), mask=None if WHOLE else index < numel)


@quantize_4bit.triton
def _launch_quantize_4bit(
    x: Tensor, block_size: int = 64, quant_type: str = "nf4", storage: torch.dtype = torch.uint8
) -> tuple[Tensor, Tensor]:
    packed, scale = new_packed(x, block_size, quant_type, storage)
    launch_quantize(x, block_size, quant_type, packed, scale)
    return packed, scale


@quantize_4bit_out.triton
def _launch_quantize_4bit_out(x: Tensor, block_size: int, quant_type: str, packed: Tensor, scale: Tensor) -> None:
    _check_quantize_out(x, block_size, quant_type, packed, scale)
    launch_quantize(x, block_size, quant_type, packed, scale)


@dequantize_4bit.triton
def _launch_dequantize_4bit(
    packed: Tensor, scale: Tensor, block_size: int, quant_type: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    out = _dequantize_4bit_fake(packed, scale, block_size, quant_type, shape, dtype)
    launch_dequantize(packed, scale, block_size, quant_type, out)
    return out


@dequantize_4bit_out.triton
def _launch_dequantize_4bit_out(packed: Tensor, scale: Tensor, block_size: int, quant_type: str, out: Tensor) -> None:
    _check_dequantize_out(packed, scale, block_size, quant_type, out)
    launch_dequantize(packed, scale, block_size, quant_type, out)


def launch_quantize(x: Tensor, block_size: int, quant_type: str, packed: Tensor, scale: Tensor) -> None:
    """Fills packed and scale, both contiguous, in one launch if x is contiguous too."""
    numel = x.numel()
    if numel == 0:
        return
    _quantize_4bit_kernel[(triton.cdiv(numel, _TILE),)](
        x.contiguous(),
        encode_table(quant_type, x.device),
        _bytes(packed),
        scale,
        numel,
        bytes_of(numel),
        FP4=quant_type == "fp4",
        BLOCKS=_TILE // block_size,
        BLOCK_SIZE=block_size,
        WIDTH=_VECTOR // x.itemsize,
        num_warps=2,
        enable_fp_fusion=False,  # the product is rounded before it is compared
    )


def launch_dequantize(
    packed: Tensor,
    scale: Tensor,
    block_size: int,
    quant_type: str,
    out: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None] = (None, None, None),
) -> None:
    """Fills out, contiguous. With `nested`, the map, scale and offset of its codes, `scale` holds uint8 codes."""
    numel = out.numel()
    if numel == 0:
        return
    width = _VECTOR // out.itemsize
    _dequantize_4bit_kernel[(triton.cdiv(numel, _TILE),)](
        _bytes(packed),
        scale.contiguous(),
        *nested,
        decode_table(quant_type, out.device),
        out,
        numel,
        bytes_of(numel),
        ROWS=_TILE // width,
        WIDTH=width,
        BLOCK_SIZE=block_size,
        NESTED_BLOCK_SIZE=NESTED_BLOCK_SIZE,
        enable_fp_fusion=False,
    )
