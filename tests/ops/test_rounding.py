"""The random bits of stochastic rounding: uniform, unrelated, the same in torch and in Triton; and what they round."""

import pytest
import torch
from lq_kernels._triton import tl, triton
from lq_kernels.rounding import (
    FRACTION_BITS,
    hashed_seed,
    random_bits,
    random_word,
    random_words,
    round_to_int8,
    round_to_mantissa,
)
from torch import Tensor


@triton.jit
def _bits_kernel(seed_ptr, out_ptr, high, n, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = random_word(hashed_seed(tl.load(seed_ptr), high), index)
    tl.store(out_ptr + index, word.to(tl.int64), mask=index < n)


def test_kernels_and_the_reference_draw_the_same_bits(device: torch.device) -> None:
    seed = torch.tensor([0x1234_5678_9ABC], device=device)
    for high in (0, 1, 5):
        bits = torch.empty(1000, dtype=torch.int64, device=device)
        _bits_kernel[(4,)](seed, bits, high, 1000, BLOCK=256)
        index = torch.arange(1000) + (high << 32)
        torch.testing.assert_close(bits.cpu(), random_bits(seed.cpu(), index), rtol=0, atol=0)


def test_bits_are_uniform_and_change_with_seed_and_index() -> None:
    index = torch.arange(1 << 20)
    draws = [random_bits(torch.tensor(seed), index) for seed in (0, 1, 2**31)]
    draws.append(random_bits(torch.tensor(0), index + (1 << 32)))
    for bits in draws:
        assert int(bits.min()) >= 0
        assert int(bits.max()) < 2**32
        # Of n uniform bits the share of ones is 1/2 with a standard deviation of 1 / (2 sqrt(n)); six of them.
        ones = torch.stack([(bits >> bit & 1).double().mean() for bit in range(32)])
        assert float((ones - 0.5).abs().max()) < 3 / 1024
        assert len(bits.unique()) == len(bits)
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert abs(float(torch.corrcoef(torch.stack([one, other]).double())[0, 1])) < 6 / 1024


@triton.jit
def _words_kernel(seed_ptr, index_ptr, out_ptr, BLOCK: tl.constexpr, BELOW_32_BITS: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    word = random_words(tl.load(seed_ptr), tl.load(index_ptr + offset), BELOW_32_BITS)
    tl.store(out_ptr + offset, word.to(tl.int64))


@pytest.mark.parametrize("below", [True, False])
def test_kernels_draw_the_same_bits_on_both_sides_of_two_to_the_32(below: bool, device: torch.device) -> None:
    index = torch.arange(256) + (2**32 - 256 if below else 2**32 - 128)
    seed, out = torch.tensor([-5]), torch.empty(256, dtype=torch.int64, device=device)
    _words_kernel[(1,)](seed.to(device), index.to(device), out, BLOCK=256, BELOW_32_BITS=below)
    torch.testing.assert_close(out.cpu(), random_bits(seed, index), rtol=0, atol=0)


DRAWS = 1 << 12


def evenly_spaced_bits(values: Tensor) -> Tensor:
    """(values, DRAWS): every DRAWS-th word, so that an event of probability p happens p * DRAWS times, but for one."""
    return (torch.arange(DRAWS) * (2**32 // DRAWS)).expand(*values.shape, DRAWS)


def test_int8_rounds_up_as_often_as_its_fraction_says() -> None:
    x = torch.cat([torch.rand(200) * 254 - 127, torch.rand(50) / 100, -torch.rand(50) / 100])
    rounded = round_to_int8(x[:, None].expand(-1, DRAWS), evenly_spaced_bits(x)).double()
    assert ((rounded == x[:, None].floor()) | (rounded == x[:, None].ceil())).all()
    # One draw, and what is cut off below the fraction.
    assert ((rounded.mean(1) - x).abs() <= 1 / DRAWS + 2.0**-FRACTION_BITS).all()


def test_int8_leaves_integers_alone_whatever_the_bits() -> None:
    x = torch.arange(-127.0, 128.0)
    for bits in (0, 1, 2**31, 2**32 - 1):
        assert torch.equal(round_to_int8(x, torch.full_like(x, bits, dtype=torch.int64)).float(), x)


FLOATS = [(3, 2.0**-6, 448.0), (2, 2.0**-14, 57344.0)]  # e4m3, e5m2


def values_of(mantissa: int, smallest_normal: float, largest: float) -> Tensor:
    """Values over the whole range, more of them subnormal, of both signs, and 0."""
    exponent = torch.empty(400).uniform_(-mantissa - 2, 8)
    small = smallest_normal * torch.exp2(exponent)
    return torch.cat([torch.zeros(1), small, -small, torch.rand(100) * largest, -torch.rand(100) * largest])


@pytest.mark.parametrize(("mantissa", "smallest_normal", "largest"), FLOATS)
def test_floats_round_up_as_often_as_their_distance_says(mantissa: int, smallest_normal: float, largest: float) -> None:
    x = values_of(mantissa, smallest_normal, largest)
    rounded = round_to_mantissa(x[:, None].expand(-1, DRAWS), evenly_spaced_bits(x), mantissa, smallest_normal).double()
    step = torch.exp2(x.abs().double().clamp(min=smallest_normal).log2().floor() - mantissa)
    position = x.double()[:, None] / step[:, None]
    steps = rounded / step[:, None]
    assert ((steps == position.floor()) | (steps == position.ceil())).all()
    assert ((rounded.mean(1) - x).abs() <= step * (1 / DRAWS + 2.0 ** -(22 - mantissa))).all()


@pytest.mark.parametrize(("mantissa", "smallest_normal"), [(3, 2.0**-6), (2, 2.0**-14)])
def test_floats_of_that_mantissa_stay_whatever_the_bits(mantissa: int, smallest_normal: float) -> None:
    dtype = torch.float8_e4m3fn if mantissa == 3 else torch.float8_e5m2
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    values = values[values.isfinite()]
    for bits in (0, 1, 2**31, 2**32 - 1):
        every = torch.full_like(values, bits, dtype=torch.int64)
        assert torch.equal(round_to_mantissa(values, every, mantissa, smallest_normal), values)
