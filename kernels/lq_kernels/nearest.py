"""The nearest value of a code book: its reference and its kernel functions, and the ops that take no scale.

The code of v is the number of midpoints between neighbouring values that lie below v: exact for any ascending map, ties
to the lower index. To count them, v goes to one of many buckets by a function that never decreases. All midpoints in
lower buckets are below v and all in higher ones are not, so if a bucket holds at most one midpoint, one comparison
settles it. Both backends do so, with different buckets; where a bucket holds more, more comparisons follow.

The kernels' buckets are cheap, and fine where maps are: shifting the bits of a float to the right by two divides its
exponent by four, which gives about |v|^(1/4), times a constant; the buckets are equal steps of that. The dynamic maps,
linear ones and e4m3 then have one midpoint in a bucket at most; in a map that has more, a binary search takes eight
comparisons. Each program makes its table from the 256 values, faster than another launch: there is nothing to cache.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lq_kernels._op import op, op_with_out
from lq_kernels._triton import device_limits, tl, triton
from lq_kernels.codebooks import CODES, midpoints

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_FEW = 16  # comparisons in the reference: beyond that a binary search is faster

TILE = 4096  # values in one step of a program
WARPS = 4
PROGRAMS = 12  # for each multiprocessor: it holds 3 or 4 at a time, and both divide this

_CODES = tl.constexpr(CODES)
_BUCKETS = tl.constexpr(1024)
_ROUNDING = tl.constexpr(1.5 * 2.0**14)  # times 2^n, added to x: leaves round(x / 2^(n - 9)) in the low bits
_WITHOUT_UPPER_EXPONENT = tl.constexpr(-0x60000001)  # clears the bits 29 and 30
_EXPONENT = tl.constexpr(0x7F800000)  # of a float32
_NARROWEST = tl.constexpr(2.0**-110)  # range of roots that is told apart
_VECTOR_BITS = tl.constexpr(128)  # of the widest load and store


@dataclass(frozen=True)
class NearestTable:
    """Finds the nearest code of a float32 by its upper 16 bits and a comparison with the midpoint in that bucket.

    `first[bucket]` is the code of the smallest value of the bucket, `comparisons` the most midpoints that any bucket
    holds: 1 for the dynamic maps, whose midpoints are wider apart than the 7 mantissa bits of a bucket.
    """

    first: Tensor  # (65536,) uint8, buckets in the order of the upper 16 bits as a signed integer
    bounds: Tensor  # (n,) float32: the midpoints, then infinity
    comparisons: int

    @classmethod
    def of(cls, code: Tensor, keep_small: bool = False) -> "NearestTable":
        """Of a map (n,) float32 with n <= 256; ValueError unless it ascends.

        keep_small: only what is not above 0 has the code 0, of a map whose first value is 0.
        """
        code = code.detach().cpu().contiguous()
        return _table_of_bytes(code.numpy().tobytes(), keep_small)

    def nearest(self, v: Tensor) -> Tensor:
        """v float32 -> codes uint8 of its shape: the nearest value, ties to the lower index; NaN counts as 0."""
        return self.nearest_number(v.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf))

    def nearest_number(self, v: Tensor) -> Tensor:
        """`nearest` where there is no NaN."""
        first, bounds = self.first.to(v.device), self.bounds.to(v.device)
        flat = v.reshape(-1)
        if self.comparisons > _FEW:
            return torch.searchsorted(bounds[:-1], flat).to(torch.uint8).view(v.shape)
        bucket = (flat.view(torch.int32) >> 16).add_(1 << 15)
        codes = first.index_select(0, bucket)
        for _ in range(self.comparisons):
            codes += flat > bounds.index_select(0, codes.long())  # int64: the faster index on a CPU
        return codes.view(v.shape)


@cache
def _table_of_bytes(code_bytes: bytes, keep_small: bool) -> NearestTable:
    code = torch.frombuffer(bytearray(code_bytes), dtype=torch.float32)
    if not (code.diff() >= 0).all():
        raise ValueError("a code book ascends, this one does not: sort it, code.sort().values")
    bounds = midpoints(code)
    if keep_small:
        bounds[0] = 0.0
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32)
    of_ends = torch.searchsorted(bounds, ends)
    # A bucket that reaches into the NaNs has its infinity at one end; a bucket of NaNs alone has none.
    of_ends = torch.where(ends.isnan(), torch.where(ends.isnan().all(dim=0), 0, of_ends.amin(dim=0)), of_ends)
    lowest, highest = of_ends.amin(dim=0), of_ends.amax(dim=0)
    return NearestTable(
        first=lowest.to(torch.uint8),
        bounds=torch.cat([bounds, torch.tensor([torch.inf])]),
        comparisons=int((highest - lowest).max()),
    )


@op
def quantize_values(x: Tensor, code: Tensor) -> Tensor:
    """x float of any shape -> codes uint8 of its shape: the nearest value of `code` to x itself.

    x is float32, bfloat16 or float16; `code` is (256,) float32, ascending, on the device of x (values that do not
    ascend are an error on the CPU and give wrong codes on a GPU). Ties go to the lower index, values beyond an end of
    the map to that end, a NaN to the code of 0. Source: https://arxiv.org/abs/2110.02861, section 1.2.
    """
    codes = _quantize_values_fake(x, code)
    return codes.copy_(NearestTable.of(code).nearest(x.float()))


@quantize_values.fake
def _quantize_values_fake(x: Tensor, code: Tensor) -> Tensor:
    check_values(x, code, "quantize_values")
    return torch.empty(x.shape, dtype=torch.uint8, device=x.device)


@op
def dequantize_values(codes: Tensor, code: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes uint8 of any shape, code (256,) float32 on their device -> code[codes] in `dtype` (16 or 32 bits)."""
    x = _dequantize_values_fake(codes, code, dtype)
    return x.copy_(code.index_select(0, codes.reshape(-1).long()).view(codes.shape))


@dequantize_values.fake
def _dequantize_values_fake(codes: Tensor, code: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    check_codes(codes, code, dtype, "dequantize_values")
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


@op_with_out("codes")
def quantize_values_out(x: Tensor, code: Tensor, codes: Tensor) -> None:
    """`quantize_values` into `codes`, uint8, contiguous, of the shape and on the device of x."""
    _quantize_values_out_fake(x, code, codes)
    codes.copy_(quantize_values.reference(x, code))


@quantize_values_out.fake
def _quantize_values_out_fake(x: Tensor, code: Tensor, codes: Tensor) -> None:
    check_values(x, code, "quantize_values_out")
    check_out(codes, "codes", x.shape, torch.uint8, x.device)


@op_with_out("out")
def dequantize_values_out(codes: Tensor, code: Tensor, out: Tensor) -> None:
    """`dequantize_values` into `out`: a float of 16 or 32 bits, contiguous, of the shape and on the device of codes."""
    _dequantize_values_out_fake(codes, code, out)
    out.copy_(dequantize_values.reference(codes, code))


@dequantize_values_out.fake
def _dequantize_values_out_fake(codes: Tensor, code: Tensor, out: Tensor) -> None:
    check_codes(codes, code, out.dtype, "dequantize_values_out")
    check_out(out, "out", codes.shape, out.dtype, codes.device)


def check_values(x: Tensor, code: Tensor, name: str) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} takes float32, bfloat16 or float16, got {x.dtype}: cast it, x.float()")
    _check_code(code, x.device)


def check_codes(codes: Tensor, code: Tensor, dtype: torch.dtype, name: str) -> None:
    if codes.dtype != torch.uint8 or dtype not in FLOATS:
        raise TypeError(f"{name} takes uint8 to float32, bfloat16 or float16, got {codes.dtype} to {dtype}")
    _check_code(code, codes.device)


def check_out(out: Tensor, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    expected = (tuple(shape), dtype, device, True)
    got = (tuple(out.shape), out.dtype, out.device, out.is_contiguous())
    if got != expected:
        raise ValueError(f"{name} must be (shape, dtype, device, contiguous) = {expected}, got {got}")


def _check_code(code: Tensor, device: torch.device) -> None:
    """Not whether it ascends: to know that of a tensor on a GPU the host would have to wait."""
    if code.shape != (CODES,) or code.dtype != torch.float32:
        raise ValueError(f"a code book is ({CODES},) float32, got {tuple(code.shape)} {code.dtype}")
    if code.device != device:
        raise ValueError(f"the code book is on {code.device}, the values are on {device}: move it once, code.to(...)")


@triton.jit
def _root(v):
    """Ascends with v; about |v|^(1/4) with the sign of v, times 2^-96."""
    return ((v.to(tl.int32, bitcast=True) >> 2) & _WITHOUT_UPPER_EXPONENT).to(tl.float32, bitcast=True)


@triton.jit
def _bucket(v, line):
    """v float32, no NaN -> 0 .. 1023, int32; ascends with v."""
    lowest, highest, offset = line
    root = tl.minimum(tl.maximum(_root(v), lowest), highest)
    return (root + offset).to(tl.int32, bitcast=True) & (_BUCKETS - 1)


@triton.jit
def _line(code_ptr):
    """The roots of the map's ends, 0 between them, and what to add to a root to have the bucket in its last bits."""
    lowest = tl.minimum(_root(tl.load(code_ptr)), 0.0)
    highest = tl.maximum(_root(tl.load(code_ptr + _CODES - 1)), 0.0)
    # 2^n <= 1.01 * range < 2^(n + 1): at most 1014 buckets of 2^(n - 9)
    range_bits = (1.01 * tl.maximum(highest - lowest, _NARROWEST)).to(tl.int32, bitcast=True)
    power = (range_bits & _EXPONENT).to(tl.float32, bitcast=True)
    return lowest, highest, power * _ROUNDING - lowest


@triton.jit
def _number_below(v, ascending):
    """v (n,), ascending (256,) -> how many of the first 255 numbers lie below v, int32: a binary search."""
    count = tl.zeros(v.shape, tl.int32)
    for step in range(8):
        probe = count + (_CODES // 2 >> step)
        count = tl.where(v > tl.gather(ascending, probe - 1, axis=0), probe, count)
    return count


@triton.jit
def load_nearest(code_ptr):
    """What `nearest_code` needs to know of the 256 ascending float32 values at `code_ptr`."""
    index = tl.arange(0, _CODES)
    this = tl.load(code_ptr + index)
    following = tl.load(code_ptr + tl.minimum(index + 1, _CODES - 1))
    after = tl.load(code_ptr + tl.minimum(index + 2, _CODES - 1))
    bounds = tl.where(index < _CODES - 1, (this + following) * 0.5, float("inf"))
    line = _line(code_ptr)
    of_bound = _bucket(bounds, line)
    shared = (of_bound == _bucket((following + after) * 0.5, line)) & (index < _CODES - 2)
    one_each = tl.max(shared.to(tl.int32)) == 0
    lower = _number_below(tl.arange(0, _BUCKETS), of_bound)
    bound = tl.gather(bounds, lower, axis=0).to(tl.int32, bitcast=True)
    return line, (bound.to(tl.int64) << 32) | lower, bounds, one_each


@triton.jit
def nearest_code(v, nearest):
    """v (n,) float32, no NaN -> the number of midpoints below v, int32."""
    line, buckets, bounds, one_each = nearest
    if one_each:
        pair = tl.gather(buckets, _bucket(v, line), axis=0)
        bound = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        code = pair.to(tl.int32) + (v > bound).to(tl.int32)
    else:
        code = _number_below(v, bounds)
    return code


@triton.jit
def flat_tile(tile, numel, TILE: tl.constexpr, TYPE: tl.constexpr = tl.bfloat16):
    """Offsets of the values of a tile and their mask, both (TILE,), and whether the tile is whole.

    A thread gets as many neighbouring codes as it can load values of TYPE at once. By themselves it would get 16, and
    values or codes would have to be moved between threads.
    """
    start = tl.cast(tile, tl.int64) * TILE
    offset = tl.max_contiguous(start + tl.arange(0, TILE), _VECTOR_BITS // TYPE.primitive_bitwidth)
    return offset, offset < numel, start + TILE <= numel


@triton.jit
def load_tile(ptr, offset, mask, whole, other):
    """A mask that is not a multiple of a vector makes all loads narrow, so a whole tile goes without."""
    return tl.load(ptr + offset) if whole else tl.load(ptr + offset, mask=mask, other=other)


@triton.jit
def store_tile(ptr, offset, x, mask, whole):
    if whole:
        tl.store(ptr + offset, x)
    else:
        tl.store(ptr + offset, x, mask=mask)


@triton.jit
def _quantize_values_kernel(x_ptr, code_ptr, codes_ptr, numel, tiles, TILE: tl.constexpr):
    nearest = load_nearest(code_ptr)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        offset, mask, whole = flat_tile(tile, numel, TILE, x_ptr.dtype.element_ty)
        x = load_tile(x_ptr, offset, mask, whole, 0.0).to(tl.float32)
        codes = nearest_code(tl.where(x == x, x, 0.0), nearest)
        store_tile(codes_ptr, offset, codes.to(tl.uint8), mask, whole)


@triton.jit
def _dequantize_values_kernel(codes_ptr, code_ptr, x_ptr, numel, TILE: tl.constexpr):
    values = tl.load(code_ptr + tl.arange(0, _CODES))
    offset, mask, whole = flat_tile(tl.program_id(0), numel, TILE, x_ptr.dtype.element_ty)
    codes = load_tile(codes_ptr, offset, mask, whole, 0)
    x = tl.gather(values, codes.to(tl.int32), axis=0)
    store_tile(x_ptr, offset, x.to(x_ptr.dtype.element_ty), mask, whole)


def programs(tiles: int, device: torch.device) -> tuple[int]:
    """The grid of a kernel whose programs take one tile after the other."""
    return (min(tiles, PROGRAMS * device_limits(device).multiprocessors),)


@quantize_values_out.triton
def _launch_quantize_values_out(x: Tensor, code: Tensor, codes: Tensor) -> None:
    _quantize_values_out_fake(x, code, codes)
    if x.numel():
        tiles = triton.cdiv(x.numel(), TILE)
        grid = programs(tiles, x.device)
        x, code = x.contiguous(), code.contiguous()
        _quantize_values_kernel[grid](x, code, codes, x.numel(), tiles, TILE=TILE, num_warps=WARPS)


@quantize_values.triton
def _launch_quantize_values(x: Tensor, code: Tensor) -> Tensor:
    codes = _quantize_values_fake(x, code)
    _launch_quantize_values_out(x, code, codes)
    return codes


@dequantize_values_out.triton
def _launch_dequantize_values_out(codes: Tensor, code: Tensor, out: Tensor) -> None:
    _dequantize_values_out_fake(codes, code, out)
    if codes.numel():
        grid = (triton.cdiv(codes.numel(), TILE),)
        codes, code = codes.contiguous(), code.contiguous()
        _dequantize_values_kernel[grid](codes, code, out, codes.numel(), TILE=TILE, num_warps=WARPS)


@dequantize_values.triton
def _launch_dequantize_values(codes: Tensor, code: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    x = _dequantize_values_fake(codes, code, dtype)
    _launch_dequantize_values_out(codes, code, x)
    return x
