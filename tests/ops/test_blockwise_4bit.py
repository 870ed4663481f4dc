"""4-bit quantisation: what it guarantees about values; kernel against reference is in test_parity.py."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lq_kernels.blockwise_4bit import dequantize_4bit, dequantize_4bit_out, quantize_4bit, quantize_4bit_out
from lq_kernels.codebooks import four_bit_map
from lq_kernels.layout_4bit import BLOCK_SIZES, QUANT_TYPES
from lq_kernels.nibble_codes import _STEPS, _WIDTH
from samples_blockwise_4bit import STORAGES, bounds_4bit, neighbours
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Published thresholds: v above one has the next code. https://arxiv.org/abs/2305.14314 and bitsandbytes' encoder
NF4_THRESHOLDS = (
    *(-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984),
    *(-0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668),
    *(0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784178118011),
)
FP4_THRESHOLDS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
ULP = 2.0**-24  # of the largest thresholds: the midpoint of two float32 is rounded
FP4_DIGITS = 5e-7  # they are published with six or seven
FP4_CODES = (0, 1, 6, 7, 4, 5, 2, 3)  # by magnitude

# Mean error and mean relative error of randn and the standard deviation of each, by block size: bitsandbytes' tests.
PUBLISHED_ERRORS = {
    ("fp4", 64): ((0.096543, 0.000111), (0.260125, 0.000379)),
    ("fp4", 256): ((0.108684, 0.000182), (0.289831, 0.000497)),
    ("fp4", 4096): ((0.129536, 0.000612), (0.337169, 0.001239)),
    ("nf4", 32): ((0.067746, 0.000069), (0.189726, 0.000304)),
    ("nf4", 64): ((0.072798, 0.000074), (0.203339, 0.000340)),
    ("nf4", 256): ((0.080337, 0.000102), (0.226105, 0.000398)),
    ("nf4", 4096): ((0.092547, 0.000360), (0.262473, 0.000999)),
}


def nibbles(packed: Tensor) -> Tensor:
    codes = packed.view(-1).view(torch.uint8)
    return torch.stack([codes >> 4, codes & 15], dim=1).view(-1)


def codes_of(v: Tensor, quant_type: str) -> Tensor:
    """The codes of values in [-1, 1], each in a block that begins with 1."""
    blocks = torch.zeros(len(v), 32)
    blocks[:, 0], blocks[:, 1] = 1, v
    packed, scale = quantize_4bit(blocks, 32, quant_type)
    assert (scale == 1).all()
    return nibbles(packed).view(-1, 32)[:, 1]


def distance_to_bounds(x: Tensor, scale: Tensor, block_size: int, quant_type: str) -> Tensor:
    """Of each v = x / scale to where its code changes."""
    v = x.float().view(-1) / scale.repeat_interleave(block_size)[: x.numel()]
    return (v[:, None] - bounds_4bit(quant_type)).abs().amin(1)


def round_trip(x: Tensor, block_size: int = 64, quant_type: str = "nf4") -> Tensor:
    packed, scale = quantize_4bit(x, block_size, quant_type)
    return dequantize_4bit(packed, scale, block_size, quant_type, list(x.shape), x.dtype)


def test_four_values_have_the_published_bytes() -> None:
    x = torch.tensor([1, -1, 0, 0.5])
    for quant_type, expected in (("nf4", [0xF0, 0x7C]), ("fp4", [0x3B, 0x05])):
        packed, scale = quantize_4bit(x, 64, quant_type)
        assert packed.tolist() == [[byte] for byte in expected]
        assert scale.tolist() == [1]


@pytest.mark.parametrize(
    ("quant_type", "first_bytes", "values"),
    [
        (
            "nf4",
            "00 11 22 34 56 78 9B CC DE EF F7 77",
            "-2 -2 -1.392386 -1.392386 -1.050146 -1.050146 -0.789835 -0.568883 -0.369547 -0.1821 0 "
            "0.159161 0.32186 0.67583 0.88142 0.88142 1.125234 1.445914 1.445914 2 2",
        ),
        (
            "fp4",
            "BB AA AD CC EE 06 64 45 22 23 30 00",
            "-2 -2 -1.333333 -1.333333 -1.333333 -1 -0.666667 -0.666667 -0.333333 -0.333333 0 "
            "0.333333 0.333333 0.666667 0.666667 1 1.333333 1.333333 1.333333 2 2",
        ),
    ],
)
def test_a_ramp_has_the_published_bytes_and_values(quant_type: str, first_bytes: str, values: str) -> None:
    x = torch.zeros(64)
    x[:21] = 2 * torch.linspace(-1, 1, 21, dtype=torch.float64).float()
    x[10] = 0
    packed, scale = quantize_4bit(x, 64, quant_type)
    assert bytes(packed[:12, 0].tolist()) == bytes.fromhex(first_bytes)
    assert scale.tolist() == [2]
    back = dequantize_4bit(packed, scale, 64, quant_type, [64], torch.float32)
    torch.testing.assert_close(back[:21], torch.tensor([float(value) for value in values.split()]), rtol=0, atol=5e-7)
    assert (back[21:] == 0).all()


def test_nf4_codes_change_at_the_published_thresholds_and_a_tie_goes_down() -> None:
    v = torch.linspace(-1, 1, 4001)
    thresholds = torch.tensor(NF4_THRESHOLDS)
    expected = (v[:, None] > thresholds).sum(1)
    near = ((v[:, None] - thresholds).abs() <= ULP).any(1)
    assert torch.equal(codes_of(v, "nf4")[~near].long(), expected[~near])
    bounds = bounds_4bit("nf4")[:15]
    torch.testing.assert_close(bounds, thresholds, rtol=0, atol=ULP)
    at, above, _ = codes_of(neighbours(bounds), "nf4").view(3, 15)
    assert at.tolist() == list(range(15))
    assert above.tolist() == list(range(1, 16))


def test_fp4_codes_change_at_the_published_thresholds_and_a_tie_goes_to_zero() -> None:
    v = torch.cat([torch.linspace(-1, 1, 4001), torch.tensor([0.001, -0.001])])
    thresholds = torch.tensor(FP4_THRESHOLDS)
    ranks = (v.abs()[:, None] > thresholds).sum(1)
    near = ((v.abs()[:, None] - thresholds).abs() < FP4_DIGITS).any(1)
    expected = torch.tensor(FP4_CODES)[ranks] + 8 * (v < 0)
    assert torch.equal(codes_of(v, "fp4")[~near].long(), expected[~near])
    bounds = bounds_4bit("fp4")[:7]
    torch.testing.assert_close(bounds, thresholds, rtol=0, atol=FP4_DIGITS)
    assert codes_of(bounds, "fp4").tolist() == list(FP4_CODES[:7])
    assert codes_of(-bounds, "fp4").tolist() == [8 + code for code in FP4_CODES[:7]]
    assert codes_of(torch.tensor([-0.0, 0.0, -1e-30, 1e-30]), "fp4").tolist() == [0, 0, 8, 0]


@pytest.mark.parametrize(("quant_type", "block_size"), PUBLISHED_ERRORS)
def test_errors_are_as_small_as_published(quant_type: str, block_size: int) -> None:
    x = torch.randn(1 << 20)
    error = (round_trip(x, block_size, quant_type) - x).abs()
    relative = error / (x.abs() + 1e-8)
    for got, (mean, deviation) in zip(
        (error.mean(), relative.mean()), PUBLISHED_ERRORS[quant_type, block_size], strict=True
    ):
        assert got < mean + 7 * deviation


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_no_bucket_of_the_kernels_holds_two_bounds_or_ends_near_one(quant_type: str) -> None:
    bounds = bounds_4bit(quant_type)[: 15 if quant_type == "nf4" else 7]
    buckets = (bounds.double() * _STEPS + _STEPS + 0.5) / _WIDTH
    assert (buckets.floor().diff() >= 1).all()
    assert ((buckets - buckets.round()).abs() > 0.01).all()


sizes = st.lists(st.integers(0, 70), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(sizes, st.sampled_from(FLOATS), st.sampled_from(BLOCK_SIZES), st.sampled_from(QUANT_TYPES), st.integers(0, 99))
def test_each_value_gets_the_nearest_value_of_the_map(
    shape: list[int], dtype: torch.dtype, block_size: int, quant_type: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) * 2.0 ** (seed % 9 - 4)).to(dtype)
    packed, scale = quantize_4bit(x, block_size, quant_type)
    assert packed.shape == (-(-x.numel() // 2), 1)
    assert scale.shape == (-(-x.numel() // block_size),)
    scales = scale.double().repeat_interleave(block_size)[: x.numel(), None]
    errors = (x.double().view(-1, 1) - four_bit_map(quant_type).double() * scales).abs()
    chosen = errors.gather(1, nibbles(packed)[: x.numel(), None].long())[:, 0]
    # v is rounded twice.
    assert (chosen <= errors.amin(1) + 2.0**-22 * scales[:, 0]).all()
    back = dequantize_4bit(packed, scale, block_size, quant_type, shape, dtype)
    assert back.shape == x.shape
    assert back.dtype == dtype


@settings(max_examples=30, deadline=None)
@given(sizes, st.sampled_from(BLOCK_SIZES), st.sampled_from(QUANT_TYPES), st.integers(0, 99))
def test_quantising_again_changes_nothing(shape: list[int], block_size: int, quant_type: str, seed: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    packed, scale = quantize_4bit(x, block_size, quant_type)
    back = dequantize_4bit(packed, scale, block_size, quant_type, shape, torch.float32)
    again, scale_again = quantize_4bit(back, block_size, quant_type)
    assert torch.equal(scale_again, scale)
    assert torch.equal(dequantize_4bit(again, scale_again, block_size, quant_type, shape, torch.float32), back)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_zero_stays_zero_in_any_block(quant_type: str) -> None:
    x = torch.randn(4, 64)
    x[:, ::3] = 0
    x[2] = 0
    x[3] *= 2.0**-140
    packed, scale = quantize_4bit(x, 64, quant_type)
    assert (nibbles(packed).view(4, 64)[x == 0] == (7 if quant_type == "nf4" else 0)).all()
    assert scale[2:].tolist() == [0, 0]
    back = dequantize_4bit(packed, scale, 64, quant_type, [4, 64], torch.float32)
    assert (back[x == 0] == 0).all()
    assert (back[2:] == 0).all()


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_shows_in_its_whole_block_and_no_other(poison: float, quant_type: str) -> None:
    x = torch.randn(3, 64)
    x[1, 7] = poison
    back = round_trip(x, 64, quant_type)
    assert back[1].isnan().all()
    assert back[[0, 2]].isfinite().all()


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_behind_an_odd_number_of_values_lies_the_code_of_zero(quant_type: str) -> None:
    packed, _ = quantize_4bit(torch.tensor([3.0, 2.0, 1.0]), 64, quant_type)
    assert packed[1, 0] & 15 == (7 if quant_type == "nf4" else 0)


@pytest.mark.parametrize("storage", STORAGES)
def test_the_bytes_are_the_same_in_any_dtype(storage: torch.dtype) -> None:
    x = torch.randn(10, 100)
    plain, scale = quantize_4bit(x)
    packed, other_scale = quantize_4bit(x, storage=storage)
    assert packed.shape == (500 // storage.itemsize, 1)
    assert torch.equal(packed.view(-1).view(torch.uint8), plain.view(-1))
    assert torch.equal(other_scale, scale)
    back = dequantize_4bit(packed, scale, 64, "nf4", [10, 100], torch.float32)
    assert torch.equal(back, round_trip(x))


def test_a_single_byte_is_not_read_as_a_transposed_matrix() -> None:
    for shape in ([1], [2], [1, 2], [2, 1], [1, 1]):
        x = torch.arange(1.0, 1 + math.prod(shape)).view(shape)
        packed, scale = quantize_4bit(x)
        for form in (packed, packed.t(), packed.view(-1)):
            back = dequantize_4bit(form, scale, 64, "nf4", shape, torch.float32)
            assert back.shape == x.shape
            assert back.flatten()[-1] == x.flatten()[-1]


@pytest.mark.parametrize("kernel", [False, True])
def test_outputs_are_filled_and_nothing_beside_them(kernel: bool, device: torch.device) -> None:
    x = torch.randn(37, 131, device=device)
    quantize: Any = quantize_4bit_out.launcher if kernel else quantize_4bit_out
    dequantize: Any = dequantize_4bit_out.launcher if kernel else dequantize_4bit_out
    expected, expected_scale = quantize_4bit(x)
    byte_buffer = torch.full((len(expected) + 64,), 0xA5, dtype=torch.uint8, device=device)
    scale_buffer = torch.full((len(expected_scale) + 64,), -1.0, device=device)
    packed, scale = byte_buffer[32:-32].view(-1, 1), scale_buffer[32:-32]
    quantize(x, 64, "nf4", packed, scale)
    assert torch.equal(packed, expected)
    assert torch.equal(scale, expected_scale)
    assert (torch.cat([byte_buffer[:32], byte_buffer[-32:]]) == 0xA5).all()
    assert (torch.cat([scale_buffer[:32], scale_buffer[-32:]]) == -1).all()

    buffer = torch.full((x.numel() + 64,), -1.0, device=device)
    out = buffer[32:-32].view(37, 131)
    dequantize(packed, scale, 64, "nf4", out)
    assert torch.equal(out, dequantize_4bit(packed, scale, 64, "nf4", [37, 131], torch.float32))
    assert (torch.cat([buffer[:32], buffer[-32:]]) == -1).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_bitsandbytes_gives_the_same_nf4_bytes(dtype: torch.dtype, block_size: int) -> None:
    bnb = pytest.importorskip("bitsandbytes").functional
    x = torch.randn(64, 513).to(dtype)
    packed, scale = quantize_4bit(x, block_size, "nf4")
    expected, state = bnb.quantize_4bit(x, blocksize=block_size, quant_type="nf4")
    assert torch.equal(scale, state.absmax)
    different = (nibbles(packed) != nibbles(expected))[: x.numel()]
    assert (distance_to_bounds(x, scale, block_size, "nf4")[different] <= 2 * ULP).all()
    assert different.sum() < 10


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bitsandbytes_reads_the_same_values(dtype: torch.dtype, quant_type: str) -> None:
    bnb = pytest.importorskip("bitsandbytes").functional
    x = torch.randn(64, 514).to(dtype)
    theirs, state = bnb.quantize_4bit(x, blocksize=64, quant_type=quant_type)
    expected = bnb.dequantize_4bit(theirs, state)
    assert torch.equal(dequantize_4bit(theirs, state.absmax, 64, quant_type, list(x.shape), dtype), expected)
    # Of bfloat16 quotients many lie on a bound of fp4, where bitsandbytes' CPU takes the lower value of two negatives.
    different = (round_trip(x, 64, quant_type) != expected).view(-1)
    assert (distance_to_bounds(x, state.absmax, 64, quant_type)[different] <= 2 * ULP).all()
    assert different.float().mean() < 0.001


def test_ops_compile_as_one_graph() -> None:
    def there_and_back(x: Tensor) -> Tensor:
        packed, scale = quantize_4bit(x.sin(), 64, "fp4", torch.bfloat16)
        return dequantize_4bit(packed, scale, 64, "fp4", list(x.shape), x.dtype) + 1

    compiled = torch.compile(there_and_back, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (8, 24):
        x = torch.randn(rows, 50)
        assert torch.equal(compiled(x), there_and_back(x))


def test_wrong_arguments_say_what_was_expected() -> None:
    x = torch.randn(10, 100)
    packed, scale = quantize_4bit(x)
    with pytest.raises(ValueError, match=r"got torch.float64: cast it"):
        quantize_4bit(x.double())
    with pytest.raises(ValueError, match=r"one of .*4096.*, got 16"):
        quantize_4bit(x, 16)
    with pytest.raises(ValueError, match=r"one of .*nf4.*, got 'int4'"):
        quantize_4bit(x, 64, "int4")
    with pytest.raises(RuntimeError, match=r"499 bytes, which cannot be viewed as torch.bfloat16"):
        quantize_4bit(x.view(-1)[:998], storage=torch.bfloat16)
    with pytest.raises(ValueError, match=r"1001 values take 501 bytes, got torch.uint8"):
        dequantize_4bit(packed, scale, 64, "nf4", [1001], torch.float32)
    with pytest.raises(ValueError, match=r"blocks of 128 need a float32 scale of shape \(8,\)"):
        dequantize_4bit(packed, scale, 128, "nf4", [1000], torch.float32)
    with pytest.raises(ValueError, match=r"not as torch.int8"):
        dequantize_4bit(packed, scale, 64, "nf4", [1000], torch.int8)
    with pytest.raises(ValueError, match="packed is written in place"):
        quantize_4bit_out(x, 64, "nf4", torch.cat([packed, packed], dim=1)[:, :1], scale)
    with pytest.raises(ValueError, match="out is written in place"):
        dequantize_4bit_out(packed, scale, 64, "nf4", torch.empty(100, 10).t())


@pytest.mark.gpu
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_the_kernel_finds_the_code_of_every_float32(quant_type: str) -> None:
    one = 0x3F800000  # the bits of 1.0
    bounds = bounds_4bit(quant_type)[: 15 if quant_type == "nf4" else 7].cuda()
    by_rank = torch.arange(16) if quant_type == "nf4" else torch.tensor(FP4_CODES)
    by_rank = by_rank.to(torch.uint8).cuda()
    for start in range(0, one + 1, 31 << 20):
        magnitudes = torch.arange(start, start + (31 << 20), dtype=torch.int32, device="cuda").clamp_(max=one)
        for v in (magnitudes.view(torch.float32), -magnitudes.view(torch.float32)):
            x = torch.nn.functional.pad(v.view(-1, 31), (1, 0), value=1.0)
            codes = nibbles(quantize_4bit(x, 32, quant_type)[0]).view(-1, 32)[:, 1:].reshape(-1)
            ranks = torch.searchsorted(bounds, v if quant_type == "nf4" else v.abs())
            expected = by_rank[ranks] + (8 * (v < 0) if quant_type == "fp4" else 0)
            assert torch.equal(codes, expected.to(torch.uint8))


@pytest.mark.gpu
def test_offsets_do_not_overflow_past_2_to_the_31_values() -> None:
    x = torch.randn(2**31 + 4133, device="cuda", dtype=torch.bfloat16)
    packed, scale = quantize_4bit(x)
    start = 2**31 - 4096
    last, last_scale = quantize_4bit(x[start:].clone())
    assert torch.equal(packed[start // 2 :], last)
    assert torch.equal(scale[start // 64 :], last_scale)
    back = dequantize_4bit(packed, scale, 64, "nf4", [x.numel()], x.dtype)
    assert torch.equal(back[start:], dequantize_4bit(last, last_scale, 64, "nf4", [x.numel() - start], x.dtype))
