"""Percentile clipping: each tensor's gradient is clipped at a percentile of its own last 100 norms.

    norm = ||grad||_2 (float32)
    if norm is finite and not zero:
        history[:] = norm if nothing was recorded yet, else history[recorded % 100] = norm;  recorded += 1
        limit = sorted(history)[percentile]                 # 0-based, the new norm included
        factor = limit / norm if norm > limit else 1
    a zero or absent gradient is neither clipped nor recorded
    a norm that is NaN or infinite leaves the tensor, its state and its step untouched, and is counted

Source of the method: bitsandbytes before 0.50, whose rule let zeros and infinities into the history.

`prepare` is the part of an optimizer step that is the same for every algorithm: it advances each tensor's step and
writes its facts, four float32: the factor of the gradient (negative to maximise), 1 - beta1^step,
sqrt(1 - beta2^step), and whether the tensor takes part. Nothing is read back by the host.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lq_kernels._triton import tl, triton
from lq_kernels.multi_tensor import COUNTS, GRAD, HISTORY, NUMEL, STEP, Batch, State, address, pointer

HISTORY_LENGTH = 100
RECORDED, CLIPPED, SKIPPED = range(3)  # "gnorm_counts": norms recorded, gradients clipped, non-finite ones skipped

_CHUNK = 8192  # values per program of the norm; its sum is exact to (log2(8192) + 1) 2^-24
_SUMS = 1024  # partial sums added at a time

_LENGTH = tl.constexpr(HISTORY_LENGTH)
_PADDED_LENGTH = tl.constexpr(128)
_SUMS_AT_A_TIME = tl.constexpr(_SUMS)


@dataclass(frozen=True)
class Preparation:
    """What `prepare` needs to know: betas without bias correction are 0; `percentile` None is no clipping."""

    betas: tuple[float, float] = (0.0, 0.0)
    percentile: int | None = None
    maximize: bool = False


@dataclass(frozen=True)
class Facts:
    """What an update reads about a tensor."""

    factor: float
    bias1: float  # 1 - beta1^step
    sqrt_bias2: float  # sqrt(1 - beta2^step)
    active: bool


def new_history(device: torch.device) -> State:
    """The state of a tensor that was never clipped."""
    return {
        "gnorm_history": torch.zeros(HISTORY_LENGTH, device=device),
        "gnorm_counts": torch.zeros(3, dtype=torch.int32, device=device),
    }


def percentile_factor(norm: float, history: Tensor, counts: Tensor, percentile: int) -> float | None:
    """The factor of a gradient with this norm, None to skip it; `history` and `counts` are brought up to date."""
    if not math.isfinite(norm):
        counts[SKIPPED] += 1
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


def prepare(batch: Batch, grads: Sequence[Tensor | None], how: Preparation) -> list[Facts]:
    """The reference of `launch_prepare`."""
    return [_prepare_one(grad, state, how) for grad, state in zip(grads, batch.states, strict=True)]


_INACTIVE = Facts(0.0, 0.0, 0.0, active=False)


def _prepare_one(grad: Tensor | None, state: State, how: Preparation) -> Facts:
    if grad is None:
        return _INACTIVE
    factor: float | None = 1.0
    if how.percentile is not None:
        norm = float(grad.float().square().sum().sqrt())  # sum() adds pairwise, vector_norm in a row
        factor = percentile_factor(norm, state["gnorm_history"], state["gnorm_counts"], how.percentile)
    if factor is None:
        return _INACTIVE
    step = float(state["step"].add_(1))
    beta1, beta2 = how.betas
    return Facts(-factor if how.maximize else factor, 1 - beta1**step, math.sqrt(1 - beta2**step), active=True)


def launch_prepare(batch: Batch, grads: Sequence[Tensor | None], table: Tensor, how: Preparation) -> Tensor:
    """Facts (tensors, 4) float32 on the device; one launch, with clipping two."""
    data = batch.launch_data()
    work, first_chunk, partials = data.chunks(_CHUNK) if how.percentile is not None else (data.facts,) * 3
    if how.percentile is not None and len(work):
        _squares_kernel[(len(work),)](
            table,
            work,
            partials,
            GRAD_TYPE=triton_type(batch.grad_type),
            ALIGNED=data.table.aligned,
            CHUNK=_CHUNK,
            num_warps=8,
        )
    _prepare_kernel[(len(batch.params),)](
        table,
        partials,
        first_chunk,
        data.facts,
        *(math.log(beta) if beta > 0 else -math.inf for beta in how.betas),
        -1.0 if how.maximize else 1.0,
        how.percentile or 0,
        CLIP=how.percentile is not None,
    )
    return data.facts


def triton_type(dtype: torch.dtype) -> tl.dtype:
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


@triton.jit
def _squares_kernel(
    table_ptr, work_ptr, partials_ptr, GRAD_TYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr
):
    """The sum of squares of each chunk, added in one order: the same result every time."""
    program = tl.program_id(0)
    tensor = tl.load(work_ptr + program * 2)
    start = tl.load(work_ptr + program * 2 + 1).to(tl.int64) * CHUNK
    grad_ptr = pointer(table_ptr, tensor, GRAD, GRAD_TYPE, ALIGNED)
    remaining = tl.where(address(table_ptr, tensor, GRAD) == 0, 0, address(table_ptr, tensor, NUMEL) - start)
    lane = tl.arange(0, CHUNK)
    if remaining >= CHUNK:
        grad = tl.load(grad_ptr + start + lane).to(tl.float32)
    else:
        grad = tl.load(grad_ptr + start + lane, mask=lane < remaining, other=0.0).to(tl.float32)
    tl.store(partials_ptr + program, tl.sum(grad * grad))


@triton.jit
def _norm(partials_ptr, first, last):
    """sqrt of the sum of partials[first:last]."""
    lane = tl.arange(0, _SUMS_AT_A_TIME)
    total = tl.zeros([_SUMS_AT_A_TIME], tl.float32)
    while first < last:
        total += tl.load(partials_ptr + first + lane, mask=first + lane < last, other=0.0)
        first += _SUMS_AT_A_TIME
    return tl.sqrt_rn(tl.sum(total))


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
def _bias(log_beta, step):
    """1 - beta^step; in float64, since float32 loses four digits where beta^step is close to 1."""
    return (1.0 - tl.exp(step.to(tl.float64) * log_beta)).to(tl.float32)


@triton.jit
def _prepare_kernel(
    table_ptr, partials_ptr, first_chunk_ptr, facts_ptr, log_beta1, log_beta2, sign, percentile, CLIP: tl.constexpr
):
    tensor = tl.program_id(0)
    active = address(table_ptr, tensor, GRAD) != 0
    factor = 1.0
    if CLIP:
        norm = _norm(partials_ptr, tl.load(first_chunk_ptr + tensor), tl.load(first_chunk_ptr + tensor + 1))
        finite = norm < float("inf")
        keep = active & finite & (norm > 0)
        counts_ptr = pointer(table_ptr, tensor, COUNTS, tl.int32, False)
        recorded = tl.load(counts_ptr)
        history_ptr = pointer(table_ptr, tensor, HISTORY, tl.float32, False)
        limit = _limit(history_ptr, norm, recorded, keep, percentile)
        clip = keep & (norm > limit)
        factor = tl.where(clip, tl.div_rn(limit, tl.where(clip, norm, 1.0)), 1.0)
        tl.store(counts_ptr, recorded + 1, mask=keep)
        tl.store(counts_ptr + 1, tl.load(counts_ptr + 1) + 1, mask=clip)
        tl.store(counts_ptr + 2, tl.load(counts_ptr + 2) + 1, mask=active & (finite == 0))
        active = active & finite
    step_ptr = pointer(table_ptr, tensor, STEP, tl.float32, False)
    step = tl.load(step_ptr) + 1.0
    tl.store(step_ptr, step, mask=active)
    tl.store(facts_ptr + tensor * 4, factor * sign)
    tl.store(facts_ptr + tensor * 4 + 1, _bias(log_beta1, step))
    tl.store(facts_ptr + tensor * 4 + 2, tl.sqrt_rn(_bias(log_beta2, step)))
    tl.store(facts_ptr + tensor * 4 + 3, active.to(tl.float32))
