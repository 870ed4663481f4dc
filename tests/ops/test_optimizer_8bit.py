"""The update kernel against the reference, one step from equal states, on tensors cut from poisoned memory."""

import copy
import math
from dataclasses import dataclass, replace

import pytest
import torch
from lq_kernels.codebooks import dynamic_map
from lq_kernels.multi_tensor import Batch, Layout, State, work_list
from lq_kernels.optimizer_8bit import Adam, adam_reference, adam_step, launch_adam
from lq_kernels.optimizer_state import load_moment, new_state, store_moment
from lq_kernels.percentile_clipping import new_history
from torch import Tensor

CPU = torch.device("cpu")
ADAMW = Adam(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, decoupled=True)

# Rows of whole blocks, ragged rows, one block over, several programs; the last ones keep float32 state.
SHAPES = [(9, 512), (5, 1000), (3, 257), (37, 3), (4, 3, 5, 7), (33, 256), (1, 1), (2048,), (2049,), (), (0,), (300,)]
EIGHT_BIT = 7
MARGIN = 64  # elements, a multiple of 16 bytes in every type


def poisoned(values: Tensor, margin: int) -> Tensor:
    """A contiguous view, equal to `values`, into memory of infinities (integers: 255)."""
    poison = math.inf if values.is_floating_point() else 255
    buffer = torch.full((values.numel() + 2 * margin,), poison, dtype=values.dtype, device=values.device)
    return buffer[margin : margin + values.numel()].view(values.shape).copy_(values)


def margins(view: Tensor) -> Tensor:
    whole = torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())
    start = view.storage_offset()
    return torch.cat([whole[:start], whole[start + view.numel() :]])


@dataclass
class Case:
    batch: Batch
    grads: list[Tensor | None]

    def to(self, device: torch.device, margin: int = MARGIN) -> "Case":
        """The same values in poisoned memory of a device."""
        params = [poisoned(param.to(device), margin) for param in self.batch.params]
        states = [
            {key: poisoned(value.to(device), margin) for key, value in state.items()} for state in self.batch.states
        ]
        grads = [None if grad is None else poisoned(grad.to(device), margin) for grad in self.grads]
        return Case(Batch(params, states, self.batch.grad_type), grads)


def heavy_tailed(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * torch.exp(2 * torch.randn(shape))


def trained(dtype: torch.dtype, grad_type: torch.dtype | None = None, adam: Adam = ADAMW) -> Case:
    """Parameters after two steps of the reference, and the gradients of the next."""
    params = [torch.randn(shape).to(dtype) for shape in SHAPES]
    states = [new_state(param, i < EIGHT_BIT) | new_history(CPU) for i, param in enumerate(params)]
    batch = Batch(params, states, grad_type or dtype)
    for _ in range(2):
        adam_reference(batch, [heavy_tailed(shape).to(batch.grad_type) for shape in SHAPES], adam)
    return Case(batch, [heavy_tailed(shape).to(batch.grad_type) for shape in SHAPES])


def bound_of_update(before: Tensor, after: Tensor, grad: Tensor, state: State, step: float, adam: Adam) -> Tensor:
    """What the kernel's parameter may differ from `after` by, in float64.

    The update is m / denominator. m is a sum of two rounded terms, so its roundings are relative to their magnitudes;
    L2's g = grad + wd p likewise, and a relative error of g is one of v. With the approximate roots 2^-19 of all that,
    with a clipping factor from norms added in another order 2^-18; and one unit of the parameter's type.
    """
    beta1, beta2 = adam.betas
    decay = 0 if adam.decoupled else adam.weight_decay * before.double()
    g = grad.double() + decay
    magnitude = grad.double().abs() + torch.as_tensor(decay).abs()
    terms = beta1 * load_moment(state, "1").double().abs() + (1 - beta1) * magnitude
    # A clipped gradient is smaller than `grad`, and v with it.
    v = beta2 * load_moment(state, "2").double() + (0 if adam.percentile else (1 - beta2) * g**2)
    update = float(adam.lr) / (1 - beta1**step) * terms / ((v / (1 - beta2**step)).sqrt() + adam.eps)
    unit = torch.finfo(before.dtype).eps * torch.maximum(before.double().abs(), after.double().abs())
    return (2.0**-18 if adam.percentile else 2.0**-19) * update * (magnitude / g.abs()).nan_to_num(1) + unit + 1e-12


def readable(codes: Tensor, scale: Tensor) -> Tensor:
    """Which codes stand for a value: under a scale that is NaN or infinite none does, and backends differ in them."""
    columns = codes.numel() // codes.shape[0]
    blocks = scale.isfinite().repeat_interleave(256, dim=1)[:, :columns]
    return blocks.reshape(codes.shape)


def assert_steps_agree(case: Case, adam: Adam, device: torch.device, margin: int = MARGIN) -> None:
    start = case
    expected, got = case.to(CPU), case.to(device, margin)
    edges = [margins(tensor).clone() for tensor in every_tensor(got)]
    adam_reference(expected.batch, expected.grads, adam)
    launch_adam(got.batch, got.grads, adam)
    off, codes = 0, 0
    for i, (ours, theirs) in enumerate(zip(got.batch.params, expected.batch.params, strict=True)):
        before, grad, state = start.batch.params[i], start.grads[i], start.batch.states[i]
        new, old = got.batch.states[i], expected.batch.states[i]
        difference = (ours.cpu().double() - theirs.double()).abs()
        assert torch.equal(ours.cpu().isnan(), theirs.isnan())
        if grad is None or (adam.percentile and not grad.isfinite().all()):
            assert torch.equal(ours.cpu(), before)
        else:
            bound = bound_of_update(before, theirs, grad, state, float(old["step"]), adam)
            assert not (difference > bound).any()
        for key in old:
            if key.startswith("codes"):
                distance = (new[key].cpu().int() - old[key].int()).abs()
                distance = distance * readable(old[key], old[key.replace("codes", "scale")])
                assert distance.max() <= 1, (key, SHAPES[i])
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
        assert torch.equal(margins(tensor), edge)


def every_tensor(case: Case) -> list[Tensor]:
    states = [value for state in case.batch.states for value in state.values()]
    return [*case.batch.params, *(grad for grad in case.grads if grad is not None), *states]


@pytest.mark.parametrize("decoupled", [True, False])
def test_kernel_steps_as_the_reference(decoupled: bool, device: torch.device) -> None:
    assert_steps_agree(trained(torch.float32), replace(ADAMW, decoupled=decoupled), device)


@pytest.mark.parametrize("margin", [1, 3])
def test_kernel_takes_addresses_that_are_not_aligned(margin: int, device: torch.device) -> None:
    assert_steps_agree(trained(torch.float32), ADAMW, device, margin)


@pytest.mark.parametrize(("margin", "aligned"), [(MARGIN, True), (1, False), (8, False)])
def test_wide_loads_are_promised_only_where_every_address_allows_them(
    margin: int, aligned: bool, device: torch.device
) -> None:
    case = trained(torch.float32).to(device, margin)
    table = case.batch.launch_data().table
    table.refresh(case.batch.params, case.grads)
    assert table.aligned == aligned


@pytest.mark.parametrize(
    ("dtype", "grad_type"),
    [(torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)],
)
def test_kernel_takes_all_types(dtype: torch.dtype, grad_type: torch.dtype, device: torch.device) -> None:
    assert_steps_agree(trained(dtype, grad_type), ADAMW, device)


@pytest.mark.parametrize("percentile", [None, 5])
def test_kernel_takes_gradients_that_are_absent_zero_or_not_finite(
    percentile: int | None, device: torch.device
) -> None:
    adam = replace(ADAMW, percentile=percentile, maximize=True)
    case = trained(torch.float32, adam=adam)
    case.grads[0] = case.grads[7] = None
    for i, poison in ((1, math.nan), (8, math.inf)):
        grad = case.grads[i]
        assert grad is not None
        grad.view(-1)[-1] = poison
    case.grads[2] = torch.zeros(SHAPES[2])
    assert_steps_agree(case, adam, device)


def test_a_skipped_tensor_keeps_its_bits(device: torch.device) -> None:
    case = trained(torch.float32).to(device)
    before = copy.deepcopy((case.batch.params, case.batch.states))
    for grad in case.grads:
        assert grad is not None
        grad.view(-1)[-1:] = math.nan
    launch_adam(case.batch, case.grads, replace(ADAMW, percentile=5))
    for old, new in zip(before[0], case.batch.params, strict=True):
        assert torch.equal(old, new)
    for i, (old_state, state) in enumerate(zip(before[1], case.batch.states, strict=True)):
        skipped = int(SHAPES[i] != (0,))
        assert (
            state.pop("gnorm_counts").tolist()
            == (old_state.pop("gnorm_counts") + skipped * torch.tensor([0, 0, 1], device=device)).tolist()
        )
        assert state.pop("step") == old_state.pop("step") + (1 - skipped)
        assert all(torch.equal(old_state[key], state[key]) for key in state)


def test_a_learning_rate_in_memory_is_read_there(device: torch.device) -> None:
    case = trained(torch.float32)
    number, tensor = case.to(device), case.to(device)
    launch_adam(number.batch, number.grads, replace(ADAMW, lr=0.25))
    launch_adam(tensor.batch, tensor.grads, replace(ADAMW, lr=torch.tensor(0.25, device=device)))
    for a, b in zip(number.batch.params, tensor.batch.params, strict=True):
        assert torch.equal(a, b)


def test_tensors_that_are_not_contiguous_are_updated_in_place(device: torch.device) -> None:
    def make(place: torch.device) -> Case:
        torch.manual_seed(1)
        param, grad = torch.randn(40, 30, device=CPU).to(place).t(), torch.randn(30, 80).to(place)[:, ::2]
        return Case(Batch([param], [new_state(param, True)], torch.float32), [grad])

    expected, got = make(CPU), make(device)
    adam_reference(expected.batch, expected.grads, ADAMW)
    launch_adam(got.batch, got.grads, ADAMW)
    assert got.batch.params[0].stride() == (1, 30)
    torch.testing.assert_close(got.batch.params[0].cpu(), expected.batch.params[0], rtol=1e-6, atol=1e-7)


def test_new_gradients_are_found_at_their_new_addresses(device: torch.device) -> None:
    case = trained(torch.float32)
    kept, fresh = case.to(device), case.to(device)
    for step in range(3):
        grads: list[Tensor | None] = [torch.full_like(param, step + 1) for param in kept.batch.params]
        launch_adam(kept.batch, grads, ADAMW)
        launch_adam(Batch(fresh.batch.params, fresh.batch.states, torch.float32), grads, ADAMW)
    for a, b in zip(kept.batch.params, fresh.batch.params, strict=True):
        assert torch.equal(a, b)


def test_fresh_state_is_the_code_of_zero_with_scale_zero() -> None:
    state = new_state(torch.zeros(3, 5, 100), True)
    assert (state["codes1"] == 127).all()
    assert (state["codes2"] == 0).all()
    assert state["codes1"].shape == (3, 5, 100)
    assert state["scale1"].shape == state["scale2"].shape == (3, 2)
    assert torch.cat([state["scale1"], state["scale2"]]).eq(0).all()
    assert load_moment(state, "1").eq(0).all()


def test_storing_a_loaded_moment_changes_nothing() -> None:
    state = new_state(torch.zeros(3, 700), True)
    store_moment(state, "1", torch.randn(3, 700))
    store_moment(state, "2", torch.rand(3, 700))
    before = copy.deepcopy(state)
    for i in ("1", "2"):
        store_moment(state, i, load_moment(state, i))
    assert all(torch.equal(before[key], state[key]) for key in state)


def test_an_update_moves_the_version_of_the_parameters_that_have_a_gradient(device: torch.device) -> None:
    case = trained(torch.float32).to(device)
    case.grads[0] = None
    versions = [param._version for param in case.batch.params]
    adam_step(case.batch, case.grads, ADAMW)
    assert [param._version > version for param, version in zip(case.batch.params, versions, strict=True)] == [
        i > 0 for i in range(len(SHAPES))
    ]


def test_tensors_of_one_layout_share_a_launch() -> None:
    data = trained(torch.float32).batch.launch_data()
    assert {layout: len(work) for layout, work in data.work.items()} == {
        Layout(eight_bit=True, flat=True): 3 + 5,  # 18 and 33 blocks, 8 in a program
        Layout(eight_bit=True, flat=False): 5 + 2 + 10 + 1 + 1,  # 20, 6, 37, 4 and 1 blocks, 4 in a program
        Layout(eight_bit=False, flat=True): 1,
        Layout(eight_bit=False, flat=False): 3 + 1 + 1,
    }


def test_work_lists_cover_every_block_once() -> None:
    assert work_list([3, 0, 8, 9], 4).tolist() == [[0, 0], [2, 0], [2, 4], [3, 0], [3, 4], [3, 8]]


def test_decoding_reads_the_maps_of_the_format() -> None:
    param = torch.zeros(1, 256)
    state = new_state(param, True)
    for i, name in (("1", "dynamic_symmetric"), ("2", "dynamic_unsigned")):
        state[f"codes{i}"].copy_(torch.arange(256))
        state[f"scale{i}"].fill_(2.0)
        assert torch.equal(load_moment(state, i)[0], 2 * dynamic_map(name))


@pytest.mark.gpu
def test_a_captured_step_reads_a_changed_learning_rate_and_new_gradients() -> None:
    device = torch.device("cuda")
    case = trained(torch.bfloat16)
    case, other = case.to(device), case.to(device)
    lr = torch.tensor(1e-2, device=device)
    adam = replace(ADAMW, lr=lr, percentile=5)
    fixed = [grad.clone() for grad in case.grads if grad is not None]
    adam_step(case.batch, fixed, adam)
    adam_step(other.batch, fixed, adam)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adam_step(case.batch, fixed, adam)
    for step in range(3):
        lr.fill_(0.1 * (step + 1))
        for grad in fixed:
            grad.normal_()
        graph.replay()
        # An eager step of another batch and new addresses in between must not disturb the graph.
        adam_step(other.batch, [grad.clone() for grad in fixed], adam)
    for a, b in zip(case.batch.params, other.batch.params, strict=True):
        assert torch.equal(a, b)
    for mine, theirs in zip(case.batch.states, other.batch.states, strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.gpu
def test_an_eager_step_between_replays_does_not_disturb_the_graph() -> None:
    device = torch.device("cuda")
    case = trained(torch.float32).to(device)
    fixed = [grad for grad in case.grads if grad is not None]
    adam_step(case.batch, fixed, ADAMW)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adam_step(case.batch, fixed, ADAMW)
    graph.replay()
    elsewhere = [torch.full_like(grad, math.nan) for grad in fixed]
    adam_step(case.batch, elsewhere, replace(ADAMW, percentile=5))  # skips everything, at other addresses
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
        adam_step(case.batch, case.grads, ADAMW)


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_device() -> None:
    case = trained(torch.bfloat16).to(torch.device("cuda"))
    adam = replace(ADAMW, percentile=5)
    adam_step(case.batch, case.grads, adam)
    try:
        with pytest.warns(UserWarning, match="prototype"):
            torch.cuda.set_sync_debug_mode("error")
        adam_step(case.batch, [None if grad is None else grad.clone() for grad in case.grads], adam)
    finally:
        torch.cuda.set_sync_debug_mode("default")
