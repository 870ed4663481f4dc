"""Eight 4-bit codes of a 32-bit word to eight values of 16 bits, in registers, as matrix units take them.

A value of 16 bits is two bytes, and the 16 values of a map are two planes of 16 bytes each. `prmt` picks four bytes out
of eight by the low three bits of four nibbles, so that three of them read a plane: the bytes of the codes 0 .. 7, those
of 8 .. 15, and between the two by the highest bit. Two more put the planes together: 21 instructions for eight values.

With a table in shared memory it is 12: for each byte a pair of values, in 32 copies, one for each bank, so that no two
lanes of a warp meet. The table takes 32 KB and is written once by each program.

Pair i of a word holds the values of its byte i, the high nibble's first.
"""

from functools import cache

import torch
from torch import Tensor

from lq_kernels._triton import tl, triton
from lq_kernels.codebooks import four_bit_map

_BANKS = 32
_TABLE_BYTES = 256 * _BANKS * 4


def _prmt() -> str:
    """Operands: four pairs, the word, the planes (low bytes of the codes 0-3, 4-7, 8-11, 12-15, then high bytes)."""
    lines = [
        "{",
        ".reg .b32 code, top, next_code, next_top, below, above, low, high;",
        "and.b32 code, $4, 0x77777777;",
        "shr.u32 top, $4, 1;",
        "lop3.b32 top, top, 0x44444444, 0x32103210, 0xea;",  # (top & 0x4444) | 0x3210: byte i of the second four if set
        "shr.u32 next_code, code, 16;",
        "shr.u32 next_top, top, 16;",
    ]
    for pair, (code, top) in ((0, ("code", "top")), (2, ("next_code", "next_top"))):
        for plane, first in (("low", 5), ("high", 9)):
            lines += [
                f"prmt.b32 below, ${first}, ${first + 1}, {code};",
                f"prmt.b32 above, ${first + 2}, ${first + 3}, {code};",
                f"prmt.b32 {plane}, below, above, {top};",
            ]
        # The low nibble of a byte is its second value.
        lines += [f"prmt.b32 ${pair}, low, high, 0x4051;", f"prmt.b32 ${pair + 1}, low, high, 0x6273;"]
    return "\n".join([*lines, "}"])


def _lookup() -> str:
    """Operands: four pairs, the word, the address of the lane's copy of the table."""
    lines = ["{", ".reg .b32 byte, address;"]
    for pair in range(4):
        lines += [
            f"prmt.b32 byte, $4, 0, 0x444{pair};",
            f"mad.lo.u32 address, byte, {4 * _BANKS}, $5;",
            f"ld.shared.b32 ${pair}, [address];",
        ]
    return "\n".join([*lines, "}"])


def _fill() -> str:
    """Writes 32 copies of each of 256 words at $1 to shared memory and gives the address of the lane's own copies.

    A thread reads a word and writes its copies, beginning with that of its own bank, so that no two lanes meet.
    """
    copies = []
    for copy in range(_BANKS):
        copies += [
            f"xor.b32 address, lane, {4 * copy};",
            "add.u32 address, address, row;",
            "st.shared.b32 [address], value;",
        ]
    return "\n".join(
        [
            "{",
            f".shared .align 128 .b8 lq_pairs[{_TABLE_BYTES}];",
            ".reg .b32 base, entry, row, address, value, lane, threads;",
            ".reg .b64 source;",
            ".reg .pred more;",
            "mov.u32 base, lq_pairs;",
            "mov.u32 lane, %laneid;",
            "shl.b32 lane, lane, 2;",
            "mov.u32 entry, %tid.x;",
            "mov.u32 threads, %ntid.x;",
            "FILL:",
            "mad.wide.u32 source, entry, 4, $1;",
            "ld.global.nc.b32 value, [source];",
            f"mad.lo.u32 row, entry, {4 * _BANKS}, base;",
            *copies,
            "add.u32 entry, entry, threads;",
            "setp.lt.u32 more, entry, 256;",
            "@more bra FILL;",
            "add.u32 $0, base, lane;",
            "bar.sync 0;",
            "}",
        ]
    )


def _scale(kind: str) -> str:
    """Pairs times a float32 in two parts, the larger and what it leaves: the product is rounded once."""
    return f"""{{
.reg .b32 less, zero;
mov.b32 zero, 0x80008000;
fma.rn.{kind} less, $1, $3, zero;
fma.rn.{kind} $0, $1, $2, less;
}}"""


_SCALE_BFLOAT16, _SCALE_FLOAT16 = tl.constexpr(_scale("bf16x2")), tl.constexpr(_scale("f16x2"))
_PRMT, _LOOKUP, _FILL = tl.constexpr(_prmt()), tl.constexpr(_lookup()), tl.constexpr(_fill())


@cache
def word_table(quant_type: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(280,) int32 on `device`: a pair of `dtype` for each byte, then the values one by one, then the two planes.

    The map's values are rounded to `dtype`, bfloat16 or float16.
    """
    values = four_bit_map(quant_type).to(dtype)
    pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)
    planes = values.view(torch.uint8).view(16, 2).t()  # little-endian: low bytes first
    parts = (pairs, values, planes)
    return torch.cat([part.contiguous().view(-1).view(torch.int32) for part in parts]).to(device)


def has_ptx(device: torch.device) -> bool:
    """Whether it is an NVIDIA GPU; Triton's interpreter (a CPU) is none."""
    return device.type != "cpu" and triton.runtime.driver.active.get_current_target().backend == "cuda"


VALUES_AT = tl.constexpr(256)  # of word_table, in words
PLANES_AT = tl.constexpr(264)


@triton.jit
def fill_table(table_ptr):
    """`word_table` -> the address of this lane's copy of the pairs in shared memory. NVIDIA only, once in a kernel."""
    return tl.inline_asm_elementwise(_FILL, "=r,l", [table_ptr], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _values_of(pairs, dtype: tl.constexpr):
    """int32 -> its two halves, behind a new last dimension."""
    first = (pairs & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    second = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.join(first, second)


@triton.jit
def _twice(x):
    """x of 16 bits -> int32 with both halves x."""
    return (x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x10001


@triton.jit
def _scaled(pairs, larger, less, dtype: tl.constexpr):
    SCALE: tl.constexpr = _SCALE_BFLOAT16 if dtype == tl.bfloat16 else _SCALE_FLOAT16
    return tl.inline_asm_elementwise(SCALE, "=r,r,r,r", [pairs, larger, less], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _decoded(words, table_ptr, table, dtype: tl.constexpr, DECODE: tl.constexpr):
    """Four int32 tensors of pairs, by PTX."""
    INT32: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32)
    if DECODE == "lookup":
        return tl.inline_asm_elementwise(
            _LOOKUP, "=&r,=&r,=&r,=&r,r,r", [words, table], dtype=INT32, is_pure=True, pack=1
        )
    planes = table_ptr + PLANES_AT
    return tl.inline_asm_elementwise(
        _PRMT,
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
        [
            words,
            tl.load(planes),
            tl.load(planes + 1),
            tl.load(planes + 2),
            tl.load(planes + 3),
            tl.load(planes + 4),
            tl.load(planes + 5),
            tl.load(planes + 6),
            tl.load(planes + 7),
        ],
        dtype=INT32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _widened(bits, dtype: tl.constexpr):
    """int32 pairs -> their first and second values, float32."""
    if dtype == tl.bfloat16:
        first, second = (bits << 16).to(tl.float32, bitcast=True), (bits & -65536).to(tl.float32, bitcast=True)
    else:
        first = (bits & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        second = (bits >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return first, second


@triton.jit
def _pair_of(words, table_ptr, BYTE: tl.constexpr):
    return tl.load(table_ptr + ((words >> (8 * BYTE)) & 255))


@triton.jit
def word_values(words, table_ptr, dtype: tl.constexpr, DECODE: tl.constexpr):
    """words int32 of any shape -> eight float32 tensors, the map values of `dtype`, bfloat16 or float16, in order.

    DECODE: "prmt" on NVIDIA, "portable" anywhere.
    """
    if DECODE == "portable":
        bits0, bits1 = _pair_of(words, table_ptr, 0), _pair_of(words, table_ptr, 1)
        bits2, bits3 = _pair_of(words, table_ptr, 2), _pair_of(words, table_ptr, 3)
    else:
        bits0, bits1, bits2, bits3 = _decoded(words, table_ptr, 0, dtype, DECODE)
    v0, v1 = _widened(bits0, dtype)
    v2, v3 = _widened(bits1, dtype)
    v4, v5 = _widened(bits2, dtype)
    v6, v7 = _widened(bits3, dtype)
    return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def _scaled_nibble(words, scale, table_ptr, SHIFT: tl.constexpr, dtype: tl.constexpr):
    value = tl.load(table_ptr.to(tl.pointer_type(dtype)) + 2 * VALUES_AT + ((words >> SHIFT) & 15))
    return (value.to(tl.float32) * scale).to(dtype)


@triton.jit
def _scaled_pair(words, scale, table_ptr, BYTE: tl.constexpr, dtype: tl.constexpr):
    return tl.join(
        _scaled_nibble(words, scale, table_ptr, 8 * BYTE + 4, dtype),
        _scaled_nibble(words, scale, table_ptr, 8 * BYTE, dtype),
    )


@triton.jit
def decode_words(words, scale, table_ptr, table, dtype: tl.constexpr, DECODE: tl.constexpr):
    """words int32 (rows, blocks, n), scale float32 (rows, blocks) -> (rows, 8 blocks n) of `dtype`, in memory's order.

    dtype: bfloat16 or float16; map values are rounded to it, and once more when they are multiplied by the scale.
    DECODE: "prmt" or "lookup", with `table` from `fill_table`, on NVIDIA; "portable" anywhere.
    """
    scale = scale[:, :, None]
    if DECODE == "portable":
        pair0, pair1 = _scaled_pair(words, scale, table_ptr, 0, dtype), _scaled_pair(words, scale, table_ptr, 1, dtype)
        pair2, pair3 = _scaled_pair(words, scale, table_ptr, 2, dtype), _scaled_pair(words, scale, table_ptr, 3, dtype)
    else:
        larger = scale.to(dtype)
        less = _twice((scale - larger.to(tl.float32)).to(dtype))
        larger = _twice(larger)
        bits0, bits1, bits2, bits3 = _decoded(words, table_ptr, table, dtype, DECODE)
        pair0 = _values_of(_scaled(bits0, larger, less, dtype), dtype)
        pair1 = _values_of(_scaled(bits1, larger, less, dtype), dtype)
        pair2 = _values_of(_scaled(bits2, larger, less, dtype), dtype)
        pair3 = _values_of(_scaled(bits3, larger, less, dtype), dtype)
    fours = tl.join(tl.join(pair0, pair2), tl.join(pair1, pair3))  # [rows, blocks, n, in a pair, pair // 2, pair % 2]
    ROWS: tl.constexpr = words.shape[0]
    return tl.reshape(tl.permute(fours, (0, 1, 2, 4, 5, 3)), (ROWS, 8 * words.shape[1] * words.shape[2]))
