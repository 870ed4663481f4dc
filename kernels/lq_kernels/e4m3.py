"""The 8-bit float e4m3 as a state of optimizers: the same codes on every GPU, by conversions or by integer arithmetic.

Blocks share a float32 scale of amax / 256, so that x = value * scale with |value| <= 256. 256 is a power of two, and
quantising what was dequantised gives the same codes and scales; it leaves 448, the largest value, unused. Values that
are never negative are kept as their roots, which have twice the range: what is 4e-12 of its block's largest is not 0,
and what is smaller gets the smallest code, because a second moment of 0 would divide the first by eps.

Source of the element type: OCP 8-bit Floating Point Specification, https://arxiv.org/abs/2209.05433
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lq_kernels._triton import tl, triton
from lq_kernels.approximate import square_root
from lq_kernels.blockwise import BLOCK_SIZE, SMALLEST_SCALE

LARGEST = 256.0
SMALLEST = 2.0**-9

_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_LARGEST = tl.constexpr(LARGEST)
_SMALLEST = tl.constexpr(SMALLEST)
_STEEP = tl.constexpr(2.0**110)  # takes every value that is not 0 past the smallest
# The exponent field of 2^-6: below it the spacing stays 2^-9.
_LOWEST_EXPONENT = tl.constexpr(121)
_SPACING = tl.constexpr((20 << 23) + (1 << 22))
_VALUE_OF_BITS = tl.constexpr(2.0**120)

_CONVERTS = tl.constexpr(89)  # the first GPUs that have instructions for it

# Four codes in a word to float32, by way of float16, which holds them all; and back, to the nearest, ties to even.
_FROM_CODES = tl.constexpr("""{
.reg .b16 low, high, x0, x1, x2, x3;
.reg .b32 pair0, pair1;
mov.b32 {low, high}, $4;
cvt.rn.f16x2.e4m3x2 pair0, low;
cvt.rn.f16x2.e4m3x2 pair1, high;
mov.b32 {x0, x1}, pair0;
mov.b32 {x2, x3}, pair1;
cvt.f32.f16 $0, x0;
cvt.f32.f16 $1, x1;
cvt.f32.f16 $2, x2;
cvt.f32.f16 $3, x3;
}""")
_TO_CODES = tl.constexpr("""{
.reg .b16 low, high;
cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
mov.b32 $0, {low, high};
}""")


def quantize_e4m3(x: Tensor, roots: bool) -> tuple[Tensor, Tensor]:
    """x (rows, ...) float32 -> codes float8_e4m3fn of its shape, scale (rows, ceil(numel / rows / 256)) float32.

    With `roots` x >= 0 and the codes are of its roots. Nearest, ties to even; a block whose amax or scale is subnormal
    has scale 0 and zero codes; a NaN or an infinity makes the scale NaN or infinite.
    """
    rows = x.reshape(x.shape[0], -1)
    blocks = F.pad(rows, (0, -rows.shape[1] % BLOCK_SIZE)).reshape(-1, BLOCK_SIZE)
    amax = blocks.abs().amax(dim=1, keepdim=True) if blocks.numel() else blocks.new_empty(0, 1)
    amax = torch.where(amax < SMALLEST_SCALE, 0.0, amax)
    if roots:
        blocks, amax = blocks.sqrt(), amax.sqrt()
    scale = torch.where(amax < SMALLEST_SCALE * LARGEST, 0.0, amax / LARGEST)
    normal = blocks * torch.where(scale == 0, 0.0, torch.full_like(scale, 1.0) / scale)
    if roots:
        normal = torch.where((normal > 0) & (normal < SMALLEST), SMALLEST, normal)
    codes = normal.to(torch.float8_e4m3fn).view(torch.uint8)
    codes = codes.view(rows.shape[0], -1)[:, : rows.shape[1]].reshape(x.shape)
    return codes.view(torch.float8_e4m3fn), scale.view(rows.shape[0], -1)


def dequantize_e4m3(codes: Tensor, scale: Tensor, roots: bool) -> Tensor:
    """The float32 values that `quantize_e4m3` stored."""
    rows = codes.reshape(codes.shape[0], -1).float()
    blocks = F.pad(rows, (0, -rows.shape[1] % BLOCK_SIZE)).view(*scale.shape, BLOCK_SIZE) * scale[..., None]
    x = blocks.view(rows.shape[0], -1)[:, : rows.shape[1]].reshape(codes.shape)
    return x.square() if roots else x


@triton.jit
def decode_e4m3(codes, SIGNED: tl.constexpr, PTX: tl.constexpr):
    """codes uint8 -> their values, float32."""
    if PTX >= _CONVERTS:
        return tl.inline_asm_elementwise(_FROM_CODES, "=f,=f,=f,=f,r", [codes], dtype=tl.float32, is_pure=True, pack=4)
    if SIGNED:
        high = codes.to(tl.uint32) << 24
        bits = (high.to(tl.int32, bitcast=True) >> 4) & -0x78100000  # the sign, and seven bits below the exponent's top
    else:
        bits = codes.to(tl.int32) << 20
    return bits.to(tl.float32, bitcast=True) * _VALUE_OF_BITS


@triton.jit
def _magnitude_code(x):
    """x float32 in [0, 448] -> its code, int32, ties to even.

    Added to 1.5 * 2^20 times the power of two below it, x is rounded to three bits behind its first; the bits of the
    sum count its eighths, and codes are eight to an octave.
    """
    exponent = tl.maximum(x.to(tl.int32, bitcast=True) >> 23, _LOWEST_EXPONENT)
    sum = x + ((exponent << 23) + _SPACING).to(tl.float32, bitcast=True)
    return sum.to(tl.int32, bitcast=True) - exponent * ((1 << 23) - 8) - (_SPACING + 8 * _LOWEST_EXPONENT)


@triton.jit
def _code(x, SIGNED: tl.constexpr, PTX: tl.constexpr):
    """x float32 in [-448, 448] -> its code, uint8."""
    if PTX >= _CONVERTS:
        return tl.inline_asm_elementwise(_TO_CODES, "=r,f,f,f,f", [x], dtype=tl.uint8, is_pure=True, pack=4)
    elif SIGNED:
        sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
        return (_magnitude_code(tl.abs(x)) | sign.to(tl.int32)).to(tl.uint8)
    else:
        return _magnitude_code(x).to(tl.uint8)


@triton.jit
def encode_e4m3(x, inverse, SIGNED: tl.constexpr, PTX: tl.constexpr):
    """x float32, x * inverse (its root * inverse) in [-256, 256] -> codes uint8; of roots only 0 has the code 0.

    PTX is `ptx_arch()`.
    """
    if not SIGNED:
        x = square_root(x, PTX)
    normal = x * inverse
    if not SIGNED:
        normal = tl.maximum(normal, tl.minimum(normal * _STEEP, _SMALLEST))
    return _code(normal, SIGNED, PTX)


@triton.jit
def value_scale(amax):
    """The scale of a block by its amax."""
    return _normal(amax * (1 / _LARGEST))


@triton.jit
def root_scale(amax):
    """The same for a block of which the roots are kept."""
    return _normal(tl.sqrt_rn(amax) * (1 / _LARGEST))


@triton.jit
def _normal(scale):
    return tl.where(scale < _SMALLEST_SCALE, 0.0, scale)
