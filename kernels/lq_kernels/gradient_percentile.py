"""bitsandbytes' percentile clipping, to its exact rule: a factor for one gradient from its own last 100 norms.

    history[step % 100] = sum(grad^2);  at step 1 the whole history grows by it
    norm  = sqrt(history[step % 100])
    limit = sqrt(sorted(history)[percentile])            (0-based, ascending, a NaN last)
    scale = limit / norm if norm > limit else 1

It lets zeros and infinities into the history: a gradient that begins with zeros is scaled to zero until enough norms
are there. Optimizers here use percentile_clipping.py, which does not.

Source: bitsandbytes before 0.50, functional.percentile_clipping
"""

import torch
from torch import Tensor

from lq_kernels._op import op_with_out
from lq_kernels._triton import tl, triton

HISTORY_LENGTH = 100

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LENGTH = tl.constexpr(HISTORY_LENGTH)
_PADDED_LENGTH = tl.constexpr(128)


def clip_at_percentile(
    grad: Tensor, gnorm_vec: Tensor, step: int, percentile: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """grad of any shape, its history (100,) -> norm, limit and scale, 0-d float32 on its device; nothing waits for it.

    grad is float32, bfloat16 or float16. gnorm_vec is float32, holds squared norms, begins as zeros and is updated in
    place. step counts from 1; percentile is 0 .. 99. ValueError, TypeError otherwise. An empty gradient has norm 0.
    """
    result = torch.empty(3, dtype=torch.float32, device=grad.device)
    record_gradient_norm(grad, gnorm_vec, result, step, percentile)
    norm, limit, scale = result.unbind()
    return norm, limit, scale


@op_with_out("gnorm_vec", "result")
def record_gradient_norm(grad: Tensor, gnorm_vec: Tensor, result: Tensor, step: int, percentile: int) -> None:
    """`clip_at_percentile` with norm, limit and scale in `result` (3,) float32."""
    _check(grad, gnorm_vec, result, step, percentile)
    slot = step % HISTORY_LENGTH
    square = grad.float().square().sum()
    gnorm_vec[slot] = 0.0
    gnorm_vec[slice(None) if step == 1 else slot] += square
    norm, limit = gnorm_vec[slot].sqrt(), gnorm_vec.sort().values[percentile].sqrt()
    result.copy_(torch.stack([norm, limit, torch.where(norm > limit, limit / norm, 1.0)]))


@record_gradient_norm.fake
def _fake(grad: Tensor, gnorm_vec: Tensor, result: Tensor, step: int, percentile: int) -> None:
    _check(grad, gnorm_vec, result, step, percentile)


def _check(grad: Tensor, gnorm_vec: Tensor, result: Tensor, step: int, percentile: int) -> None:
    if grad.dtype not in _FLOATS:
        raise TypeError(f"percentile clipping takes a gradient in float32, bfloat16 or float16, got {grad.dtype}")
    for name, tensor, shape in (("gnorm_vec", gnorm_vec, (HISTORY_LENGTH,)), ("result", result, (3,))):
        if tensor.shape != shape or tensor.dtype != torch.float32 or tensor.device != grad.device:
            raise ValueError(
                f"percentile clipping takes {name} of shape {shape}, float32, on {grad.device}, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    if step < 1:
        raise ValueError(f"percentile clipping counts steps from 1, got step {step}")
    if not 0 <= percentile < HISTORY_LENGTH:
        raise ValueError(
            f"percentile must be 0 to {HISTORY_LENGTH - 1}, got {percentile}; to clip nothing, do not call it"
        )


@triton.jit
def _sum_of_squares_kernel(grad_ptr, partial_ptr, numel, TILE: tl.constexpr):
    """Of every num_programs-th tile, added in one order: the same result every time."""
    lane = tl.arange(0, TILE).to(tl.int64)
    total = tl.zeros([TILE], tl.float32)
    for start in range(tl.program_id(0), tl.cdiv(numel, TILE), tl.num_programs(0)):
        offset = tl.cast(start, tl.int64) * TILE + lane
        grad = tl.load(grad_ptr + offset, mask=offset < numel, other=0.0).to(tl.float32)
        total += grad * grad
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total))


@triton.jit(do_not_specialize=["slot", "percentile"])
def _record_norm_kernel(
    partial_ptr,
    history_ptr,
    result_ptr,
    partials,
    stride_history,
    stride_result,
    slot,
    percentile,
    FIRST: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    partial = tl.arange(0, PARTIALS)
    square = tl.sum(tl.load(partial_ptr + partial, mask=partial < partials, other=0.0))
    place = tl.arange(0, _PADDED_LENGTH)
    history = tl.load(history_ptr + place * stride_history, mask=place < _LENGTH, other=0.0)
    history = tl.where(place == slot, 0.0, history)
    if FIRST:
        history += square
    else:
        history = tl.where(place == slot, square, history)
    square = tl.sum(tl.where(place == slot, history, 0.0))
    tl.store(history_ptr + place * stride_history, history, mask=place < _LENGTH)
    # The bits of a float >= 0 order like its value, and those of a NaN are the largest. The rank of a place is the
    # number of places that sort before it; exactly one has the rank `percentile`.
    bits = tl.where(place < _LENGTH, tl.abs(history).to(tl.int32, bitcast=True), 0x7FFFFFFF)
    before = (bits[None, :] < bits[:, None]) | ((bits[None, :] == bits[:, None]) & (place[None, :] < place[:, None]))
    rank = tl.sum(before.to(tl.int32), axis=1)
    limit = tl.sqrt_rn(tl.sum(tl.where(rank == percentile, bits, 0)).to(tl.float32, bitcast=True))
    norm = tl.sqrt_rn(square)
    clip = norm > limit
    tl.store(result_ptr, norm)
    tl.store(result_ptr + stride_result, limit)
    tl.store(result_ptr + 2 * stride_result, tl.where(clip, tl.div_rn(limit, tl.where(clip, norm, 1.0)), 1.0))


_TILE = 4096
_PARTIALS = 1024  # programs, at most: what one program adds up at once


@record_gradient_norm.triton
def _launch(grad: Tensor, gnorm_vec: Tensor, result: Tensor, step: int, percentile: int) -> None:
    _check(grad, gnorm_vec, result, step, percentile)
    grad = grad.contiguous()
    partials = min(max(triton.cdiv(grad.numel(), _TILE), 1), _PARTIALS)
    partial = torch.empty(partials, dtype=torch.float32, device=grad.device)
    _sum_of_squares_kernel[(partials,)](grad, partial, grad.numel(), TILE=_TILE)
    _record_norm_kernel[(1,)](
        partial,
        gnorm_vec,
        result,
        partials,
        gnorm_vec.stride(0),
        result.stride(0),
        step % HISTORY_LENGTH,
        percentile,
        FIRST=step == 1,
        PARTIALS=_PARTIALS,
    )
