"""How moments are kept in 8 bits: what is zero, what is the smallest, and that nothing changes on the way."""

import copy

import pytest
import torch
from lq_kernels._triton import tl, triton
from lq_kernels.adaptive_rules import Adagrad
from lq_kernels.blockwise import SMALLEST_SCALE
from lq_kernels.codebooks import dynamic_map
from lq_kernels.e4m3 import LARGEST, decode_e4m3, encode_e4m3
from lq_kernels.momentum_rules import SGD
from lq_kernels.optimizer_batch import Batch
from lq_kernels.optimizer_rules import Rule
from lq_kernels.optimizer_state import load_moment, new_state, store_moment
from lq_kernels.optimizer_step import Job, launch_step, step_reference
from optimizer_cases import ADAMW, CPU


def test_fresh_state_is_the_code_of_zero_with_scale_zero() -> None:
    state = new_state(torch.zeros(3, 5, 100), "dynamic", (True, False))
    assert (state["codes1"] == 127).all()
    assert (state["codes2"] == 0).all()
    assert state["codes1"].shape == (3, 5, 100)
    assert state["scale1"].shape == state["scale2"].shape == (3, 2)
    assert torch.cat([state["scale1"], state["scale2"]]).eq(0).all()
    assert load_moment(state, 1, True).eq(0).all()


@pytest.mark.parametrize("kind", ["dynamic", "e4m3"])
def test_storing_a_loaded_moment_changes_nothing(kind: str) -> None:
    state = new_state(torch.zeros(3, 700), kind, (True, False))
    store_moment(state, 1, torch.randn(3, 700), True)
    store_moment(state, 2, torch.rand(3, 700) ** 9, False)
    before = copy.deepcopy(state)
    for i in (1, 2):
        store_moment(state, i, load_moment(state, i, i == 1), i == 1)
    assert all(torch.equal(before[key].float(), state[key].float()) for key in state)


@pytest.mark.parametrize("kind", ["dynamic", "e4m3"])
def test_only_zero_is_kept_as_zero_among_second_moments(kind: str, device: torch.device) -> None:
    """sqrt(v) = 0 beside a momentum that is not 0 would make a step of m / eps."""
    grad = torch.cat([torch.ones(1), torch.logspace(-1, -15, 200), torch.zeros(311)]).view(2, 256)
    grad[1, 0] = 1.0
    for take_step, place in ((step_reference, CPU), (launch_step, device)):
        param = torch.zeros(2, 256, device=place)
        state = new_state(param, kind, (True, False))
        for _ in range(3):
            take_step([Job(Batch([param], [state], torch.float32), [grad.to(place)], [ADAMW])])
        codes = state["codes2"].view(torch.uint8).cpu()
        assert torch.equal(codes == 0, grad == 0)
        assert torch.equal(param.cpu() == 0, grad == 0)
        assert param.abs().max() < 4 * ADAMW.lr


@pytest.mark.parametrize("kind", ["dynamic", "e4m3"])
@pytest.mark.parametrize("rule", [SGD(lr=1.0, momentum=0.5), Adagrad(lr=1.0, eps=1.0)], ids=["signed", "unsigned"])
def test_a_block_has_no_scale_below_the_smallest_normal_number(rule: Rule, kind: str, device: torch.device) -> None:
    """The first moment of these rules is the gradient, or its square, to the bit."""
    amax = torch.tensor([1.0, 0.75, 0.5, LARGEST, LARGEST * (1 - 2.0**-20), 4 * LARGEST, 0.0]) * SMALLEST_SCALE
    grad = torch.linspace(-1, 1, 512) * (amax if rule.signs == (True,) else amax.sqrt())[:, None]
    states = []
    for take_step, place in ((step_reference, CPU), (launch_step, device)):
        param = torch.zeros(grad.shape, device=place)
        states.append(new_state(param, kind, rule.signs))
        take_step([Job(Batch([param], [states[-1]], torch.float32), [grad.to(place)], [rule])])
    expected, got = states
    assert torch.equal(got["scale1"].cpu(), expected["scale1"])
    smallest = SMALLEST_SCALE * LARGEST if kind == "e4m3" and rule.signs == (True,) else SMALLEST_SCALE
    assert torch.equal(got["scale1"].cpu() > 0, (amax >= smallest)[:, None].expand(-1, 2))
    off = got["codes1"].cpu().view(torch.uint8).int() - expected["codes1"].view(torch.uint8).int()
    assert off.abs().max() <= 1
    assert off.abs().sum() <= 2  # at midpoints


def test_decoding_reads_the_maps_of_the_format() -> None:
    param = torch.zeros(1, 256)
    state = new_state(param, "dynamic", (True, False))
    for i, name in ((1, "dynamic_symmetric"), (2, "dynamic_unsigned")):
        state[f"codes{i}"].copy_(torch.arange(256))
        state[f"scale{i}"].fill_(2.0)
        assert torch.equal(load_moment(state, i, i == 1)[0], 2 * dynamic_map(name))


@triton.jit
def _count_differing_codes_kernel(counts_ptr, first, SIGNED: tl.constexpr):
    """Of 1024 neighbouring float32, by their bits, those whose code or its value PTX makes another."""
    bits = (first + tl.program_id(0) * 1024 + tl.arange(0, 1024)).to(tl.int32)
    x = bits.to(tl.float32, bitcast=True)
    x = tl.where(tl.abs(x) <= 256.0, x, 0.0)
    x = x if SIGNED else x * x
    converted, computed = encode_e4m3(x, 1.0, SIGNED, 90), encode_e4m3(x, 1.0, SIGNED, 80)
    differ = (converted != computed) | (decode_e4m3(converted, SIGNED, 90) != decode_e4m3(converted, SIGNED, 0))
    tl.atomic_add(counts_ptr, tl.sum(differ.to(tl.int32)))


@pytest.mark.gpu
@pytest.mark.parametrize("signed", [True, False])
def test_conversions_to_e4m3_give_the_codes_of_the_integer_arithmetic(signed: bool) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the conversions exist from compute capability 8.9 on")
    differing = torch.zeros(1, dtype=torch.int32, device="cuda")
    for sign in (0, 1) if signed else (0,):
        # All float32 up to 256, whose exponent field is 135.
        _count_differing_codes_kernel[((135 << 23) // 1024 + 1,)](differing, -(sign << 31), SIGNED=signed)
    assert differing.item() == 0
