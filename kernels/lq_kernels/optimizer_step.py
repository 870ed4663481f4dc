"""One step of an optimizer over batches of tensors: one update launch for each layout of a batch, and what precedes it.

    squares   partial norms of the gradients, where they are clipped             (percentile_clipping.py)
    prepare   steps, clip factors and the rule's numbers, one program a tensor   (optimizer_facts.py)
    measure   sums that the rule's trust needs: LAMB, LARS, StableAdamW
    update    weights and states

Nothing waits for the device, and all of it can be captured in a CUDA graph. On other devices than CUDA's the same is
done in torch, one tensor after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lq_kernels._op import require_triton
from lq_kernels._triton import tl, triton
from lq_kernels.approximate import ptx_arch
from lq_kernels.dynamic_map import constants
from lq_kernels.multi_tensor import GRAD, NUMEL, State, address, all_there, pointer
from lq_kernels.optimizer_batch import Batch, Layout, triton_type
from lq_kernels.optimizer_facts import (
    ACTIVE,
    FACTOR,
    FACTS_T,
    NO_CLIPPING,
    RULE_NUMBERS_T,
    SEED,
    Clipping,
    Facts,
    launch_prepare,
    prepare,
)
from lq_kernels.optimizer_rules import Rule
from lq_kernels.optimizer_state import block_tile, load_moment, load_moment_tile, store_moment, store_moment_tile
from lq_kernels.percentile_clipping import launch_squares, squared_norm, sum_of_partials
from lq_kernels.weight_rounding import (
    join_weight,
    load_weight,
    round_stochastically,
    split_weight,
    step_seed,
    store_weight,
    to_float32,
)

T = TypeVar("T", Tensor, Tensor | None)

_PART = 1 << 17  # elements of a float32 tensor and its moments that stay in a cache of 2 MB


@dataclass(frozen=True)
class Job:
    """What is done to a batch: grads[i] belongs to params[i], None leaves it as it is; rules[j] is that of group j.

    `seeds` None rounds bfloat16 weights to the nearest, else stochastically by the seed of each group.
    """

    batch: Batch
    grads: Sequence[Tensor | None]
    rules: Sequence[Rule]
    clipping: Clipping = NO_CLIPPING
    seeds: Sequence[int] | None = None


def optimizer_step(jobs: Sequence[Job]) -> None:
    """Updates parameters and states in place; with clipping in the scope "global" the jobs share one norm."""
    for device in dict.fromkeys(job.batch.device for job in jobs):
        of_device = [job for job in jobs if job.batch.device == device]
        if device.type == "cuda":
            require_triton("an optimizer with few-bit state")
            with torch.cuda.device(device):
                launch_step(of_device)
        else:
            step_reference(of_device)
        for job in of_device:
            torch.autograd.graph.increment_version(_updated(job))


def _updated(job: Job) -> Sequence[Tensor]:
    if all_there(job.grads):
        return job.batch.params
    return [param for param, grad in zip(job.batch.params, job.grads, strict=True) if grad is not None]


def step_reference(jobs: Sequence[Job]) -> None:
    """The step in torch."""
    total = sum(squared_norm(grad) for job in jobs for grad in job.grads) if jobs[0].clipping.is_global else None
    for job in jobs:
        batch = job.batch
        facts_of = prepare(batch, job.grads, job.rules, job.clipping, total)
        for i, (grad, facts) in enumerate(zip(job.grads, facts_of, strict=True)):
            if grad is not None and facts.active:
                seed = None
                if job.seeds is not None and batch.params[i].dtype == torch.bfloat16:
                    seed = step_seed(job.seeds[batch.groups[i]], int(batch.states[i]["step"]), batch.numbers[i])
                _update_one(batch.params[i], grad, batch.states[i], job.rules[batch.groups[i]], facts, seed)


def _update_one(param: Tensor, grad: Tensor, state: State, rule: Rule, facts: Facts, seed: Tensor | None) -> None:
    for rows in _parts(param, whole=rule.measured or seed is not None):
        part = {name: value[rows] if value.dim() else value for name, value in state.items()}
        _update_part(param[rows], grad[rows], part, rule, facts, seed)


def _parts(param: Tensor, whole: bool) -> list[Any]:
    """Indices of parts of whole rows that stay in a CPU's cache between the operations of a step."""
    rows = max(1, _PART * param.shape[0] // param.numel()) if param.dim() and param.numel() else 0
    if whole or not rows or rows >= param.shape[0]:
        return [...]
    return [slice(start, start + rows) for start in range(0, param.shape[0], rows)]


def _update_part(param: Tensor, grad: Tensor, state: State, rule: Rule, facts: Facts, seed: Tensor | None) -> None:
    p = _weight(param, state)
    g = grad.float() * facts.factor
    moments = [load_moment(state, i, signed) for i, signed in enumerate(rule.signs, 1)]
    trust = rule.trust(p, g, moments, facts.numbers) if rule.measured else 1.0
    rule.update(p, g, moments, facts.numbers, trust)
    _store(p, param, state, seed)
    for i, signed in enumerate(rule.signs, 1):
        store_moment(state, i, moments[i - 1], signed)


def _weight(param: Tensor, state: State) -> Tensor:
    """The weight in float32, with the bits that its master keeps; a float32 parameter is its own, not a copy."""
    master = state.get("master")
    if master is None:
        return param.float()
    if master.dtype == torch.int8:
        return join_weight(param, master)
    return torch.where(master.to(param.dtype) == param, master, param.float())


def _store(p: Tensor, param: Tensor, state: State, seed: Tensor | None) -> None:
    master = state.get("master")
    if master is not None and master.dtype == torch.int8:
        weight, correction = split_weight(p)
        master.copy_(correction)
        param.copy_(weight)
        return
    if master is not None:
        master.copy_(p)
    if p is not param:
        param.copy_(p if seed is None else round_stochastically(p, seed))


def launch_step(jobs: Sequence[Job]) -> None:
    """The step in Triton."""
    contiguous = [_contiguous(job.batch.params) for job in jobs]
    # Held until everything is launched: the kernels know their addresses only.
    grads = [_contiguous(job.grads) for job in jobs]
    tables = [
        job.batch.launch_data().addresses.refresh(params, of_job)
        for job, params, of_job in zip(jobs, contiguous, grads, strict=True)
    ]
    for job, table in zip(jobs, tables, strict=True):
        if job.clipping.percentile is not None:
            launch_squares(job.batch, table)
    squares = _all_squares(jobs) if jobs[0].clipping.is_global else None
    for job, table, params in zip(jobs, tables, contiguous, strict=True):
        facts = launch_prepare(job.batch, table, job.rules, job.seeds or [0] * len(job.rules), job.clipping, squares)
        for layout, work in job.batch.launch_data().work.items():
            if len(work):
                _launch_update(job, layout, table, facts)
        if params is not job.batch.params:
            for param, copy in zip(job.batch.params, params, strict=True):
                if copy is not param:
                    param.copy_(copy)


def _contiguous(tensors: Sequence[T]) -> Sequence[T]:
    """The sequence itself where there is nothing to copy."""
    if all_there(tensors) and all(map(Tensor.is_contiguous, tensors)):
        return tensors
    return [tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous() for tensor in tensors]


def _all_squares(jobs: Sequence[Job]) -> Tensor:
    partials = [job.batch.launch_data().norms().partials for job in jobs]
    return partials[0] if len(partials) == 1 else torch.cat(partials)


def _launch_update(job: Job, layout: Layout, table: Tensor, facts: Tensor) -> None:
    batch, rule, data = job.batch, job.rules[0], job.batch.launch_data()
    work, tables = data.work[layout], constants(batch.device)
    common = {
        "PARAM_TYPE": triton_type(batch.params[0].dtype),
        "GRAD_TYPE": triton_type(batch.grad_type),
        "SCALED": job.clipping.percentile is not None or any(rule.maximize for rule in job.rules),
        "SIGNS": tuple(int(signed) for signed in rule.signs),
        "DECAYS": rule.decays,
        "VARIANT": rule.variant,
        "MASTER_KIND": batch.master,
        "FORMAT": layout.format,
        "FLAT": layout.flat,
        "ALIGNED": data.addresses.aligned,
        "BLOCKS": layout.blocks,
        "PTX": ptx_arch(),
    }
    sums = data.measures(layout) if rule.measured else None
    if sums is not None:
        _measure_kernel[(len(sums.work),)](
            table, sums.work, facts, tables, sums.partials, MEASURE=rule.kernels.measure, **common
        )
    _update_kernel[(len(work),)](
        table,
        work,
        facts,
        tables,
        *((facts, facts) if sums is None else (sums.partials, sums.first)),
        UPDATE=rule.kernels.update,
        TRUST=rule.kernels.trust if rule.measured else None,
        STOCHASTIC=job.seeds is not None and batch.params[0].dtype == torch.bfloat16,
        **common,
    )


@triton.jit
def _decay(facts_ptr, INDEX: tl.constexpr):
    if INDEX is None:
        return 1.0
    else:
        return tl.load(facts_ptr + RULE_NUMBERS_T + INDEX)


@triton.jit
def _load_tile(
    table_ptr,
    tensor,
    facts_ptr,
    constants_ptr,
    first_block,
    base,
    offset,
    mask,
    block_mask,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    SCALED: tl.constexpr,
    SIGNS: tl.constexpr,
    DECAYS: tl.constexpr,
    MASTER_KIND: tl.constexpr,
    FORMAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Weight, gradient times its factor, three decayed moments; those that a rule does not have are the gradient."""
    p = load_weight(table_ptr, tensor, base, offset, mask, PARAM_TYPE, MASTER_KIND, ALIGNED)
    grad_ptr = pointer(table_ptr, tensor, GRAD, GRAD_TYPE, ALIGNED) + base + offset
    g = to_float32(tl.load(grad_ptr, mask=mask, other=0.0))
    if SCALED:
        g *= tl.load(facts_ptr + FACTOR)
    m1 = g
    m2 = g
    m3 = g
    if len(SIGNS) > 0:
        m1 = load_moment_tile(
            table_ptr, tensor, constants_ptr, first_block, base, offset, mask, block_mask,
            _decay(facts_ptr, DECAYS[0]), 0, SIGNS[0], FORMAT, ALIGNED, BLOCKS, PTX,
        )  # fmt: skip
    if len(SIGNS) > 1:
        m2 = load_moment_tile(
            table_ptr, tensor, constants_ptr, first_block, base, offset, mask, block_mask,
            _decay(facts_ptr, DECAYS[1]), 1, SIGNS[1], FORMAT, ALIGNED, BLOCKS, PTX,
        )  # fmt: skip
    if len(SIGNS) > 2:
        m3 = load_moment_tile(
            table_ptr, tensor, constants_ptr, first_block, base, offset, mask, block_mask,
            _decay(facts_ptr, DECAYS[2]), 2, SIGNS[2], FORMAT, ALIGNED, BLOCKS, PTX,
        )  # fmt: skip
    return p, g, m1, m2, m3


@triton.jit
def _measure_kernel(
    table_ptr,
    work_ptr,
    facts_ptr,
    constants_ptr,
    partials_ptr,
    MEASURE: tl.constexpr,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    SCALED: tl.constexpr,
    SIGNS: tl.constexpr,
    DECAYS: tl.constexpr,
    VARIANT: tl.constexpr,
    MASTER_KIND: tl.constexpr,
    FORMAT: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Two sums over some neighbouring blocks of a tensor, added in one order."""
    program = tl.program_id(0)
    tensor = tl.load(work_ptr + program * 3)
    first_block = tl.load(work_ptr + program * 3 + 1).to(tl.int64)
    last_block = tl.load(work_ptr + program * 3 + 2).to(tl.int64)
    facts_ptr += tensor * FACTS_T
    active = tl.load(facts_ptr + ACTIVE)
    total1 = tl.zeros([BLOCKS * 256], tl.float32)
    total2 = tl.zeros([BLOCKS * 256], tl.float32)
    while first_block < last_block:
        base, offset, mask, block_mask = block_tile(table_ptr, tensor, first_block, active, BLOCKS, FLAT)
        p, g, m1, m2, m3 = _load_tile(
            table_ptr, tensor, facts_ptr, constants_ptr, first_block, base, offset, mask, block_mask,
            PARAM_TYPE, GRAD_TYPE, SCALED, SIGNS, DECAYS, MASTER_KIND, FORMAT, ALIGNED, BLOCKS, PTX,
        )  # fmt: skip
        of_tile1, of_tile2 = MEASURE(p, g, m1, m2, m3, facts_ptr + RULE_NUMBERS_T, VARIANT, PTX)
        total1 += tl.where(mask, of_tile1, 0.0)
        total2 += tl.where(mask, of_tile2, 0.0)
        first_block += BLOCKS
    tl.store(partials_ptr + program * 2, tl.sum(total1))
    tl.store(partials_ptr + program * 2 + 1, tl.sum(total2))


@triton.jit
def _update_kernel(
    table_ptr,
    work_ptr,
    facts_ptr,
    constants_ptr,
    partials_ptr,
    first_ptr,
    UPDATE: tl.constexpr,
    TRUST: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    SCALED: tl.constexpr,
    SIGNS: tl.constexpr,
    DECAYS: tl.constexpr,
    VARIANT: tl.constexpr,
    MASTER_KIND: tl.constexpr,
    FORMAT: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
    PTX: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(work_ptr + program * 3)
    first_block = tl.load(work_ptr + program * 3 + 1).to(tl.int64)
    facts_ptr += tensor * FACTS_T
    active = tl.load(facts_ptr + ACTIVE)
    seed = tl.load(facts_ptr + SEED).to(tl.uint32, bitcast=True)
    trust = 1.0
    if TRUST is not None:
        first, last = tl.load(first_ptr + tensor), tl.load(first_ptr + tensor + 1)
        sums = sum_of_partials(partials_ptr, first, last, 2), sum_of_partials(partials_ptr + 1, first, last, 2)
        trust = TRUST(sums[0], sums[1], address(table_ptr, tensor, NUMEL), facts_ptr + RULE_NUMBERS_T)

    base, offset, mask, block_mask = block_tile(table_ptr, tensor, first_block, active, BLOCKS, FLAT)
    p, g, m1, m2, m3 = _load_tile(
        table_ptr, tensor, facts_ptr, constants_ptr, first_block, base, offset, mask, block_mask,
        PARAM_TYPE, GRAD_TYPE, SCALED, SIGNS, DECAYS, MASTER_KIND, FORMAT, ALIGNED, BLOCKS, PTX,
    )  # fmt: skip
    p, m1, m2, m3 = UPDATE(p, g, m1, m2, m3, facts_ptr + RULE_NUMBERS_T, trust, VARIANT, PTX)
    store_weight(p, table_ptr, tensor, base, offset, mask, seed, PARAM_TYPE, MASTER_KIND, STOCHASTIC, ALIGNED, FLAT)
    if len(SIGNS) > 0:
        store_moment_tile(
            m1, table_ptr, tensor, constants_ptr, first_block, base, offset, mask, block_mask,
            0, SIGNS[0], FORMAT, ALIGNED, FLAT, BLOCKS, PTX,
        )  # fmt: skip
    if len(SIGNS) > 1:
        store_moment_tile(
            m2, table_ptr, tensor, constants_ptr, first_block, base, offset, mask, block_mask,
            1, SIGNS[1], FORMAT, ALIGNED, FLAT, BLOCKS, PTX,
        )  # fmt: skip
    if len(SIGNS) > 2:
        store_moment_tile(
            m3, table_ptr, tensor, constants_ptr, first_block, base, offset, mask, block_mask,
            2, SIGNS[2], FORMAT, ALIGNED, FLAT, BLOCKS, PTX,
        )  # fmt: skip
