"""Percentile clipping: each tensor's gradient is clipped at a percentile of its own last 100 norms.

    norm = ||grad||_2 (float32)
    if norm is finite and not zero:
        history[:] = norm if nothing was recorded yet, else history[recorded % 100] = norm;  recorded += 1
        limit = sorted(history)[percentile]                 # 0-based, the new norm included
        factor = limit / norm if norm > limit else 1
    a zero or absent gradient is neither clipped nor recorded
    a norm that is NaN or infinite leaves the tensor, its state and its step untouched, and is counted

With one norm over all tensors each of them keeps the same history, and a norm that is not finite leaves all of them
untouched; it is counted for those whose own gradient is not finite.

Source of the method: bitsandbytes before 0.50, whose rule let zeros and infinities into the history.
"""

import math

import torch
from torch import Tensor

from lq_kernels._triton import tl, triton
from lq_kernels.multi_tensor import COUNTS, GRAD, HISTORY, NUMEL, State, address, pointer
from lq_kernels.optimizer_batch import Batch, triton_type

HISTORY_LENGTH = 100
RECORDED, CLIPPED, SKIPPED = range(3)  # "gnorm_counts": norms recorded, gradients clipped, non-finite ones skipped
SCOPES = ("tensor", "global")

_TILE = 8192  # values that a program reads at a time; their sum is exact to (log2(8192) + 1) 2^-24
_SUMS = 1024  # partial sums added at a time

_LENGTH = tl.constexpr(HISTORY_LENGTH)
_PADDED_LENGTH = tl.constexpr(128)
_SUMS_AT_A_TIME = tl.constexpr(_SUMS)


def new_history(device: torch.device) -> State:
    """The state of a tensor that was never clipped."""
    return {
        "gnorm_history": torch.zeros(HISTORY_LENGTH, device=device),
        "gnorm_counts": torch.zeros(3, dtype=torch.int32, device=device),
    }


def squared_norm(grad: Tensor | None) -> float:
    return 0.0 if grad is None else float(grad.float().square().sum())  # sum() adds pairwise, vector_norm in a row


def percentile_factor(
    norm: float, history: Tensor, counts: Tensor, percentile: int, counted: bool = True
) -> float | None:
    """The factor of a gradient with this norm, None to skip it; `history` and `counts` are brought up to date.

    `counted` False leaves the counter of skipped gradients as it is.
    """
    if not math.isfinite(norm):
        counts[SKIPPED] += counted
        return None
    if norm == 0:
        return 1.0
    recorded = int(counts[RECORDED])
    history[slice(None) if recorded == 0 else recorded % HISTORY_LENGTH] = norm
    counts[RECORDED] += 1
    limit = sorted(history.tolist())[percentile]
    if norm <= limit:
        return 1.0
    counts[CLIPPED] += 1
    return limit / norm


def last_factors(history: Tensor, counts: Tensor, percentile: int) -> Tensor:
    """history (n, 100), counts (n, 3) -> (n,) float32: the factor of each tensor's last recorded gradient, 1 before the
    first. Nothing waits for the device.
    """
    recorded = counts[:, RECORDED].long()
    norm = history.gather(1, ((recorded - 1) % HISTORY_LENGTH)[:, None])[:, 0]
    limit = history.sort(dim=1).values[:, percentile]
    return torch.where(recorded > 0, limit / norm, 1.0).clamp(max=1.0)


def launch_squares(batch: Batch, table: Tensor) -> None:
    """Partial sums of the squares of the gradients of a batch, into its `norms`."""
    data = batch.launch_data()
    sums = data.norms()
    if len(sums.work):
        _squares_kernel[(len(sums.work),)](
            table,
            sums.work,
            sums.partials,
            GRAD_TYPE=triton_type(batch.grad_type),
            ALIGNED=data.addresses.aligned,
            TILE=_TILE,
            num_warps=8,
        )


@triton.jit
def _squares_kernel(
    table_ptr, work_ptr, partials_ptr, GRAD_TYPE: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr
):
    """The sum of squares of each chunk, added in one order: the same result every time."""
    program = tl.program_id(0)
    tensor = tl.load(work_ptr + program * 3)
    start = tl.load(work_ptr + program * 3 + 1).to(tl.int64) * 256
    end = tl.minimum(tl.load(work_ptr + program * 3 + 2).to(tl.int64) * 256, address(table_ptr, tensor, NUMEL))
    grad_ptr = pointer(table_ptr, tensor, GRAD, GRAD_TYPE, ALIGNED)
    end = tl.where(address(table_ptr, tensor, GRAD) == 0, start, end)
    lane = tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    while start + TILE <= end:
        grad = tl.load(grad_ptr + start + lane).to(tl.float32)
        total += grad * grad
        start += TILE
    if start < end:
        grad = tl.load(grad_ptr + start + lane, mask=lane < end - start, other=0.0).to(tl.float32)
        total += grad * grad
    tl.store(partials_ptr + program, tl.sum(total))


@triton.jit
def sum_of_partials(partials_ptr, first, last, STRIDE: tl.constexpr):
    """partials[first : last] of a column, added in one order."""
    lane = tl.arange(0, _SUMS_AT_A_TIME)
    total = tl.zeros([_SUMS_AT_A_TIME], tl.float32)
    while first < last:
        total += tl.load(partials_ptr + (first + lane) * STRIDE, mask=first + lane < last, other=0.0)
        first += _SUMS_AT_A_TIME
    return tl.sum(total)


@triton.jit
def _limit(history_ptr, norm, recorded, keep, percentile):
    """The percentile of the history with `norm` written into it; it is stored when `keep`."""
    slot = tl.arange(0, _PADDED_LENGTH)
    history = tl.load(history_ptr + slot, mask=slot < _LENGTH, other=float("inf"))
    history = tl.where((slot < _LENGTH) & ((recorded == 0) | (slot == recorded % _LENGTH)), norm, history)
    tl.store(history_ptr + slot, history, mask=(slot < _LENGTH) & keep)
    # The rank of a slot is the number of slots that sort before it; exactly one has the rank `percentile`.
    before = (history[None, :] < history[:, None]) | (
        (history[None, :] == history[:, None]) & (slot[None, :] < slot[:, None])
    )
    rank = tl.sum(before.to(tl.int32), axis=1)
    return tl.sum(tl.where(rank == percentile, history, 0.0))


@triton.jit
def clip(table_ptr, tensor, partials_ptr, first_ptr, all_ptr, all_count, there, percentile, GLOBAL: tl.constexpr):
    """The factor of a tensor's gradient and whether its step is taken; history and counters are brought up to date."""
    squares = sum_of_partials(partials_ptr, tl.load(first_ptr + tensor), tl.load(first_ptr + tensor + 1), 1)
    skipped = there & ((squares < float("inf")) == 0)
    if GLOBAL:
        squares = sum_of_partials(all_ptr, tl.full([], 0, tl.int32), all_count, 1)
        there = there | (squares >= 0)
    norm = tl.sqrt_rn(squares)
    finite = norm < float("inf")
    keep = there & finite & (norm > 0)
    counts_ptr = pointer(table_ptr, tensor, COUNTS, tl.int32, False)
    recorded = tl.load(counts_ptr)
    limit = _limit(pointer(table_ptr, tensor, HISTORY, tl.float32, False), norm, recorded, keep, percentile)
    clipped = keep & (norm > limit)
    factor = tl.where(clipped, tl.div_rn(limit, tl.where(clipped, norm, 1.0)), 1.0)
    tl.store(counts_ptr, recorded + 1, mask=keep)
    tl.store(counts_ptr + 1, tl.load(counts_ptr + 1) + 1, mask=clipped)
    tl.store(counts_ptr + 2, tl.load(counts_ptr + 2) + 1, mask=skipped)
    return factor, finite
