"""4-bit quantisation under bitsandbytes' names: bytes, states and errors."""

import pytest
import torch
from lq_kernels import functional as F
from lq_kernels.codebooks import four_bit_map
from published import errors

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


# mean and standard deviation of the absolute and of the relative error of 1024 x 1024 normal values
ERRORS_4BIT = {
    ("fp4", 32): ((0.088925, 0.000091), (0.242443, 0.000330)),
    ("fp4", 64): ((0.096543, 0.000111), (0.260125, 0.000379)),
    ("fp4", 128): ((0.102969, 0.000134), (0.275817, 0.000433)),
    ("fp4", 256): ((0.108684, 0.000182), (0.289831, 0.000497)),
    ("fp4", 512): ((0.114115, 0.000234), (0.302881, 0.000583)),
    ("fp4", 1024): ((0.119333, 0.000320), (0.315000, 0.000757)),
    ("fp4", 2048): ((0.124556, 0.000455), (0.326607, 0.000955)),
    ("fp4", 4096): ((0.129536, 0.000612), (0.337169, 0.001239)),
    ("nf4", 32): ((0.067746, 0.000069), (0.189726, 0.000304)),
    ("nf4", 64): ((0.072798, 0.000074), (0.203339, 0.000340)),
    ("nf4", 128): ((0.076831, 0.000091), (0.215237, 0.000391)),
    ("nf4", 256): ((0.080337, 0.000102), (0.226105, 0.000398)),
    ("nf4", 512): ((0.083547, 0.000143), (0.236079, 0.000544)),
    ("nf4", 1024): ((0.086610, 0.000187), (0.245370, 0.000600)),
    ("nf4", 2048): ((0.089592, 0.000251), (0.254163, 0.000747)),
    ("nf4", 4096): ((0.092547, 0.000360), (0.262473, 0.000999)),
}


@pytest.mark.parametrize(("quant_type", "blocksize"), ERRORS_4BIT)
def test_4_bit_errors_are_as_small_as_published(quant_type: str, blocksize: int) -> None:
    x = torch.randn(1024, 1024, dtype=FLOATS[blocksize % 3])
    restored = F.dequantize_4bit(*F.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type))
    assert (restored.dtype, restored.shape) == (x.dtype, x.shape)
    for error, (mean, deviation) in zip(errors(restored, x), ERRORS_4BIT[quant_type, blocksize], strict=True):
        assert error < mean + 7 * deviation


@pytest.mark.parametrize("blocksize", [32, 64, 128])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_compressed_statistics_cost_little(quant_type: str, blocksize: int) -> None:
    x = torch.randn(1024, 1024, dtype=torch.float16)
    packed, state = F.quantize_4bit(x, blocksize=blocksize, compress_statistics=True, quant_type=quant_type)
    error = errors(F.dequantize_4bit(packed, state), x)
    assert error[0] < 0.11
    assert error[1] < 0.28
    assert state.absmax.dtype == torch.uint8
    assert (state.state2.blocksize, state.state2.dtype) == (256, torch.float32)
    # 8 bits for each block and 32 for 256 blocks
    bits = 8 * state.absmax.numel() + 32 * state.state2.absmax.numel()
    assert bits / x.numel() == (8 + 32 / 256) / blocksize


def test_4_bit_golden_vectors() -> None:
    x = torch.tensor([1.0, -1.0, 0.0, 0.5])
    assert F.quantize_nf4(x)[0].flatten().tolist() == [0xF0, 0x7C]
    assert F.quantize_fp4(x)[0].flatten().tolist() == [0x3B, 0x05]
    x = torch.nn.functional.pad(torch.arange(-10, 11) / 5, (0, 43))
    packed, state = F.quantize_nf4(x)
    assert bytes(packed.flatten().tolist())[:12].hex(" ") == "00 11 22 34 56 78 9b cc de ef f7 77"
    expected = [-2, -2, -1.392386, -1.392386, -1.050146, -1.050146, -0.789835, -0.568883, -0.369547, -0.1821, 0]
    expected += [0.159161, 0.32186, 0.67583, 0.88142, 0.88142, 1.125234, 1.445914, 1.445914, 2, 2]
    torch.testing.assert_close(F.dequantize_nf4(packed, state)[:21], torch.tensor(expected), atol=1e-6, rtol=1e-6)
    packed, state = F.quantize_fp4(x)
    assert bytes(packed.flatten().tolist())[:11].hex(" ") == "bb aa ad cc ee 06 64 45 22 23 30"
    expected = [-2, -2, -4 / 3, -4 / 3, -4 / 3, -1, -2 / 3, -2 / 3, -1 / 3, -1 / 3, 0, 1 / 3, 1 / 3]
    expected += [2 / 3, 2 / 3, 1, 4 / 3, 4 / 3, 4 / 3, 2, 2]
    torch.testing.assert_close(F.dequantize_fp4(packed, state)[:21], torch.tensor(expected))


def test_8_bit_golden_vectors() -> None:
    x = torch.tensor([0, 1e-9, 1e-7, -1e-7, 3e-6, 5e-6, 1e-5, 1.2e-5, 2e-5, 3e-5, 1, -0.0, 2e-6, 1e-6, 4e-5])
    codes, state = F.quantize_blockwise(x)
    assert codes.tolist() == [127, 127, 127, 127, 129, 129, 130, 130, 131, 131, 255, 127, 129, 128, 132]
    codes, state = F.quantize_blockwise(-x)
    assert codes[10] == 0
    assert F.dequantize_blockwise(codes, state)[10].item() == pytest.approx(-0.99296874)


def test_the_defaults_are_fp4_in_blocks_of_64_without_compression() -> None:
    packed, state = F.quantize_4bit(torch.randn(10, 33))
    assert (packed.shape, packed.dtype) == ((165, 1), torch.uint8)
    assert (state.quant_type, state.blocksize, state.nested, tuple(state.shape)) == ("fp4", 64, False, (10, 33))
    assert torch.equal(state.code, four_bit_map("fp4"))


@pytest.mark.parametrize(
    "storage", [torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.int64]
)
@pytest.mark.parametrize("compress", [False, True])
def test_storage_dtypes_hold_the_same_bytes(storage: torch.dtype, compress: bool) -> None:
    x = torch.randn(16, 200)
    packed, state = F.quantize_nf4(x, compress_statistics=compress, quant_storage=storage)
    expected, same = F.quantize_nf4(x, compress_statistics=compress)
    assert (packed.dtype, packed.shape) == (storage, (1600 // storage.itemsize, 1))
    assert torch.equal(packed.view(-1).view(torch.uint8), expected.view(-1))
    assert state == same
    assert torch.equal(F.dequantize_4bit(packed, state), F.dequantize_4bit(expected, same))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("shape", [(1,), (2,), (37,), (3, 5, 7), (1000, 1), (0,), (3, 0)])
def test_4_bit_tensors_of_any_shape_come_back(shape: tuple[int, ...], compress: bool) -> None:
    x = torch.randn(shape)
    packed, state = F.quantize_nf4(x, compress_statistics=compress)
    restored = F.dequantize_nf4(packed, state)
    assert restored.shape == x.shape
    assert restored.isfinite().all()
    # The widest gap of nf4 is 0.304 of absmax; compressed statistics are off by 1 % at most.
    assert not x.numel() or (restored - x).abs().max() <= (0.152 + 0.01) * x.abs().max() + 1e-6


@pytest.mark.parametrize("compress", [False, True])
def test_4_bit_outputs_are_written_where_asked(compress: bool) -> None:
    x = torch.randn(33, 1000)
    packed, state = F.quantize_4bit(x, compress_statistics=compress, quant_type="nf4")
    out, absmax, values = torch.empty(16500, 1, dtype=torch.uint8), torch.empty(516), torch.empty(33, 1000)
    for kwargs in ({"out": out}, {"absmax": absmax}, {"out": out, "absmax": absmax}):
        written, same = F.quantize_4bit(x, **kwargs, compress_statistics=compress, quant_type="nf4")
        assert torch.equal(written, packed)
        assert same == state
    as_halves, _ = F.quantize_nf4(x, absmax=absmax, compress_statistics=compress, quant_storage=torch.float16)
    assert torch.equal(as_halves.view(torch.uint8).view(-1), packed.view(-1))
    assert written is out
    assert torch.equal(absmax, F.quantize_nf4(x)[1].absmax)
    assert F.dequantize_4bit(packed, state, out=values) is values
    assert torch.equal(values, F.dequantize_4bit(packed, state))
    if not compress:
        half = torch.empty(33, 1000, dtype=torch.float16)
        F.dequantize_4bit(packed, absmax=absmax, out=half, quant_type="nf4")
        assert torch.equal(half, values.half())


def test_a_packed_row_is_a_transposed_column() -> None:
    x = torch.randn(8, 64)
    packed, state = F.quantize_nf4(x)
    assert torch.equal(F.dequantize_nf4(packed.t(), state), F.dequantize_nf4(packed, state).t())
    for small in (torch.randn(2, 1), torch.randn(1, 2), torch.randn(1)):
        packed, state = F.quantize_nf4(small)
        assert F.dequantize_nf4(packed, state).shape == small.shape


def test_a_state_read_from_a_file_reads_the_codes() -> None:
    x = torch.randn(64, 70)
    for compress in (False, True):
        packed, state = F.quantize_nf4(x, compress_statistics=compress)
        again = F.QuantState.from_dict(state.as_dict(packed=True), "cpu")
        assert torch.equal(F.dequantize_4bit(packed, again), F.dequantize_4bit(packed, state))


def test_nested_statistics_with_blocks_of_another_size_are_read_too() -> None:
    packed, state = F.quantize_nf4(torch.randn(64, 70))
    expected = F.dequantize_4bit(packed, state)
    state.absmax, inner = F.quantize_blockwise(state.absmax, blocksize=32)
    state.state2, state.offset = inner, torch.zeros(())
    torch.testing.assert_close(F.dequantize_4bit(packed, state), expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_4_bit_blocks_that_are_not_finite_show(poison: float, quant_type: str) -> None:
    x = torch.randn(4, 64)
    x[1, 7] = poison
    restored = F.dequantize_4bit(*F.quantize_4bit(x, quant_type=quant_type))
    assert restored.isfinite().all(dim=1).tolist() == [True, False, True, True]
    assert not restored[1].isfinite().any()
    restored = F.dequantize_4bit(*F.quantize_4bit(x, quant_type=quant_type, compress_statistics=True))
    assert not restored.isfinite().any()
