"""What an update reads about each tensor, written on the device before it: step, clip factor, the rule's numbers.

Facts are 16 float32: whether the tensor takes part, the factor of its gradient (negative to maximise), the seed of its
random bits (uint32), one that is free, and the rule's 12 numbers. Hyper-parameters are 16 float64 for each param group:
lr, sign of the gradient, seed, one that is free, and the rule's 12. Nothing is read back by the host.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lq_kernels._triton import tl, triton
from lq_kernels.multi_tensor import GRAD, GROUP, NUMBER, STEP, State, address, capturing, pointer
from lq_kernels.optimizer_batch import FACTS, HYPER, Batch, LaunchData
from lq_kernels.optimizer_rules import Rule
from lq_kernels.percentile_clipping import clip, percentile_factor, squared_norm
from lq_kernels.rounding import hashed_seed, random_word

RULE_NUMBERS = 4  # where the numbers of the rule begin, in facts and in hyper-parameters

FACTS_T = tl.constexpr(FACTS)
RULE_NUMBERS_T = tl.constexpr(RULE_NUMBERS)
ACTIVE, FACTOR, SEED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_HYPER = tl.constexpr(HYPER)


@dataclass(frozen=True)
class Clipping:
    """`percentile` None is no clipping; `scope` "global" takes one norm over all tensors."""

    percentile: int | None = None
    scope: str = "tensor"

    @property
    def is_global(self) -> bool:
        return self.percentile is not None and self.scope == "global"


NO_CLIPPING = Clipping()


@dataclass(frozen=True)
class Facts:
    """What an update reads about a tensor."""

    active: bool
    factor: float = 0.0
    numbers: tuple[float, ...] = ()


def prepare(
    batch: Batch, grads: Sequence[Tensor | None], rules: Sequence[Rule], clipping: Clipping, total: float | None = None
) -> list[Facts]:
    """The reference of `launch_prepare`; `total` is the square of the norm over all tensors."""
    return [
        _prepare_one(grad, state, rules[group], clipping, total)
        for grad, state, group in zip(grads, batch.states, batch.groups, strict=True)
    ]


def _prepare_one(grad: Tensor | None, state: State, rule: Rule, clipping: Clipping, total: float | None) -> Facts:
    factor: float | None = 1.0
    if clipping.percentile is not None and (grad is not None or total is not None):
        own = squared_norm(grad)
        norm = float(torch.tensor(own if total is None else total).sqrt())
        histories = state["gnorm_history"], state["gnorm_counts"]
        factor = percentile_factor(norm, *histories, clipping.percentile, counted=not math.isfinite(own))
    if factor is None or grad is None:
        return Facts(active=False)
    step = float(state["step"].add_(1))
    return Facts(True, -factor if rule.maximize else factor, rule.numbers(float(rule.lr), step))


def launch_prepare(
    batch: Batch, table: Tensor, rules: Sequence[Rule], seeds: Sequence[int], clipping: Clipping, squares: Tensor | None
) -> Tensor:
    """Facts (tensors, 16) float32 on the device, in one launch.

    Rules and seeds are those of the batch's groups, in order; `squares` are the partial sums of all batches, for
    clipping in the scope "global".
    """
    data = batch.launch_data()
    clips = clipping.percentile is not None
    sums = data.norms() if clips else None
    partials, first = (data.facts, data.facts) if sums is None else (sums.partials, sums.first)
    squares = partials if squares is None else squares
    _prepare_kernel[(len(batch.params),)](
        table,
        partials,
        first,
        squares,
        squares.numel(),
        write_hyper(data, rules, seeds),
        data.facts,
        clipping.percentile or 0,
        RULE_NUMBERS_OF=rules[0].kernels.numbers,
        CLIP=clips,
        GLOBAL=clipping.is_global,
    )
    return data.facts


def write_hyper(data: LaunchData, rules: Sequence[Rule], seeds: Sequence[int]) -> Tensor:
    """The hyper-parameters on the device; a learning rate that is a tensor there is copied on the device."""
    device = data.facts.device
    on_device = [isinstance(rule.lr, Tensor) and rule.lr.device == device and device.type != "cpu" for rule in rules]
    rows = [
        (0.0 if there else float(rule.lr), -1.0 if rule.maximize else 1.0, float(seed), 0.0, *rule.hyper())
        for rule, seed, there in zip(rules, seeds, on_device, strict=True)
    ]
    if rows != data.hyper_rows:
        data.hyper_rows = rows
        data.hyper.rows[:, : len(rows[0])] = torch.tensor(rows, dtype=torch.float64)
        data.hyper.changed()
    hyper = data.hyper.on_device()
    for row, rule, there in zip(hyper, rules, on_device, strict=True) if any(on_device) else ():
        if there:
            row[0].copy_(rule.lr)
    if capturing(device):
        data.hyper_rows = []
    return hyper


@triton.jit
def _prepare_kernel(
    table_ptr,
    partials_ptr,
    first_ptr,
    all_ptr,
    all_count,
    hyper_ptr,
    facts_ptr,
    percentile,
    RULE_NUMBERS_OF: tl.constexpr,
    CLIP: tl.constexpr,
    GLOBAL: tl.constexpr,
):
    tensor = tl.program_id(0)
    hyper_ptr += address(table_ptr, tensor, GROUP) * _HYPER
    facts_ptr += tensor * FACTS_T
    active = address(table_ptr, tensor, GRAD) != 0
    factor = 1.0
    if CLIP:
        factor, taken = clip(table_ptr, tensor, partials_ptr, first_ptr, all_ptr, all_count, active, percentile, GLOBAL)
        active = active & taken
    step_ptr = pointer(table_ptr, tensor, STEP, tl.float32, False)
    step = tl.load(step_ptr) + 1.0
    tl.store(step_ptr, step, mask=active)
    tl.store(facts_ptr + ACTIVE, active.to(tl.float32))
    tl.store(facts_ptr + FACTOR, factor * tl.load(hyper_ptr + 1).to(tl.float32))
    seed = tl.load(hyper_ptr + 2).to(tl.int64)
    of_step = random_word(hashed_seed(seed, step.to(tl.int64) >> 32), step.to(tl.int64))
    of_tensor = random_word(hashed_seed(of_step, of_step * 0), address(table_ptr, tensor, NUMBER))
    tl.store(facts_ptr + SEED, of_tensor.to(tl.float32, bitcast=True))
    RULE_NUMBERS_OF(hyper_ptr + RULE_NUMBERS_T, facts_ptr + RULE_NUMBERS_T, tl.load(hyper_ptr), step.to(tl.float64))
