"""The update kernel against the reference, one step from equal states, on tensors cut from poisoned memory."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from lq_kernels import optimizer_batch
from lq_kernels.adam_rules import Adam
from lq_kernels.multi_tensor import State, work_list
from lq_kernels.muon_rules import MuonWeight
from lq_kernels.optimizer_batch import Batch, Layout
from lq_kernels.optimizer_facts import NO_CLIPPING, Clipping
from lq_kernels.optimizer_rules import Rule
from lq_kernels.optimizer_state import load_moment, new_state
from lq_kernels.optimizer_step import Job, launch_step, optimizer_step, step_reference
from optimizer_cases import (
    ADAMW,
    CLIPPED,
    CPU,
    FEW,
    MARGIN,
    RULES,
    SHAPES,
    Case,
    every_tensor,
    margins,
    trained,
    weight,
    with_masters,
)
from torch import Tensor


def bound_of_update(
    before: Tensor, after: Tensor, grad: Tensor, state: State, step: float, adam: Adam, clipped: bool
) -> Tensor:
    """What the kernel's parameter may differ from `after` by, in float64.

    The update is m / denominator. m is a sum of two rounded terms, so its roundings are relative to their magnitudes;
    L2's g = grad + wd p likewise, and a relative error of g is one of v. With the approximate roots 2^-19 of all that,
    with a clipping factor from norms added in another order 2^-18; and one unit of the parameter's type.
    """
    beta1, beta2 = adam.betas
    decay = 0 if adam.decoupled else adam.weight_decay * before.double()
    g = grad.double() + decay
    magnitude = grad.double().abs() + torch.as_tensor(decay).abs()
    terms = beta1 * load_moment(state, 1, True).double().abs() + (1 - beta1) * magnitude
    # A clipped gradient is smaller than `grad`, and v with it.
    v = beta2 * load_moment(state, 2, False).double() + (0 if clipped else (1 - beta2) * g**2)
    update = float(adam.lr) / (1 - beta1**step) * terms / ((v / (1 - beta2**step)).sqrt() + adam.eps)
    unit = torch.finfo(before.dtype).eps * torch.maximum(before.double().abs(), after.double().abs())
    return (2.0**-18 if clipped else 2.0**-19) * update * (magnitude / g.abs()).nan_to_num(1) + unit + 1e-12


def readable(codes: Tensor, scale: Tensor) -> Tensor:
    """Which codes stand for a value: under a scale that is NaN or infinite none does, and backends differ in them."""
    columns = codes.numel() // codes.shape[0]
    blocks = scale.isfinite().repeat_interleave(256, dim=1)[:, :columns]
    return blocks.reshape(codes.shape)


def bound_of_step(before: Tensor, after: Tensor) -> Tensor:
    """For rules whose roundings are not followed one by one: 2^-15 of the tensor's largest step, and one unit."""
    unit = torch.finfo(before.dtype).eps * torch.maximum(before.double().abs(), after.double().abs())
    largest = (after.double() - before.double()).abs().nan_to_num(0, 0, 0).flatten().tolist()
    return 2.0**-15 * max(largest, default=0) + unit + 1e-12


def assert_steps_agree(
    case: Case,
    rule: Rule,
    device: torch.device,
    margin: int = MARGIN,
    clipping: Clipping = NO_CLIPPING,
    seeds: list[int] | None = None,
) -> None:
    start = case
    expected, got = case.to(CPU), case.to(device, margin)
    edges = [margins(tensor).clone() for tensor in every_tensor(got)]
    step_reference([expected.job(rule, clipping, seeds)])
    launch_step([got.job(rule, clipping, seeds)])
    off, codes = 0, 0
    clips = clipping.percentile is not None
    for i, (ours, theirs) in enumerate(zip(got.batch.params, expected.batch.params, strict=True)):
        before, grad, state = start.batch.params[i], start.grads[i], start.batch.states[i]
        new, old = got.batch.states[i], expected.batch.states[i]
        difference = (ours.cpu().double() - theirs.double()).abs()
        assert torch.equal(ours.cpu().isnan(), theirs.isnan())
        if grad is None or (clips and not grad.isfinite().all()):
            assert torch.equal(ours.cpu(), before)
        else:
            bound = bound_of_step(before, theirs)
            if isinstance(rule, Adam) and not rule.stable:
                bound = bound_of_update(before, theirs, grad, state, float(old["step"]), rule, clips)
            assert not (difference > bound).any()
        for key in old:
            if key.startswith("codes"):
                distance = (new[key].cpu().view(torch.uint8).int() - old[key].view(torch.uint8).int()).abs()
                distance = distance * readable(old[key], old[key.replace("codes", "scale")])
                assert distance.max() <= 1, (key, tuple(before.shape))
                off, codes = off + int(distance.sum()), codes + distance.numel()
            elif key in ("step", "gnorm_counts"):
                assert torch.equal(new[key].cpu(), old[key])
            else:
                # a sum of two rounded terms that may cancel, each of the size of the largest at most
                largest = max(old[key].nan_to_num(0, 0, 0).abs().flatten().tolist(), default=0)
                torch.testing.assert_close(
                    new[key].cpu(), old[key], rtol=2.0**-18, atol=2.0**-22 * largest, equal_nan=True
                )
    # One code in 2^16 is where rounding moves a value over a midpoint (test_blockwise); a GPU rounds more, and few
    # codes are a small sample.
    assert off <= 2 + codes * 2.0**-14
    for edge, tensor in zip(edges, every_tensor(got), strict=True):
        assert torch.equal(margins(tensor).view(torch.uint8), edge.view(torch.uint8))


# Further inputs: what they compute others compute too.
REPEATED = ("stable adamw", "rmsprop", "rmsprop, centered", "muon, direction")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "dynamic") for name in RULES if name not in REPEATED),
        *(pytest.param(name, "dynamic", marks=pytest.mark.thorough) for name in REPEATED),
        *((name, "e4m3") for name in ("ademamix", "lars")),
        *(pytest.param(name, "e4m3", marks=pytest.mark.thorough) for name in REPEATED),
        *((name, "float32") for name in ("adamw", "adagrad")),
        *(pytest.param(name, "float32", marks=pytest.mark.thorough) for name in ("stable adam", "lamb", "lion")),
    ],
)
def test_kernel_steps_as_the_reference(name: str, kind: str, device: torch.device) -> None:
    rule = RULES[name]
    assert_steps_agree(trained(torch.float32, rule=rule, kind=kind), rule, device)


@pytest.mark.parametrize("margin", [1, 3])
def test_kernel_takes_addresses_that_are_not_aligned(margin: int, device: torch.device) -> None:
    assert_steps_agree(trained(torch.float32, shapes=FEW), ADAMW, device, margin)


@pytest.mark.parametrize(("margin", "aligned"), [(MARGIN, True), (1, False), (8, False)])
def test_wide_loads_are_promised_only_where_every_address_allows_them(
    margin: int, aligned: bool, device: torch.device
) -> None:
    case = trained(torch.float32, shapes=FEW).to(device, margin)
    addresses = case.batch.launch_data().addresses
    addresses.refresh(case.batch.params, case.grads)
    assert addresses.aligned == aligned


@pytest.mark.parametrize(
    ("dtype", "grad_type"),
    [(torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)],
)
def test_kernel_takes_all_types(dtype: torch.dtype, grad_type: torch.dtype, device: torch.device) -> None:
    assert_steps_agree(trained(dtype, grad_type), ADAMW, device)


@pytest.mark.parametrize("clipping", [Clipping(), CLIPPED, Clipping(5, "global")], ids=str)
def test_kernel_takes_gradients_that_are_absent_zero_or_not_finite(clipping: Clipping, device: torch.device) -> None:
    rule = replace(ADAMW, maximize=True)
    case = trained(torch.float32, rule=rule, clipping=clipping)
    case.grads[0] = case.grads[7] = None
    case.grads[2] = torch.zeros(SHAPES[2])
    if clipping.scope == "global":
        assert_steps_agree(case, rule, device, clipping=clipping)
        return
    for i, poison in ((1, math.nan), (8, math.inf)):
        grad = case.grads[i]
        assert grad is not None
        grad.view(-1)[-1] = poison
    assert_steps_agree(case, rule, device, clipping=clipping)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_skipped_tensor_keeps_its_bits(scope: str, device: torch.device) -> None:
    case = trained(torch.float32).to(device)
    before = copy.deepcopy((case.batch.params, case.batch.states))
    poisoned_ones = [i for i in range(len(SHAPES)) if SHAPES[i] != (0,) and (scope == "tensor" or i == 3)]
    for i in poisoned_ones:
        grad = case.grads[i]
        assert grad is not None
        grad.view(-1)[-1:] = math.nan
    launch_step([case.job(ADAMW, Clipping(5, scope))])
    for old, new in zip(before[0], case.batch.params, strict=True):
        assert torch.equal(old, new)
    for i, (old_state, state) in enumerate(zip(before[1], case.batch.states, strict=True)):
        skipped = torch.tensor([0, 0, int(i in poisoned_ones)], device=device)
        assert torch.equal(state.pop("gnorm_counts"), old_state.pop("gnorm_counts") + skipped)
        taken = int(scope == "tensor" and i not in poisoned_ones)
        assert state.pop("step") == old_state.pop("step") + taken
        assert all(torch.equal(old_state[key], state[key]) for key in state)


def test_one_norm_over_all_tensors_of_all_batches(device: torch.device) -> None:
    cases = [trained(torch.float32, shapes=FEW), trained(torch.bfloat16, shapes=FEW)]
    clipping = Clipping(50, "global")
    got = [case.to(device) for case in cases]
    for scale in (1.0, 3.0):
        for same in zip(cases, got, strict=True):
            for case in same:
                case.grads = [torch.full(shape, scale, dtype=case.batch.grad_type) for shape in FEW]
        for case in got:
            case.grads = [None if grad is None else grad.to(device) for grad in case.grads]
        step_reference([case.job(ADAMW, clipping) for case in cases])
        launch_step([case.job(ADAMW, clipping) for case in got])
    numel = 2 * sum(math.prod(shape) for shape in FEW)
    for case in [*cases, *got]:
        for state in case.batch.states:
            assert state["gnorm_history"][:2].tolist() == pytest.approx([numel**0.5, 3 * numel**0.5], rel=1e-6)
            assert state["gnorm_counts"].tolist() == [2, 1, 0]
    for case, other in zip(cases, got, strict=True):
        for a, b in zip(case.batch.params, other.batch.params, strict=True):
            torch.testing.assert_close(b.cpu(), a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("master", [torch.int8, torch.float32, None])
def test_kernel_keeps_the_bits_that_16_bits_do_not_hold(master: torch.dtype | None, device: torch.device) -> None:
    case = trained(torch.bfloat16)
    case = case if master is None else with_masters(case, master)
    for param in case.batch.params:
        param.view(-1)[::5] = 1.0  # from outside
    expected, got = case.to(CPU), case.to(device)
    seeds = [7] if master is None else None
    step_reference([expected.job(ADAMW, seeds=seeds)])
    launch_step([got.job(ADAMW, seeds=seeds)])
    for i, (a, b) in enumerate(zip(expected.batch.params, got.batch.params, strict=True)):
        kept = [
            weight(param.cpu(), state) for param, state in ((a, expected.batch.states[i]), (b, got.batch.states[i]))
        ]
        # 24 bits have a unit of 2^-15 at most, stochastic rounding may fall on the other side of a drawn number
        right = (kept[0] - kept[1]).abs() <= 2.0**-14 * kept[0].abs() + 1e-6
        assert (~right).float().sum() <= (0 if master is not None else 1 + a.numel() * 2.0**-10)


def test_a_corrected_weight_is_the_nearest_of_24_bits(device: torch.device) -> None:
    kept = []
    for master in (torch.int8, torch.float32):
        torch.manual_seed(2)
        case = with_masters(trained(torch.bfloat16, shapes=FEW), master).to(device)
        launch_step([case.job(ADAMW)])
        kept.append([weight(p.cpu(), state) for p, state in zip(case.batch.params, case.batch.states, strict=True)])
    for corrected, exact in zip(*kept, strict=True):
        assert ((corrected - exact).abs() <= 2.0**-16 * exact.abs()).all()


@pytest.mark.parametrize("name", ["stable adamw", "lamb", "lars"])
def test_sums_of_a_tensor_cover_all_its_tiles(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_batch, "MOST_SUMS", 2)
    rule = RULES[name]
    assert_steps_agree(trained(torch.float32, rule=rule, shapes=[(9, 512), (5, 513), (2049,)]), rule, device)


@pytest.mark.parametrize("name", ["stable adamw", "lamb", "lars"])
@pytest.mark.parametrize("nothing", ["weight", "gradient"])
def test_a_tensor_without_a_norm_moves_as_in_the_reference(name: str, nothing: str, device: torch.device) -> None:
    """Trust is 1 then, not 0 / 0; with no decay both norms of the ratio can be zero."""
    rule: Any = replace(RULES[name], weight_decay=0.0)  # type: ignore[call-arg]
    param, grad = torch.randn(3, 300), torch.randn(3, 300)
    (param if nothing == "weight" else grad).zero_()
    case = Case(Batch([param], [new_state(param, "dynamic", rule.signs)], torch.float32), [grad])
    assert_steps_agree(case, rule, device)


def test_weights_without_a_direction_stay_as_they_are(device: torch.device) -> None:
    param, direction = torch.randn(3, 300), torch.randn(3, 300)
    direction[1, 7], direction[2, 299] = math.nan, math.inf
    for skips in (True, False):
        rule = MuonWeight(lr=1e-2, weight_decay=0.1, ratio=3.0, skips=skips)
        case = Case(Batch([param], [new_state(param, "dynamic", rule.signs)], torch.float32), [direction]).to(device)
        launch_step([case.job(rule)])
        moved = param * (1 - 1e-3) - 0.03 * direction
        expected = torch.where(direction.isnan(), param, moved) if skips else moved
        torch.testing.assert_close(case.batch.params[0].cpu(), expected, equal_nan=True)


@pytest.mark.parametrize(("name", "maximize"), [("adamw", True), ("adamw", False), ("lamb", True)])
def test_groups_of_one_batch_have_their_own_numbers(name: str, maximize: bool, device: torch.device) -> None:
    case = trained(torch.float32, shapes=FEW)
    groups = [i % 2 for i in range(len(FEW))]
    base: Any = RULES[name]
    rules = [
        replace(base, lr=0.5, weight_decay=0.3, maximize=maximize),
        replace(base, betas=(0.5, 0.7), maximize=True),
    ]
    together, alone = case.to(device), [case.to(device), case.to(device)]
    batch = Batch(together.batch.params, together.batch.states, torch.float32, groups)
    launch_step([Job(batch, together.grads, rules)])
    for one, rule in zip(alone, rules, strict=True):
        launch_step([one.job(rule)])
    # A group that minimises beside one that maximises has its gradient multiplied by 1, and the compiler fuses that
    # product with the next sum where alone there is none: the last bit.
    within = {"rtol": 0.0, "atol": 0.0} if maximize else {"rtol": 1e-6, "atol": 1e-7}
    for i, group in enumerate(groups):
        torch.testing.assert_close(batch.params[i], alone[group].batch.params[i], **within)


def test_a_learning_rate_in_memory_is_read_there(device: torch.device) -> None:
    case = trained(torch.float32, shapes=FEW)
    number, tensor = case.to(device), case.to(device)
    launch_step([number.job(replace(ADAMW, lr=0.25))])
    launch_step([tensor.job(replace(ADAMW, lr=torch.tensor(0.25, device=device)))])
    for a, b in zip(number.batch.params, tensor.batch.params, strict=True):
        assert torch.equal(a, b)


def test_tensors_that_are_not_contiguous_are_updated_in_place(device: torch.device) -> None:
    def make(place: torch.device) -> Case:
        torch.manual_seed(1)
        param, grad = torch.randn(40, 30, device=CPU).to(place).t(), torch.randn(30, 80).to(place)[:, ::2]
        return Case(Batch([param], [new_state(param, "dynamic", (True, False))], torch.float32), [grad])

    expected, got = make(CPU), make(device)
    step_reference([expected.job(ADAMW)])
    launch_step([got.job(ADAMW)])
    assert got.batch.params[0].stride() == (1, 30)
    torch.testing.assert_close(got.batch.params[0].cpu(), expected.batch.params[0], rtol=1e-6, atol=1e-7)


def test_new_gradients_are_found_at_their_new_addresses(device: torch.device) -> None:
    case = trained(torch.float32, shapes=FEW)
    kept, fresh = case.to(device), case.to(device)
    for step in range(3):
        grads: list[Tensor | None] = [torch.full_like(param, step + 1) for param in kept.batch.params]
        launch_step([Job(kept.batch, grads, [ADAMW])])
        launch_step([Job(Batch(fresh.batch.params, fresh.batch.states, torch.float32), grads, [ADAMW])])
    for a, b in zip(kept.batch.params, fresh.batch.params, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, ("dynamic", "e4m3")[i % 2]) for i, name in enumerate(RULES) if "direction" not in name],
)
def test_gradients_of_zero_move_nothing_but_by_decay(name: str, kind: str, device: torch.device) -> None:
    rule = replace(RULES[name], weight_decay=0.0)  # type: ignore[call-arg]
    start = torch.randn(3, 300)
    state = new_state(start, kind, rule.signs, rule.initial)
    before = copy.deepcopy(state)
    param = start.clone().to(device)
    placed = {key: value.to(device) for key, value in state.items()}
    launch_step([Job(Batch([param], [placed], torch.float32), [torch.zeros_like(param)], [rule])])
    assert torch.equal(param.cpu(), start)
    assert all(torch.equal(placed[key].cpu().float(), before[key].float()) for key in before if key != "step")


def test_an_update_moves_the_version_of_the_parameters_that_have_a_gradient(device: torch.device) -> None:
    case = trained(torch.float32, shapes=FEW).to(device)
    case.grads[0] = None
    versions = [param._version for param in case.batch.params]
    optimizer_step([case.job(ADAMW)])
    assert [param._version > version for param, version in zip(case.batch.params, versions, strict=True)] == [
        i > 0 for i in range(len(FEW))
    ]


def test_tensors_of_one_layout_share_a_launch() -> None:
    data = trained(torch.bfloat16).batch.launch_data()
    assert {layout: len(work) for layout, work in data.work.items()} == {
        Layout("dynamic", flat=True): 3 + 1,  # 18 and 3 blocks, 8 in a program
        Layout("dynamic", flat=False): 3 + 2 + 3 + 1 + 1,  # 12, 6, 9, 4 and 1 blocks, 4 in a program
        Layout("float32", flat=True): 1,
        Layout("float32", flat=False): 3 + 1 + 1,
    }
    data = trained(torch.float32).batch.launch_data()
    assert len(data.work[Layout("dynamic", flat=True, wide=True)]) == 5 + 1  # 18 and 3 blocks, 4 in a program


def test_work_lists_cover_every_block_once() -> None:
    assert work_list([3, 0, 8, 9], 4).tolist() == [[0, 0, 3], [2, 0, 4], [2, 4, 8], [3, 0, 4], [3, 4, 8], [3, 8, 9]]
    assert work_list([5, 2], [4, 1]).tolist() == [[0, 0, 4], [0, 4, 5], [1, 0, 1], [1, 1, 2]]


@pytest.mark.gpu
def test_a_captured_step_reads_a_changed_learning_rate_and_new_gradients() -> None:
    device = torch.device("cuda")
    case = trained(torch.bfloat16)
    case, other = case.to(device), case.to(device)
    lr = torch.tensor(1e-2, device=device)
    rule = replace(ADAMW, lr=lr)
    fixed = [grad.clone() for grad in case.grads if grad is not None]
    optimizer_step([Job(case.batch, fixed, [rule], CLIPPED)])
    optimizer_step([Job(other.batch, fixed, [rule], CLIPPED)])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer_step([Job(case.batch, fixed, [rule], CLIPPED)])
    for step in range(3):
        lr.fill_(0.1 * (step + 1))
        for grad in fixed:
            grad.normal_()
        graph.replay()
        # An eager step of another batch and new addresses in between must not disturb the graph.
        optimizer_step([Job(other.batch, [grad.clone() for grad in fixed], [rule], CLIPPED)])
    for a, b in zip(case.batch.params, other.batch.params, strict=True):
        assert torch.equal(a, b)
    for mine, theirs in zip(case.batch.states, other.batch.states, strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.gpu
def test_an_eager_step_between_replays_does_not_disturb_the_graph() -> None:
    device = torch.device("cuda")
    case = trained(torch.float32).to(device)
    fixed = [grad for grad in case.grads if grad is not None]
    optimizer_step([Job(case.batch, fixed, [ADAMW])])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer_step([Job(case.batch, fixed, [ADAMW])])
    graph.replay()
    elsewhere = [torch.full_like(grad, math.nan) for grad in fixed]
    optimizer_step([Job(case.batch, elsewhere, [ADAMW], CLIPPED)])  # skips everything, at other addresses
    del elsewhere
    graph.replay()
    assert all(state["step"] == 5 for i, state in enumerate(case.batch.states) if SHAPES[i] != (0,))
    assert all(param.isfinite().all() for param in case.batch.params)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capturing_before_the_first_step_says_what_to_do() -> None:
    case = trained(torch.float32).to(torch.device("cuda"))
    with (
        pytest.raises(RuntimeError, match="one step outside of CUDA graph capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer_step([case.job(ADAMW)])


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_device() -> None:
    case = trained(torch.bfloat16).to(torch.device("cuda"))
    optimizer_step([case.job(ADAMW, CLIPPED)])
    try:
        torch.cuda.set_sync_debug_mode("error")
        fresh = [None if grad is None else grad.clone() for grad in case.grads]
        optimizer_step([Job(case.batch, fresh, [ADAMW], CLIPPED)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
