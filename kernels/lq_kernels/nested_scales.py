"""Double quantisation: the scales of 4-bit blocks kept in 8 bits, so that a value in blocks of 64 takes 4.127 bits.

    offset       = mean(scale)                                          (float32)
    d            = scale - offset
    nested_scale = max(|d|) of each block of 256
    scale_codes  = index in bitsandbytes' signed dynamic map of the value nearest to d * (1 / nested_scale)

and back scale = map[scale_codes] * nested_scale + offset, both operations rounded to float32.

The mean is that of ordered_mean.py, the same on every device and within float32 rounding of torch.mean.
Where all d of a block are zero or subnormal nested_scale is 0. A scale that is not finite makes the offset NaN or
infinite, so that no value of the tensor is read back as finite.

Source: QLoRA, section 3, https://arxiv.org/abs/2305.14314
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lq_kernels._op import op, op_with_out
from lq_kernels._triton import tl, triton
from lq_kernels.blockwise import SMALLEST_SCALE
from lq_kernels.blockwise_4bit import (
    NESTED_BLOCK_SIZE,
    dequantize_4bit_out,
    launch_dequantize,
    launch_quantize,
    new_packed,
    quantize_4bit,
)
from lq_kernels.codebooks import dynamic_map
from lq_kernels.layout_4bit import blocks_of, check_codes, check_contiguous
from lq_kernels.nearest import NearestTable, load_nearest, nearest_code
from lq_kernels.ordered_mean import PARTIALS, launch_partial_sums, mean_of_partials, ordered_mean

_MAP = "dynamic"  # bitsandbytes' signed map: it has no -1, but files hold its codes
_TILE = 4096  # scales per program
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)


@op
def quantize_scales(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """scale (n,) float32 -> scale_codes (n,) uint8, nested_scale (ceil(n / 256),) float32, offset () float32.

    Of no scales the offset is 0. ValueError: another dtype or number of dimensions.
    """
    _check_scales(scale)
    offset = ordered_mean(scale)
    d = F.pad(scale - offset, (0, -scale.shape[0] % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    amax = d.abs().amax(dim=1)
    nested_scale = torch.where(amax < SMALLEST_SCALE, 0.0, amax)
    inverse = torch.where(nested_scale == 0, 0.0, torch.ones_like(amax) / nested_scale)
    codes = NearestTable.of(dynamic_map(_MAP)).nearest(d * inverse[:, None])
    return codes.view(-1)[: scale.shape[0]], nested_scale, offset


@quantize_scales.fake
def _quantize_scales_fake(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_scales(scale)
    nested_scale = scale.new_empty(blocks_of(scale.shape[0], NESTED_BLOCK_SIZE))
    return torch.empty_like(scale, dtype=torch.uint8), nested_scale, scale.new_empty(())


@op
def dequantize_scales(scale_codes: Tensor, nested_scale: Tensor, offset: Tensor) -> Tensor:
    """What `quantize_scales` returned -> scale (n,) float32. ValueError: tensors that do not fit together."""
    check_nested(scale_codes, nested_scale, offset, scale_codes.shape[0])
    d = dynamic_map(_MAP).index_select(0, scale_codes.int())
    return d * nested_scale.repeat_interleave(NESTED_BLOCK_SIZE)[: len(d)] + offset


@dequantize_scales.fake
def _dequantize_scales_fake(scale_codes: Tensor, nested_scale: Tensor, offset: Tensor) -> Tensor:
    check_nested(scale_codes, nested_scale, offset, scale_codes.shape[0])
    return torch.empty_like(scale_codes, dtype=torch.float32)


@op
def quantize_4bit_double(
    x: Tensor, block_size: int = 64, quant_type: str = "nf4", storage: torch.dtype = torch.uint8
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x -> packed, scale_codes, nested_scale, offset: `quantize_4bit`, then `quantize_scales`; three launches."""
    packed, scale = quantize_4bit.reference(x, block_size, quant_type, storage)
    return packed, *quantize_scales.reference(scale)


@quantize_4bit_double.fake
def _quantize_4bit_double_fake(
    x: Tensor, block_size: int = 64, quant_type: str = "nf4", storage: torch.dtype = torch.uint8
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packed, scale = new_packed(x, block_size, quant_type, storage)
    return packed, *_quantize_scales_fake(scale)


@op
def dequantize_4bit_double(
    packed: Tensor,
    scale_codes: Tensor,
    nested_scale: Tensor,
    offset: Tensor,
    block_size: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """What `quantize_4bit_double` returned -> x of `shape` in `dtype`: `dequantize_4bit` of the scales read back."""
    out = _dequantize_4bit_double_fake(packed, scale_codes, nested_scale, offset, block_size, quant_type, shape, dtype)
    dequantize_4bit_double_out.reference(packed, scale_codes, nested_scale, offset, block_size, quant_type, out)
    return out


@dequantize_4bit_double.fake
def _dequantize_4bit_double_fake(
    packed: Tensor,
    scale_codes: Tensor,
    nested_scale: Tensor,
    offset: Tensor,
    block_size: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    check_codes(packed, block_size, quant_type, math.prod(shape), dtype)
    check_nested(scale_codes, nested_scale, offset, blocks_of(math.prod(shape), block_size))
    return packed.new_empty(shape, dtype=dtype)


@op_with_out("out")
def dequantize_4bit_double_out(
    packed: Tensor,
    scale_codes: Tensor,
    nested_scale: Tensor,
    offset: Tensor,
    block_size: int,
    quant_type: str,
    out: Tensor,
) -> None:
    """`dequantize_4bit_double` into out, contiguous, of its shape and dtype."""
    _check_dequantize_double_out(packed, scale_codes, nested_scale, offset, block_size, quant_type, out)
    scale = dequantize_scales.reference(scale_codes, nested_scale, offset)
    dequantize_4bit_out.reference(packed, scale, block_size, quant_type, out)


@dequantize_4bit_double_out.fake
def _check_dequantize_double_out(
    packed: Tensor,
    scale_codes: Tensor,
    nested_scale: Tensor,
    offset: Tensor,
    block_size: int,
    quant_type: str,
    out: Tensor,
) -> None:
    check_codes(packed, block_size, quant_type, out.numel(), out.dtype)
    check_nested(scale_codes, nested_scale, offset, blocks_of(out.numel(), block_size))
    check_contiguous(out, "out")


def _check_scales(scale: Tensor) -> None:
    if scale.ndim != 1 or scale.dtype != torch.float32:
        raise ValueError(f"scales are float32 of one dimension, got {scale.dtype} {tuple(scale.shape)}")


def check_nested(scale_codes: Tensor, nested_scale: Tensor, offset: Tensor, blocks: int) -> None:
    """Raises unless these are the scales of so many blocks."""
    expected = {
        "scale_codes": (scale_codes, torch.uint8, (blocks,)),
        "nested_scale": (nested_scale, torch.float32, (blocks_of(blocks, NESTED_BLOCK_SIZE),)),
        "offset": (offset, torch.float32, ()),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(
                f"{name} of {blocks} blocks must be {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}: "
                "was it made with another block size?"
            )


@cache
def _map(device: torch.device) -> Tensor:
    return dynamic_map(_MAP).to(device)


@triton.jit
def _quantize_scales_kernel(
    scale_ptr,
    partial_ptr,
    map_ptr,
    codes_ptr,
    nested_scale_ptr,
    offset_ptr,
    count,
    float_count,
    partials,
    PARTIALS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """BLOCKS nested blocks per program; each adds up all partial sums for itself."""
    offset = mean_of_partials(partial_ptr, partials, float_count, PARTIALS)
    tl.store(offset_ptr + tl.arange(0, 1), offset, mask=tl.program_id(0) == 0)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    index = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    d = tl.load(scale_ptr + index, mask=index < count, other=0.0) - offset[None, :]
    d = tl.where(index < count, d, 0.0)
    amax = tl.max(d.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True).to(tl.float32, bitcast=True)
    nested_scale = tl.where(amax < _SMALLEST_SCALE, 0.0, amax)
    one = tl.full(nested_scale.shape, 1.0, tl.float32)
    v = d * tl.where(nested_scale == 0, 0.0, tl.div_rn(one, nested_scale))
    v = tl.reshape(tl.where(v == v, v, 0.0), (BLOCKS * BLOCK_SIZE,))
    codes = tl.reshape(nearest_code(v, load_nearest(map_ptr)), (BLOCKS, BLOCK_SIZE))
    tl.store(codes_ptr + index, codes.to(tl.uint8), mask=index < count)
    tl.store(nested_scale_ptr + block, nested_scale, mask=block * BLOCK_SIZE < count)


@triton.jit
def _dequantize_scales_kernel(
    codes_ptr, nested_scale_ptr, offset_ptr, map_ptr, scale_ptr, count, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr
):
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    codes = tl.load(codes_ptr + index, mask=index < count, other=0)
    nested_scale = tl.load(nested_scale_ptr + index // BLOCK_SIZE, mask=index < count, other=0.0)
    scale = tl.load(map_ptr + codes) * nested_scale + tl.load(offset_ptr)
    tl.store(scale_ptr + index, scale, mask=index < count)


@quantize_scales.triton
def _launch_quantize_scales(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes, nested_scale, offset = _quantize_scales_fake(scale)
    count = scale.shape[0]
    if not count:
        return codes, nested_scale, offset.zero_()
    scale = scale.contiguous()
    partial = launch_partial_sums(scale)
    _quantize_scales_kernel[(triton.cdiv(count, _TILE),)](
        scale,
        partial,
        _map(scale.device),
        codes,
        nested_scale,
        offset,
        count,
        float(count),
        len(partial),
        PARTIALS=PARTIALS,
        BLOCKS=_TILE // NESTED_BLOCK_SIZE,
        BLOCK_SIZE=NESTED_BLOCK_SIZE,
        enable_fp_fusion=False,  # here and below products and sums are rounded one by one
    )
    return codes, nested_scale, offset


@dequantize_scales.triton
def _launch_dequantize_scales(scale_codes: Tensor, nested_scale: Tensor, offset: Tensor) -> Tensor:
    scale = _dequantize_scales_fake(scale_codes, nested_scale, offset)
    count = scale.shape[0]
    if count:
        _dequantize_scales_kernel[(triton.cdiv(count, _TILE),)](
            scale_codes.contiguous(),
            nested_scale.contiguous(),
            offset,
            _map(scale.device),
            scale,
            count,
            BLOCK_SIZE=NESTED_BLOCK_SIZE,
            TILE=_TILE,
            enable_fp_fusion=False,
        )
    return scale


@quantize_4bit_double.triton
def _launch_quantize_4bit_double(
    x: Tensor, block_size: int = 64, quant_type: str = "nf4", storage: torch.dtype = torch.uint8
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packed, scale = new_packed(x, block_size, quant_type, storage)
    launch_quantize(x, block_size, quant_type, packed, scale)
    return packed, *_launch_quantize_scales(scale)


@dequantize_4bit_double.triton
def _launch_dequantize_4bit_double(
    packed: Tensor,
    scale_codes: Tensor,
    nested_scale: Tensor,
    offset: Tensor,
    block_size: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    out = _dequantize_4bit_double_fake(packed, scale_codes, nested_scale, offset, block_size, quant_type, shape, dtype)
    _launch_dequantize_4bit_double_out(packed, scale_codes, nested_scale, offset, block_size, quant_type, out)
    return out


@dequantize_4bit_double_out.triton
def _launch_dequantize_4bit_double_out(
    packed: Tensor,
    scale_codes: Tensor,
    nested_scale: Tensor,
    offset: Tensor,
    block_size: int,
    quant_type: str,
    out: Tensor,
) -> None:
    _check_dequantize_double_out(packed, scale_codes, nested_scale, offset, block_size, quant_type, out)
    nested = _map(out.device), nested_scale.contiguous(), offset
    launch_dequantize(packed, scale_codes, block_size, quant_type, out, nested)
