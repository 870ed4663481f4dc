"""Blockwise quantisation: what it guarantees about values; kernel against reference is in test_parity.py."""

from typing import Any

import numpy as np
import pytest
import torch
from hostile import FLOATS
from hypothesis import given, settings
from hypothesis import strategies as st
from lq_kernels._triton import tl, triton
from lq_kernels.blockwise import (
    dequantize_blockwise,
    dequantize_blockwise_out,
    dequantize_rows,
    quantize_blockwise,
    quantize_blockwise_out,
    quantize_rows,
)
from lq_kernels.codebooks import create_fp8_map, create_linear_map, dynamic_map, midpoints, zero_code
from lq_kernels.dynamic_map import constants, encode_signed, encode_unsigned, line_pointers
from lq_kernels.nearest import NearestTable
from samples_blockwise import rounded_twice
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

SIGNED = dynamic_map("dynamic_symmetric")
UNSIGNED = dynamic_map("dynamic_unsigned")


def round_trip(x: Tensor, code: Tensor = SIGNED, block_size: int = 256) -> Tensor:
    return dequantize_blockwise(*quantize_blockwise(x, code, block_size), code, block_size, x.dtype)


def test_each_value_gets_the_nearest_value_of_the_code() -> None:
    x = torch.randn(5, 300)
    codes, scale = quantize_blockwise(x, SIGNED)
    scales = scale.repeat_interleave(256)[: x.numel()].view(x.shape).double()
    errors = (x.double()[..., None] - SIGNED.double() * scales[..., None]).abs()
    chosen = errors.gather(-1, codes.long()[..., None])[..., 0]
    torch.testing.assert_close(chosen, errors.amin(dim=-1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("block_size", [64, 256, 4096])
@pytest.mark.parametrize("dtype", FLOATS)
def test_errors_are_as_small_as_published(dtype: torch.dtype, block_size: int) -> None:
    for x, code, absolute, relative in (
        (torch.randn(512, 512), dynamic_map("dynamic"), 0.011, 0.018),
        (torch.rand(512, 512), dynamic_map("dynamic"), 0.0036, 0.015),
        (torch.rand(512, 512), UNSIGNED, 0.0023, 0.012),
    ):
        values = x.to(dtype)
        back = round_trip(values, code, block_size)
        assert back.dtype == dtype
        error = (back.double() - values.double()).abs()
        assert error.mean() < absolute
        assert (error / (values.double().abs() + 1e-8)).mean() < relative


def test_values_are_multiplied_by_the_reciprocal_of_the_scale() -> None:
    """Near midpoints it makes a difference: a quotient is rounded once, this twice."""
    x = rounded_twice()
    codes, scale = quantize_blockwise(x, SIGNED, 64)
    inverse = np.float32(1) / scale.numpy()
    v = torch.from_numpy(x.numpy() * inverse[:, None])
    assert torch.equal(codes.long(), torch.searchsorted(midpoints(SIGNED), v))
    assert (codes.long() != torch.searchsorted(midpoints(SIGNED), x / scale[:, None])).any()


def test_scales_whose_reciprocal_is_subnormal_are_as_good_as_others() -> None:
    x = torch.randn(16, 256)
    large = x / x.abs().amax() * 3.4e38
    assert quantize_blockwise(large, SIGNED)[1].max() > 2.0**127
    torch.testing.assert_close(round_trip(large), large * (round_trip(x) / x), rtol=1e-5, atol=0)


def test_the_symmetric_map_makes_quantising_again_the_identity() -> None:
    x = torch.randn(64, 300)
    codes, scale = quantize_blockwise(x, SIGNED)
    again = quantize_blockwise(dequantize_blockwise(codes, scale, SIGNED), SIGNED)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scale)


def test_without_minus_one_a_negative_extreme_loses_a_little() -> None:
    assert round_trip(torch.tensor([-1.0]), dynamic_map("dynamic")).item() == pytest.approx(-0.99296874)
    assert round_trip(torch.tensor([-1.0])).item() == -1


@pytest.mark.parametrize("name", ["dynamic", "dynamic_symmetric", "dynamic_unsigned"])
def test_zero_stays_zero_in_any_block(name: str) -> None:
    code = dynamic_map(name)
    x = torch.randn(4, 256).abs()
    x[:, ::3] = 0
    x[2] = 0
    codes, scale = quantize_blockwise(x, code)
    assert (codes[x == 0] == zero_code(name)).all()
    assert scale[2] == 0
    assert (dequantize_blockwise(codes, scale, code)[x == 0] == 0).all()


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(derandomize=True, deadline=None, database=None)
@given(
    values=st.lists(finite | st.sampled_from([0.0, -0.0]), min_size=1, max_size=70),
    code=st.sampled_from([SIGNED, UNSIGNED, dynamic_map("dynamic"), create_fp8_map(True, 4, 3), create_linear_map()]),
    block_size=st.integers(1, 80),
)
def test_zero_comes_back_as_zero_whatever_stands_beside_it(values: list[float], code: Tensor, block_size: int) -> None:
    x = torch.tensor(values)
    assert (round_trip(x, code, block_size)[x == 0] == 0).all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_shows_in_its_whole_block_and_no_other(poison: float) -> None:
    x = torch.randn(3, 256)
    x[1, 7] = poison
    codes, scale = quantize_blockwise(x, SIGNED)
    assert (codes[1] == 127).all()
    back = dequantize_blockwise(codes, scale, SIGNED)
    assert back[1].isnan().all()
    assert back[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("block_size", [1, 37, 64, 256, 4096, 5000])
def test_blocks_of_any_size_have_their_amax_as_scale(block_size: int, dtype: torch.dtype) -> None:
    x = torch.randn(113, 97).to(dtype)
    codes, scale = quantize_blockwise(x, SIGNED, block_size)
    assert scale.tolist() == [part.abs().max().item() for part in x.flatten().split(block_size)]
    back = dequantize_blockwise(codes, scale, SIGNED, block_size, dtype)
    parts = zip(codes.flatten().split(block_size), scale, strict=True)
    expected = torch.cat([SIGNED[part.int()] * of_part for part, of_part in parts])
    assert torch.equal(back.flatten(), expected.to(dtype))


def test_strides_do_not_matter() -> None:
    x = torch.randn(60, 90)[::2, ::3]
    for one, other in zip(quantize_blockwise(x, SIGNED), quantize_blockwise(x.contiguous(), SIGNED), strict=True):
        assert torch.equal(one, other)
    codes, scale = quantize_blockwise(x.t().contiguous(), SIGNED)
    assert torch.equal(dequantize_blockwise(codes.t().contiguous().t(), scale, SIGNED), round_trip(x.t()))


@pytest.mark.parametrize("block_size", [1, 100, 256, 5000])
def test_results_go_where_they_are_asked_to_and_nowhere_else(block_size: int, device: torch.device) -> None:
    """20200 values end in the middle of a tile."""
    code, x, around = SIGNED.to(device), torch.randn(200, 101, device=device), slice(100, -100)
    blocks = -(-x.numel() // block_size)
    codes = torch.full((x.numel() + 200,), 77, dtype=torch.uint8, device=device)
    scale = torch.full((blocks + 200,), -9.0, device=device)
    back = torch.full((x.numel() + 200,), -9.0, dtype=torch.bfloat16, device=device)
    into = codes[around].view(x.shape), scale[around]
    quantize: Any = quantize_blockwise_out.launcher
    dequantize: Any = dequantize_blockwise_out.launcher
    quantize(x, code, block_size, *into)
    dequantize(*into, code, block_size, back[around].view(x.shape))
    for got, expected in zip(into, quantize_blockwise(x, code, block_size), strict=True):
        assert torch.equal(got, expected)
    expected = dequantize_blockwise(*into, code, block_size, torch.bfloat16)
    assert torch.equal(back[around].view(x.shape), expected)
    for buffer, value in ((codes, 77), (scale, -9), (back, -9)):
        assert (buffer[:100] == value).all()
        assert (buffer[-100:] == value).all()


def test_writing_into_tensors_changes_their_version() -> None:
    codes, scale = quantize_blockwise(torch.randn(300), SIGNED)
    versions = codes._version, scale._version
    assert quantize_blockwise_out(torch.randn(300), SIGNED, 256, codes, scale) is None
    assert (codes._version, scale._version) > versions


def test_blocks_of_rows_do_not_cross_rows() -> None:
    x = torch.randn(3, 5, 100) * torch.tensor([1.0, 100.0, 1e-3])[:, None, None]
    codes, scale = quantize_rows(x, NearestTable.of(SIGNED))
    assert codes.shape == x.shape
    assert torch.equal(scale[:, 1], x.view(3, 500)[:, 256:].abs().amax(1))
    for row in range(3):
        flat_codes, flat_scale = quantize_blockwise(x[row], SIGNED)
        assert torch.equal(codes[row], flat_codes)
        assert torch.equal(scale[row], flat_scale)
        back = dequantize_blockwise(flat_codes, flat_scale, SIGNED)
        assert torch.equal(dequantize_rows(codes, scale, SIGNED)[row], back)


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_wrong_arguments_say_what_was_expected(mode: str) -> None:
    with FakeTensorMode() if mode == "fake" else torch.no_grad():
        x, code = torch.zeros(1000), torch.linspace(-1, 1, 256)
        codes, scale, half = torch.zeros(1000, dtype=torch.uint8), torch.zeros(4), torch.zeros(1000).half()
        with pytest.raises(TypeError, match=r"takes float32, bfloat16 or float16, got torch.float64"):
            quantize_blockwise(x.double(), code)
        with pytest.raises(ValueError, match=r"\(256,\) float32, got \(16,\)"):
            quantize_blockwise(x, code[:16])
        with pytest.raises(ValueError, match=r"\(256,\) float32, got \(256,\) torch.float16"):
            dequantize_blockwise(codes, scale, code.half())
        with pytest.raises(ValueError, match="block_size must be positive, got 0"):
            quantize_blockwise(x, code, 0)
        with pytest.raises(ValueError, match="block_size must be positive, got -1"):
            dequantize_blockwise(codes, scale, code, -1)
        with pytest.raises(TypeError, match=r"uint8 to float32, bfloat16 or float16, got torch.int8 to torch.float32"):
            dequantize_blockwise(codes.char(), scale, code)
        for wrong in (scale[:3], scale.double(), scale[:, None]):
            with pytest.raises(ValueError, match=r"blocks of 256 need a float32 scale of shape \(4,\)"):
                dequantize_blockwise(codes, wrong, code)
        for wrong in (codes[1:], codes.char(), codes.view(10, 100), codes[:1].expand(1000)):
            with pytest.raises(ValueError, match=r"codes must be .*\(1000,\), torch.uint8"):
                quantize_blockwise_out(x, code, 256, wrong, scale)
        with pytest.raises(ValueError, match=r"scale must be .*\(8,\), torch.float32"):
            quantize_blockwise_out(x, code, 128, codes, scale)
        with pytest.raises(ValueError, match=r"out must be .*\(1000,\), torch.float16"):
            dequantize_blockwise_out(codes, scale, code, 256, half[:999])
        with pytest.raises(TypeError, match=r"got torch.uint8 to torch.int32"):
            dequantize_blockwise_out(codes, scale, code, 256, x.int())


def test_a_map_that_does_not_ascend_is_an_error() -> None:
    with pytest.raises(ValueError, match="ascends, this one does not: sort it"):
        quantize_blockwise(torch.zeros(3), SIGNED.flip(0))


def test_nothing_has_no_blocks() -> None:
    codes, scale = quantize_blockwise(torch.empty(0, 5), SIGNED)
    assert codes.shape == (0, 5)
    assert scale.shape == (0,)
    assert dequantize_blockwise(codes, scale, SIGNED).shape == (0, 5)


@triton.jit
def _encode_kernel(v_ptr, codes_ptr, constants_ptr, SIGNED: tl.constexpr, SIZE: tl.constexpr):
    offset = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    bounds_ptr, lines_ptr = line_pointers(constants_ptr, SIGNED)
    v = tl.load(v_ptr + offset)
    if SIGNED:
        tl.store(codes_ptr + offset, encode_signed(v, bounds_ptr, lines_ptr))
    else:
        tl.store(codes_ptr + offset, encode_unsigned(v, bounds_ptr, lines_ptr))


def encode(v: Tensor, signed: bool, device: torch.device) -> Tensor:
    size = 1 << 12 if device.type == "cuda" else 1 << 17
    padded = torch.nn.functional.pad(v, (0, -len(v) % size)).to(device)
    codes = torch.empty_like(padded, dtype=torch.uint8)
    _encode_kernel[(len(padded) // size,)](padded, codes, constants(device), SIGNED=signed, SIZE=size)
    return codes[: len(v)].cpu()


@pytest.mark.parametrize("signed", [True, False])
def test_arithmetic_encoding_is_at_most_one_code_off_and_almost_never(signed: bool, device: torch.device) -> None:
    sign = torch.tensor([1.0, -1.0]) if signed else torch.tensor([1.0, 1.0])
    magnitudes = torch.cat([torch.rand(1 << 18), torch.logspace(-9, 0, 1 << 18), torch.randn(1 << 18).abs().div(4)])
    v = magnitudes.clamp(max=1) * sign[torch.arange(len(magnitudes)) % 2]
    nearest = NearestTable.of(SIGNED if signed else UNSIGNED).nearest(v)
    off = (encode(v, signed, device).int() - nearest.int()).abs()
    assert off.max() <= 1
    # A code is off where rounding moves v over a midpoint: 128 cells, each rounded to 2^-24 of the whole.
    assert off.float().mean() < 128 * 2.0**-23


@pytest.mark.parametrize("signed", [True, False])
def test_arithmetic_encoding_of_exact_values(signed: bool, device: torch.device) -> None:
    code = SIGNED if signed else UNSIGNED
    assert encode(code, signed, device).tolist() == list(range(256))
    largest = 1 + 2.0**-22  # by the rounding of 1 / scale
    hostile = torch.tensor([0.0, -0.0, 1e-30, 2.0**-23, largest, torch.inf])
    zero = zero_code("dynamic_symmetric") if signed else 0
    assert encode(hostile, signed, device)[:5].tolist() == [zero] * 4 + [255]
    if signed:
        assert encode(-hostile, signed, device)[:5].tolist() == [zero] * 4 + [0]


@pytest.mark.gpu
@pytest.mark.parametrize("signed", [True, False])
def test_arithmetic_encoding_of_every_float32(signed: bool) -> None:
    device = torch.device("cuda")
    values = torch.arange(0, 127 << 23, dtype=torch.int32).view(torch.float32)
    bounds = NearestTable.of(SIGNED if signed else UNSIGNED).bounds.to(device)
    wrong = 0
    for part in values.split(1 << 26):
        for v in (part, -part) if signed else (part,):
            off = (encode(v, signed, device).to(device).int() - torch.searchsorted(bounds[:-1], v.to(device))).abs()
            assert off.max() <= 1
            wrong += int(off.sum())
    assert wrong < len(values) * 128 * 2.0**-23


@pytest.mark.gpu
def test_values_beyond_the_two_billionth_are_quantised_like_the_others() -> None:
    code = SIGNED.cuda()
    x = torch.zeros((1 << 31) + 1000, dtype=torch.bfloat16, device="cuda")
    x[-1000:] = torch.randn(1000)
    codes, scale = quantize_blockwise(x, code)
    assert (codes[: 1 << 31] == 127).all()
    for got, expected in zip((codes[-1000:], scale[-4:]), quantize_blockwise(x[-1000:].cpu(), SIGNED), strict=True):
        assert torch.equal(got.cpu(), expected)
    back = dequantize_blockwise(codes, scale, code, 256, torch.bfloat16)
    assert torch.equal(back[-1000:].cpu(), round_trip(x[-1000:].cpu()))
