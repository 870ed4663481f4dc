"""A mean whose float32 sum has a fixed order, so that every device gives the same bits.

Value i is added to lane i modulo LANES, in ascending order; then neighbouring lanes are added, then neighbouring sums,
until one is left, which is divided by the number of values. Zeros behind the last value change nothing.

Lanes are neighbours in memory and the sums of a program's lanes are those of a subtree, so one kernel adds up lanes and
whoever wants the mean adds up its few results.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lq_kernels._triton import tl, triton

LANES = 1 << 16
PARTIALS = 64  # programs that add up all lanes

_WIDTH = LANES // PARTIALS  # lanes of a program
_UNROLL = 8  # loads that a program has under way
_LONGEST_LOG = tl.constexpr(max(_WIDTH, PARTIALS).bit_length() - 1)


def ordered_mean(x: Tensor) -> Tensor:
    """x (n,) float32 -> () float32; of no values 0."""
    if not len(x):
        return x.new_zeros(())
    lanes = min(LANES, 1 << (len(x) - 1).bit_length())
    total, *rows = F.pad(x, (0, -len(x) % lanes)).view(-1, lanes)
    for row in rows:
        total = total + row
    while len(total) > 1:
        total = total[0::2] + total[1::2]
    return (total / torch.full_like(total, len(x))).view(())


@triton.jit
def sum_of_neighbours(x):
    """(n,) -> (1,): neighbours are added, then neighbouring sums, until one is left."""
    for _ in tl.static_range(_LONGEST_LOG):
        if x.shape[0] > 1:
            left, right = tl.split(tl.reshape(x, (x.shape[0] // 2, 2)))
            x = left + right
    return x


@triton.jit
def _sum_lanes_kernel(x_ptr, partial_ptr, count, LANES: tl.constexpr, WIDTH: tl.constexpr, UNROLL: tl.constexpr):
    """The sum of WIDTH lanes per program."""
    lane = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for start in range(0, count, LANES * UNROLL):
        for step in tl.static_range(UNROLL):
            index = start + step * LANES + lane
            total += tl.load(x_ptr + index, mask=index < count, other=0.0)
    tl.store(partial_ptr + tl.program_id(0) + tl.arange(0, 1), sum_of_neighbours(total))


@triton.jit
def mean_of_partials(partial_ptr, partials, count, PARTIALS: tl.constexpr):
    """What `launch_partial_sums` gave -> the mean of `count`, a float, values, (1,)."""
    which = tl.arange(0, PARTIALS)
    total = sum_of_neighbours(tl.load(partial_ptr + which, mask=which < partials, other=0.0))
    return tl.div_rn(total, tl.full((1,), count, tl.float32))


def launch_partial_sums(x: Tensor) -> Tensor:
    """x (n,) float32, contiguous, not empty -> partial sums, (at most PARTIALS,) float32."""
    partial = x.new_empty(min(PARTIALS, triton.cdiv(len(x), _WIDTH)))
    _sum_lanes_kernel[(len(partial),)](x, partial, len(x), LANES=LANES, WIDTH=_WIDTH, UNROLL=_UNROLL, num_warps=8)
    return partial
