"""Products with a 4-bit weight: what each kernel reads and adds up, and which of them multiplies what."""

from typing import Any

import pytest
import torch
from bfloat16_products import multiply_bfloat16
from lq_kernels import linear_4bit as linear
from lq_kernels import small_batch_4bit as small_batch
from lq_kernels.blockwise_4bit import dequantize_4bit, quantize_4bit
from lq_kernels.codebooks import four_bit_map
from lq_kernels.gemv_4bit import gemv_4bit
from lq_kernels.linear_4bit import Slices, linear_4bit, linear_4bit_grad_input, slice_rows
from lq_kernels.nibble_words import word_table
from lq_kernels.requantize_4bit import requantize_4bit
from lq_kernels.small_batch_4bit import Tile, arranged, fits_small_batch, launch_small_batch, small_batch_4bit
from torch import Tensor

pytest.importorskip("triton")
multiply_bfloat16()

PORTABLE = Tile(16, 64, 1, warps=4, stages=2, decode="portable")
TYPES = [(quant_type, dtype) for quant_type in ("nf4", "fp4") for dtype in (torch.bfloat16, torch.float16)]


def launch(op: Any, *args: Any) -> Tensor:
    """The op's kernels, whatever the device."""
    return op.launcher(*args)


def every_byte(device: torch.device) -> Tensor:
    """(256, 64) codes in bytes (256, 32): over the rows each byte has every value."""
    row, column = torch.arange(256)[:, None], torch.arange(32)[None, :]
    return ((row + 37 * column) % 256).to(device, torch.uint8)


def read_back(packed: Tensor, quant_type: str) -> Tensor:
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).view(len(packed), -1)
    return four_bit_map(quant_type).to(packed.device)[codes.long()]


def product_with_identity(tile: Tile, quant_type: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """W.t(), as the kernel reads it."""
    out = torch.empty(64, 256, device=device, dtype=dtype)
    x, scale = torch.eye(64, device=device, dtype=dtype), torch.ones(256, device=device)
    launch_small_batch(x, every_byte(device).view(-1, 1), scale, 64, quant_type, out, None, tile, 1)
    return out


@pytest.mark.parametrize(("quant_type", "dtype"), TYPES)
def test_every_byte_is_read_as_its_two_values(quant_type: str, dtype: torch.dtype, device: torch.device) -> None:
    got = product_with_identity(PORTABLE, quant_type, dtype, device)
    assert torch.equal(got.t(), read_back(every_byte(device), quant_type).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize(("quant_type", "dtype"), TYPES)
@pytest.mark.parametrize("decode", ["prmt", "lookup"])
@pytest.mark.parametrize("m", [8, 16, 64])
def test_ptx_reads_every_byte_as_the_portable_code_does(
    quant_type: str, dtype: torch.dtype, decode: str, m: int, device: torch.device
) -> None:
    if torch.version.hip:
        pytest.skip("PTX is NVIDIA's")
    for is_arranged in (False, m >= 16):
        for n, warps, stages in ((64, 4, 2), (128, 8, 2), (128, 4, 3)):
            tile = Tile(m, n, 1, warps, stages, decode, is_arranged)
            got = product_with_identity(tile, quant_type, dtype, device)
            assert torch.equal(got.t(), read_back(every_byte(device), quant_type).to(dtype))


@pytest.mark.parametrize(("quant_type", "dtype"), TYPES)
def test_a_table_holds_pairs_values_and_planes(quant_type: str, dtype: torch.dtype) -> None:
    table, values = word_table(quant_type, dtype, torch.device("cpu")), four_bit_map(quant_type).to(dtype)
    pairs = table[:256].view(dtype).view(256, 2)
    assert all(torch.equal(pairs[byte], values[[byte >> 4, byte & 15]]) for byte in range(256))
    assert torch.equal(table[256:264].view(dtype), values)
    low, high = table[264:].view(torch.uint8).view(2, 16).int()
    assert torch.equal((low | high << 8).to(torch.uint16).view(dtype), values)


@pytest.mark.parametrize("run", [2, 4])
def test_arranging_moves_whole_runs_and_stays_in_its_128(run: int) -> None:
    x = torch.arange(256).view(1, 256)
    got = arranged(x, run)[0]
    first = torch.tensor([0, 32, 64, 96])[:, None] + torch.arange(run)
    assert got[: 5 * run].tolist() == [*first.flatten().tolist(), *range(run, 2 * run)]
    assert torch.equal(got.view(2, 128).sort(dim=1).values, x.view(2, 128))
    assert torch.equal(got[128:], got[:128] + 128)


@pytest.mark.parametrize("splits", [1, 2, 3, 5])
@pytest.mark.parametrize("is_arranged", [False, True])
def test_splits_of_k_add_up(splits: int, is_arranged: bool, device: torch.device) -> None:
    """5 chunks of 128 in steps of 2, for up to 5 programs of which some have nothing to do."""
    weight, x = torch.randn(40, 640, device=device), torch.randn(3, 640, device=device).bfloat16()
    packed, scale = quantize_4bit(weight)
    bias = torch.randn(40, device=device)
    tile, out = Tile(16, 64, 2, 4, 2, "portable", is_arranged), torch.empty(3, 40, device=device, dtype=torch.bfloat16)
    launch_small_batch(x, packed, scale, 64, "nf4", out, bias, tile, splits)
    exact = x.double() @ dequantize_4bit(packed, scale, 64, "nf4", [40, 640], torch.float32).double().t() + bias
    magnitudes = x.double().abs() @ weight.double().abs().t() + bias.abs()
    assert ((out.double() - exact).abs() <= 2.0**-8 * (2.2 * magnitudes + exact.abs())).all()


@pytest.mark.parametrize("M", [1, 2, 16, 17, 64, 100, 128])
@pytest.mark.parametrize("shape", [[64, 64], [14336, 4096], [4096, 14336], [37, 192], [100_000, 64]])
def test_no_split_is_without_work(M: int, shape: list[int]) -> None:
    for tile in (*small_batch.TILES, PORTABLE):
        splits = tile.splits(M, shape[0], shape[1], multiprocessors=132)
        steps = -(-shape[1] // (128 * tile.chunks))
        assert 1 <= splits <= steps
        assert (splits - 1) * -(-steps // splits) < steps


def test_small_batches_want_whole_words_and_chunks() -> None:
    x = torch.randn(2, 128).bfloat16()
    assert fits_small_batch(x, 64, [5, 128])
    assert not fits_small_batch(x.float(), 64, [5, 128])
    assert not fits_small_batch(x, 32, [5, 128])
    assert not fits_small_batch(x, 64, [5, 96])
    with pytest.raises(ValueError, match=r"whole 64s.*K = 96.*gemv_4bit and linear_4bit take any"):
        launch(small_batch_4bit, torch.randn(2, 96).bfloat16(), *quantize_4bit(torch.randn(5, 96)), 64, "nf4", [5, 96])


def test_each_number_of_rows_has_its_kernel(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    used: list[str] = []
    for name in ("launch_small_batch", "launch_gemv", "launch_dequantize"):
        monkeypatch.setattr(linear, name, lambda *args, name=name: used.append(name))

    def kernel_for(M: int, K: int, dtype: torch.dtype = torch.bfloat16) -> str:
        used.clear()
        packed, scale = quantize_4bit(torch.randn(8, K, device=device))
        launch(linear_4bit, torch.randn(M, K, device=device, dtype=dtype), packed, scale, 64, "nf4", [8, K])
        return used[0]

    assert [kernel_for(M, 64) for M in (1, 2, 128)] == ["launch_small_batch"] * 3
    assert kernel_for(129, 64) == "launch_dequantize"
    assert [kernel_for(M, 65) for M in (1, 2)] == ["launch_gemv", "launch_dequantize"]
    assert [kernel_for(M, 64, torch.float32) for M in (1, 2)] == ["launch_gemv", "launch_dequantize"]


@pytest.mark.parametrize(("K", "rows"), [(64, 8), (65, 8), (64, 37), (64, 100), (65, 64)])
def test_slices_are_the_weight(K: int, rows: int, device: torch.device) -> None:
    packed, scale = quantize_4bit(torch.randn(37, K, device=device))
    whole = dequantize_4bit(packed, scale, 64, "nf4", [37, K], torch.float32)
    end = 0
    for begin, stop, weight in Slices(packed, scale, 64, "nf4", [37, K], torch.float32).of_rows(rows):
        assert begin == end
        assert torch.equal(weight, whole[begin:stop])
        end = stop
    assert end == 37


def test_products_in_slices_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(linear, "slice_rows", lambda *sizes: 16)
    packed, scale = quantize_4bit(torch.randn(37, 64, device=device))
    x, grad = torch.randn(5, 64, device=device), torch.randn(5, 37, device=device)
    bias = torch.randn(37, device=device)
    weight = dequantize_4bit(packed, scale, 64, "nf4", [37, 64], torch.float32)
    got = launch(linear_4bit, x, packed, scale, 64, "nf4", [37, 64], bias)
    torch.testing.assert_close(got, torch.nn.functional.linear(x, weight, bias))
    got = launch(linear_4bit_grad_input, grad, packed, scale, 64, "nf4", [37, 64])
    torch.testing.assert_close(got, grad @ weight)


def test_slices_are_whole_tiles_of_the_product_or_the_whole_weight() -> None:
    for M in (200, 512, 2048, 8192):
        for shape in ([14336, 4096], [4096, 14336], [37, 64], [8, 0]):
            rows = slice_rows(M, shape, 2)
            assert rows == shape[0] or rows % 256 == 0
            assert rows > 0


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_8_bit_codes_are_the_weight_within_half_a_step(dtype: torch.dtype, transposed: bool) -> None:
    weight = torch.randn(40, 128) * torch.exp(torch.randn(40, 1))
    packed, scale = quantize_4bit(weight)
    codes, factors = requantize_4bit(packed, scale, 64, "nf4", [40, 128], dtype, transposed)
    exact = dequantize_4bit(packed, scale, 64, "nf4", [40, 128], torch.float32)
    exact = exact.t() if transposed else exact
    assert (codes.shape, factors.shape) == (exact.shape, (len(exact), 1))
    error = (codes.float() * factors - exact).abs()
    # int8: half a step; e4m3: three bits behind the first, half of the last one, and half of the smallest code.
    step = factors / 2 if dtype == torch.int8 else exact.abs() / 16 + factors * 2.0**-10
    assert (error <= step * (1 + 2.0**-20)).all()
    largest = 127 if dtype == torch.int8 else 448
    assert (codes.float().abs().amax(dim=1) == largest).all() or transposed


def test_8_bit_codes_want_whole_blocks_in_a_row() -> None:
    packed, scale = quantize_4bit(torch.randn(4, 96))
    with pytest.raises(ValueError, match=r"96 columns in blocks of 64: pad them, or multiply in 16 bits"):
        requantize_4bit(packed, scale, 64, "nf4", [4, 96])
    with pytest.raises(TypeError, match=r"not torch\.float16"):
        requantize_4bit(*quantize_4bit(torch.randn(4, 64)), 64, "nf4", [4, 64], torch.float16)


@pytest.mark.parametrize("op", [gemv_4bit, small_batch_4bit, linear_4bit])
def test_sizes_that_do_not_fit_are_named(op: Any) -> None:
    packed, scale = quantize_4bit(torch.randn(4, 64))
    x = torch.randn(3, 64).bfloat16()
    for wrong, message in (
        (
            (x[:, :60], packed, scale, 64, "nf4", [4, 64]),
            r"x \(\.\.\., K\) and W \(N, K\), got \(3, 60\) and \(4, 64\)",
        ),
        ((x, packed, scale, 64, "nf4", [5, 64]), "320 values take 160 bytes"),
        ((x, packed, scale[1:], 64, "nf4", [4, 64]), "another block size"),
        ((x, packed, scale, 64, "nf5", [4, 64]), "quant_type must be one of"),
        ((x, packed, scale, 64, "nf4", [4, 64], torch.randn(3).bfloat16()), r"the bias of W \(4, 64\)"),
    ):
        with pytest.raises(ValueError, match=message):
            op(*wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 4, 16, 64, 128])
@pytest.mark.parametrize("shape", [[14336, 4096], [4096, 14336], [1000, 192]])
def test_the_same_product_has_the_same_bits_every_time(M: int, shape: list[int], device: torch.device) -> None:
    packed, scale = quantize_4bit(torch.randn(shape, device=device))
    x = torch.randn(M, shape[1], device=device, dtype=torch.bfloat16)
    first, *others = (linear_4bit(x, packed, scale, 64, "nf4", shape) for _ in range(20))
    assert all(torch.equal(first, other) for other in others)
