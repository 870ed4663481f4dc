"""The nearest value of a code book; kernels against references is in test_parity.py."""

from typing import Any

import pytest
import torch
from hostile import FLOATS
from lq_kernels._triton import tl, triton
from lq_kernels.codebooks import create_fp8_map, dynamic_map, midpoints
from lq_kernels.nearest import (
    NearestTable,
    dequantize_values,
    dequantize_values_out,
    load_nearest,
    quantize_values,
    quantize_values_out,
)
from samples_blockwise import around_midpoints, maps
from torch import Tensor

DYNAMIC = ["dynamic", "dynamic_symmetric", "dynamic_unsigned"]
ONE_COMPARISON = [*DYNAMIC, "e4m3, two zeros", "linear, a midpoint at zero", "each value twice", "large"]
SIGNED = dynamic_map("dynamic_symmetric")


@pytest.fixture
def code(request: pytest.FixtureRequest) -> Tensor:
    return maps()[request.param]


def around_every_bucket() -> Tensor:
    """The ends of all values with the same upper 16 bits, and values inside."""
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    lower = torch.tensor([0, 0xFFFF, 0x5A5A], dtype=torch.int32)
    values = (upper[:, None] | lower).view(torch.float32)
    return values[~values.isnan()]


@pytest.mark.parametrize("name", ["dynamic", "dynamic_symmetric"])
def test_nearest_codes_have_the_published_values(name: str) -> None:
    values = [0, 1e-9, 1e-7, -1e-7, 3e-6, 5e-6, 1e-5, 1.2e-5, 2e-5, 3e-5, 1, -0.0, 2e-6, 1e-6, 4e-5]
    codes = [127, 127, 127, 127, 129, 129, 130, 130, 131, 131, 255, 127, 129, 128, 132]
    assert quantize_values(torch.tensor(values), dynamic_map(name)).tolist() == codes


@pytest.mark.parametrize("code", list(maps()), indirect=True)
def test_a_code_is_the_number_of_midpoints_below(code: Tensor) -> None:
    values = torch.cat([around_every_bucket(), around_midpoints(code), torch.randn(10000)])
    expected = torch.searchsorted(midpoints(code), values)
    assert torch.equal(quantize_values(values, code).long(), expected)


@pytest.mark.parametrize("name", DYNAMIC)
def test_every_value_of_a_map_has_its_own_code_and_ties_go_down(name: str) -> None:
    code = dynamic_map(name)
    assert NearestTable.of(code).comparisons == 1
    assert quantize_values(code, code).tolist() == list(range(256))
    assert quantize_values(midpoints(code), code).tolist() == list(range(255))


def test_infinities_get_the_ends_and_nan_the_code_of_zero() -> None:
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan])
    assert quantize_values(values, SIGNED).tolist() == [255, 0, 127, 127]
    assert quantize_values(values.half(), dynamic_map("dynamic_unsigned")).tolist() == [255, 0, 0, 0]


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_come_back_as_the_nearest_of_the_map(dtype: torch.dtype) -> None:
    x = torch.rand(37, 41).mul(2).sub(1).to(dtype)
    back = dequantize_values(quantize_values(x, SIGNED), SIGNED, dtype)
    assert back.dtype == dtype
    nearest = (x.float()[..., None] - SIGNED).abs().argmin(dim=-1)
    assert torch.equal(back, SIGNED[nearest].to(dtype))


def test_results_go_where_they_are_asked_to_and_nowhere_else(device: torch.device) -> None:
    """20000 values end in the middle of a tile."""
    x, around = torch.randn(20000, device=device), slice(100, 20100)
    codes = torch.full((20200,), 77, dtype=torch.uint8, device=device)
    back = torch.full((20200,), -9.0, device=device)
    code = SIGNED.to(device)
    quantize: Any = quantize_values_out.launcher
    dequantize: Any = dequantize_values_out.launcher
    quantize(x, code, codes[around])
    dequantize(codes[around], code, back[around])
    assert torch.equal(codes[around], quantize_values(x, code))
    assert torch.equal(back[around], code[codes[around].int()])
    for beside in (codes[:100], codes[20100:]):
        assert (beside == 77).all()
    for beside in (back[:100], back[20100:]):
        assert (beside == -9).all()


@triton.jit
def _one_each_kernel(code_ptr, one_each_ptr):
    tl.store(one_each_ptr, load_nearest(code_ptr)[3].to(tl.int32))


@pytest.mark.parametrize("name", list(maps()))
def test_kernels_compare_once_in_the_maps_that_are_made_for_it(name: str, device: torch.device) -> None:
    one_each = torch.zeros(1, dtype=torch.int32, device=device)
    _one_each_kernel[(1,)](maps()[name].to(device), one_each)
    assert bool(one_each) == (name in ONE_COMPARISON)


def test_wrong_arguments_say_what_was_expected() -> None:
    x, codes = torch.zeros(3), torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"quantize_values takes float32, bfloat16 or float16, got torch.float64"):
        quantize_values(x.double(), SIGNED)
    with pytest.raises(TypeError, match=r"uint8 to .* got torch.int8 to torch.float32"):
        dequantize_values(codes.char(), SIGNED)
    with pytest.raises(TypeError, match=r"got torch.uint8 to torch.int32"):
        dequantize_values(codes, SIGNED, torch.int32)
    for code in (SIGNED[:16], SIGNED.half(), SIGNED.view(16, 16)):
        with pytest.raises(ValueError, match=r"\(256,\) float32, got"):
            quantize_values(x, code)
    with pytest.raises(ValueError, match="this one does not: sort it"):
        quantize_values(x, SIGNED.flip(0))
    with pytest.raises(ValueError, match="code book is on meta, the values are on cpu"):
        quantize_values(x, SIGNED.to("meta"))
    for out in (codes[:2], codes.char(), codes.to("meta"), torch.zeros(6, dtype=torch.uint8)[::2]):
        with pytest.raises(ValueError, match=r"codes must be .* got"):
            quantize_values_out(x, SIGNED, out)


def test_a_map_that_does_not_ascend_can_be_read() -> None:
    codes = torch.tensor([0, 3, 255], dtype=torch.uint8)
    assert torch.equal(dequantize_values(codes, create_fp8_map().flip(0)), create_fp8_map()[[255, 252, 0]])


@pytest.mark.gpu
def test_every_float32_gets_its_code() -> None:
    for name in ("dynamic_symmetric", "e4m3, two zeros"):
        code = maps()[name].cuda()
        for upper in range(-(1 << 15), 1 << 15, 1 << 9):
            bits = torch.arange(upper << 16, (upper + (1 << 9)) << 16, device="cuda").int()
            values = bits.view(torch.float32).nan_to_num(0, torch.inf, -torch.inf)
            expected = torch.searchsorted(midpoints(code), values, out_int32=True)
            assert torch.equal(quantize_values(values, code).int(), expected)
