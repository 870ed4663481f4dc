"""How updated weights are rounded to 16 bits: to the nearest, at random, or with the lost bits kept beside them.

Stochastic rounding adds 16 random bits below bfloat16's last one and drops what is below it: the mean is the weight
itself. The bits are those of `rounding.random_bits` for (seed, step, number of the tensor, element), 16 of a word for
each of two neighbours, so that they do not depend on tiles, launches, devices or ranks.

A correction is the third byte of the weight, in int8: weight and correction together have 24 bits, 16 of mantissa.
bits(weight) = 2^16 bits(bfloat16) + 2^8 correction, in integer arithmetic. The idea of such a byte:
FlashOptim, https://arxiv.org/abs/2602.23349
"""

import torch
from torch import Tensor

from lq_kernels._triton import tl, triton
from lq_kernels.multi_tensor import MASTER, PARAM, pointer
from lq_kernels.rounding import hashed_seed, random_bits, random_word


def step_seed(seed: int, step: int, number: int) -> Tensor:
    """The seed of one tensor's random bits in one step, int64."""
    of_step = random_bits(torch.tensor(seed), torch.tensor(step))
    return random_bits(of_step, torch.tensor(number))


def round_stochastically(p: Tensor, seed: Tensor) -> Tensor:
    """float32 -> bfloat16, up or down with the probabilities that keep the mean; NaN stays NaN."""
    index = torch.arange(p.numel(), device=p.device)
    word = random_bits(seed.to(p.device), index >> 1)
    low = torch.where(index % 2 == 1, word >> 16, word & 0xFFFF).int().view(p.shape)
    bits = (p.contiguous().view(torch.int32) + low) & -0x10000
    return torch.where(p.isnan(), p, bits.view(torch.float32)).bfloat16()


def split_weight(p: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> bfloat16 and the int8 correction to it; together the nearest number of 24 bits, ties to even."""
    bits = torch.where(p.isnan(), torch.nan, p).contiguous().view(torch.int32)
    upper = (bits + 0x7F + ((bits >> 8) & 1)) >> 8
    weight = (upper + 0x80) >> 8
    return weight.to(torch.int16).view(torch.bfloat16), (upper - (weight << 8)).to(torch.int8)


def join_weight(weight: Tensor, correction: Tensor) -> Tensor:
    """The float32 that `split_weight` split."""
    return ((weight.contiguous().view(torch.int16).int() << 16) + (correction.int() << 8)).view(torch.float32)


@triton.jit
def to_float32(x):
    """Of bfloat16 by integer arithmetic, which takes one instruction for the upper half of a word, not two."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def load_weight(
    table_ptr, tensor, base, offset, mask, TYPE: tl.constexpr, MASTER_KIND: tl.constexpr, ALIGNED: tl.constexpr
):
    """A tile of weights as float32; a weight that was changed from outside wins over its float32 master."""
    weight = tl.load(pointer(table_ptr, tensor, PARAM, TYPE, ALIGNED) + base + offset, mask=mask, other=0.0)
    if MASTER_KIND == "none":
        return to_float32(weight)
    elif MASTER_KIND == "correction":
        master_ptr = pointer(table_ptr, tensor, MASTER, tl.int8, ALIGNED)
        low = tl.load(master_ptr + base + offset, mask=mask, other=0).to(tl.int32) << 8
        return ((weight.to(tl.int16, bitcast=True).to(tl.int32) << 16) + low).to(tl.float32, bitcast=True)
    else:
        master_ptr = pointer(table_ptr, tensor, MASTER, tl.float32, ALIGNED)
        master = tl.load(master_ptr + base + offset, mask=mask, other=0.0)
        return tl.where(master.to(TYPE) == weight, master, weight.to(tl.float32))


@triton.jit
def store_weight(
    p,
    table_ptr,
    tensor,
    base,
    offset,
    mask,
    seed,
    TYPE: tl.constexpr,
    MASTER_KIND: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Writes a tile of float32 weights; `seed` is that of the tensor and step."""
    param_ptr = pointer(table_ptr, tensor, PARAM, TYPE, ALIGNED) + base + offset
    if MASTER_KIND == "correction":
        bits = tl.where(p != p, float("nan"), p).to(tl.int32, bitcast=True)
        upper = (bits + 0x7F + ((bits >> 8) & 1)) >> 8
        weight = (upper + 0x80) >> 8
        master_ptr = pointer(table_ptr, tensor, MASTER, tl.int8, ALIGNED)
        tl.store(master_ptr + base + offset, (upper - (weight << 8)).to(tl.int8), mask=mask)
        tl.store(param_ptr, weight.to(tl.int16).to(TYPE, bitcast=True), mask=mask)
    elif STOCHASTIC:
        tl.store(param_ptr, _round_stochastically(p, seed, base, offset, FLAT), mask=mask)
    else:
        if MASTER_KIND == "float32":
            tl.store(pointer(table_ptr, tensor, MASTER, tl.float32, ALIGNED) + base + offset, p, mask=mask)
        tl.store(param_ptr, p.to(TYPE), mask=mask)


@triton.jit
def _round_stochastically(p, seed, base, offset, FLAT: tl.constexpr):
    if FLAT:  # a tile lies in one range of 2^33 values, so that the upper word is one number
        high = (base >> 33).to(tl.uint32)
        low = (base >> 1).to(tl.uint32) + (offset >> 1).to(tl.uint32)
    else:
        high = ((base + offset) >> 33).to(tl.uint32)
        low = ((base + offset) >> 1).to(tl.uint32)
    word = random_word(hashed_seed(seed, high), low)
    drawn = tl.where((offset & 1) == 1, word >> 16, word & 0xFFFF)
    bits = (p.to(tl.uint32, bitcast=True) + drawn) >> 16
    return tl.where(p != p, p.to(tl.bfloat16), bits.to(tl.uint16).to(tl.bfloat16, bitcast=True))
