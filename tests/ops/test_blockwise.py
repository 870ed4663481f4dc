"""Blockwise quantisation: what it guarantees about values; kernel against reference is in test_parity.py."""

import pytest
import torch
from lq_kernels._triton import tl, triton
from lq_kernels.blockwise import dequantize_blockwise, dequantize_rows, quantize_blockwise, quantize_rows
from lq_kernels.codebooks import NearestTable, dynamic_map, zero_code
from lq_kernels.dynamic_map import constants, encode_signed, encode_unsigned, load_lines
from torch import Tensor

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


def test_errors_are_as_small_as_published() -> None:
    for x, code, absolute, relative in (
        (torch.randn(1 << 18), dynamic_map("dynamic"), 0.011, 0.018),
        (torch.rand(1 << 18), dynamic_map("dynamic"), 0.0036, 0.015),
        (torch.rand(1 << 18), UNSIGNED, 0.0023, 0.012),
    ):
        error = (round_trip(x, code) - x).abs()
        assert error.mean() < absolute
        assert (error / (x.abs() + 1e-8)).mean() < relative


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


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_shows_in_its_whole_block_and_no_other(poison: float) -> None:
    x = torch.randn(3, 256)
    x[1, 7] = poison
    back = round_trip(x)
    assert not back[1].isfinite().any()
    assert back[[0, 2]].isfinite().all()


def test_blocks_of_rows_do_not_cross_rows() -> None:
    x = torch.randn(3, 5, 100) * torch.tensor([1.0, 100.0, 1e-3])[:, None, None]
    codes, scale = quantize_rows(x, SIGNED)
    assert codes.shape == x.shape
    assert torch.equal(scale[:, 1], x.view(3, 500)[:, 256:].abs().amax(1))
    for row in range(3):
        flat_codes, flat_scale = quantize_blockwise(x[row], SIGNED)
        assert torch.equal(codes[row], flat_codes)
        assert torch.equal(scale[row], flat_scale)
        back = dequantize_blockwise(flat_codes, flat_scale, SIGNED)
        assert torch.equal(dequantize_rows(codes, scale, SIGNED)[row], back)


def test_wrong_arguments_say_what_was_expected() -> None:
    with pytest.raises(TypeError, match="float64"):
        quantize_blockwise(torch.zeros(3, dtype=torch.float64), SIGNED)
    with pytest.raises(ValueError, match=r"\(256,\) float32, got \(16,\)"):
        quantize_blockwise(torch.zeros(3), SIGNED[:16])
    with pytest.raises(ValueError, match="positive, got 0"):
        quantize_blockwise(torch.zeros(3), SIGNED, 0)
    codes, scale = quantize_blockwise(torch.randn(1000), SIGNED, 256)
    with pytest.raises(ValueError, match=r"blocks of 128 .* shape \(8,\)"):
        dequantize_blockwise(codes, scale, SIGNED, 128)


@triton.jit
def _encode_kernel(v_ptr, codes_ptr, constants_ptr, SIGNED: tl.constexpr, SIZE: tl.constexpr):
    offset = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    bounds, slopes, offsets = load_lines(constants_ptr, SIGNED)
    v = tl.load(v_ptr + offset)
    if SIGNED:
        tl.store(codes_ptr + offset, encode_signed(v, bounds, slopes, offsets))
    else:
        tl.store(codes_ptr + offset, encode_unsigned(v, bounds, slopes, offsets))


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
def test_dequantising_to_bfloat16_rounds_once() -> None:
    codes, scale = quantize_blockwise(torch.randn(1000), SIGNED)
    expected = dequantize_blockwise(codes, scale, SIGNED, 256, torch.bfloat16)
    got = dequantize_blockwise(codes.cuda(), scale.cuda(), SIGNED.cuda(), 256, torch.bfloat16)
    assert torch.equal(got.cpu(), expected)
