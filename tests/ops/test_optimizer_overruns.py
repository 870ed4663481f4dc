"""The optimizers' kernels touch nothing beyond their tensors, not even where they throw away what they read."""

import pytest
import torch
from guarded_memory import guarded, new_tensors_guarded
from lq_kernels.adam_rules import AdEMAMix
from lq_kernels.functional_optim import launch_flat
from lq_kernels.optimizer_batch import Batch
from lq_kernels.optimizer_facts import NO_CLIPPING, Clipping
from lq_kernels.optimizer_step import launch_step
from optimizer_cases import CLIPPED, RULES, Case, trained, with_masters
from torch import Tensor

pytest.importorskip("triton")
# On a GPU compute-sanitizer finds what this finds in the interpreter.
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU"),
]

SHAPES = [(2, 512), (9, 256), (3, 257), (1, 3), (2049,), (8193,), (1,), ()]


def guarded_case(case: Case, at_end: bool) -> Case:
    params = [guarded(param, at_end) for param in case.batch.params]
    states = [{key: guarded(value, at_end) for key, value in state.items()} for state in case.batch.states]
    grads: list[Tensor | None] = [None if grad is None else guarded(grad, at_end) for grad in case.grads]
    return Case(Batch(params, states, case.batch.grad_type), grads)


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "beginning"])
@pytest.mark.parametrize(
    ("name", "kind", "dtype", "master", "clipping"),
    [
        ("ademamix", "dynamic", torch.bfloat16, torch.int8, CLIPPED),
        ("ademamix", "e4m3", torch.bfloat16, torch.float32, Clipping(5, "global")),
        ("lamb", "dynamic", torch.float32, None, NO_CLIPPING),
        ("sgd, momentum", "float32", torch.float16, None, NO_CLIPPING),
    ],
)
def test_steps_stay_within_their_tensors(
    name: str, kind: str, dtype: torch.dtype, master: torch.dtype | None, clipping: Clipping, at_end: bool
) -> None:
    case = trained(dtype, rule=RULES[name], kind=kind, shapes=SHAPES)
    case = guarded_case(case if master is None else with_masters(case, master), at_end)
    seeds = [1] if dtype == torch.bfloat16 and master is None else None
    with new_tensors_guarded():
        launch_step([case.job(RULES[name], clipping, seeds)])


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "beginning"])
@pytest.mark.parametrize("numel", [1, 1500, 2048])
def test_functional_updates_stay_within_their_tensors(numel: int, at_end: bool) -> None:
    rule = RULES["ademamix"]
    assert isinstance(rule, AdEMAMix)
    p, g, *moments = (guarded(torch.rand(numel), at_end) for _ in range(5))
    numbers = guarded(torch.tensor(rule.numbers(1e-2, 3)), at_end)
    launch_flat(rule, p, g, moments, numbers, 1.0, guarded(torch.tensor(0.5), at_end), True, 0.999)
