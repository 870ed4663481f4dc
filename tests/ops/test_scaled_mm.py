"""The int8 product with scales and bias, against float64."""

import lq_kernels.scaled_mm as module
import pytest
import torch
from hostile import FLOATS, Arguments, heavy_tailed, to_device
from lq_kernels._triton import DeviceLimits
from lq_kernels.rowwise import quantize_rowwise
from lq_kernels.scaled_mm import LARGEST_K, Tile, scaled_mm, tile_for
from samples_scaled_mm import product
from torch import Tensor

EPSILON = 2.0**-24  # half an ulp of float32, relative


def check_against_float64(got: Tensor, arguments: Arguments) -> None:
    a, b, scale_a, scale_b, bias, dtype = arguments
    scaled = (a.double() @ b.double()) * scale_a.double() * scale_b.double()
    expected = scaled if bias is None else scaled + bias.double()
    # The sums are exact; then the cast to float32, two products, one addition and the cast to dtype round once each.
    bound = 3 * EPSILON * scaled.abs() + EPSILON * expected.abs() + torch.finfo(dtype).eps / 2 * expected.abs()
    bound += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # subnormal results
    error = (got.double() - expected).abs()
    assert (error <= bound * (1 + 2.0**-6)).all(), f"{error.max()} at {error.argmax()}"  # products of roundings


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("K", [1, 37, 1000, 20000])
def test_products_are_exact_up_to_the_roundings_of_the_epilogue(K: int, dtype: torch.dtype) -> None:
    arguments = product(5, K, 9, dtype)
    check_against_float64(scaled_mm(*arguments), arguments)


@pytest.mark.parametrize("tile", module._TILES, ids=str)
def test_every_tile_gives_the_bits_of_the_reference(
    tile: Tile, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tile.shared_memory > module.device_limits(device).shared_memory and device.type != "cpu":
        pytest.skip("does not fit into the shared memory of this GPU")
    monkeypatch.setattr(module, "tile_for", lambda *_: tile)
    for sizes in ((tile.m + 3, 2 * tile.k, tile.n + 5), (2 * tile.m, tile.k + 1, tile.n)):
        arguments = product(*sizes, torch.float32)
        assert scaled_mm.launcher is not None
        got = scaled_mm.launcher(*(to_device(argument, device) for argument in arguments))
        torch.testing.assert_close(got.cpu(), scaled_mm.reference(*arguments), rtol=0, atol=0)


def test_a_quantized_linear_is_close_to_the_exact_one() -> None:
    x, weight = heavy_tailed(37, 256), torch.randn(100, 256)
    (codes, scale), (weight_codes, weight_scale) = quantize_rowwise(x), quantize_rowwise(weight)
    got = scaled_mm(codes, weight_codes.t(), scale, weight_scale.t(), None, torch.float32)
    expected = x.double() @ weight.double().t()
    # Each operand is off by at most half a step: sum |x| |dw| + |dx| |w| + |dx| |dw|
    dx, dw = scale.double() / 2, weight_scale.double() / 2
    bound = x.abs().double().sum(1, keepdim=True) * dw.t() + dx * weight.abs().double().sum(1) + 256 * dx * dw.t()
    assert ((got - expected).abs() <= bound * 1.0001).all()
    assert (got - expected).norm() < 0.02 * expected.norm()


def test_without_k_the_result_is_the_bias_or_zeros() -> None:
    a, b, scale_a, scale_b, bias, _ = product(3, 4, 5)
    a, b = a[:, :0], b[:0]
    assert torch.equal(scaled_mm(a, b, scale_a, scale_b, bias, torch.float32), bias.expand(3, 5))
    assert torch.equal(scaled_mm(a, b, scale_a, scale_b, None, torch.float32), torch.zeros(3, 5))


@pytest.mark.parametrize("int_mm", [True, False])
def test_sums_are_exact_at_the_extremes(int_mm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if int_mm and not module._int_mm_is_exact():
        pytest.skip("torch._int_mm saturates on this CPU")
    monkeypatch.setattr(module, "_int_mm_is_exact", lambda: int_mm)
    for of_a, of_b in ((-128, -128), (127, -128), (127, 127)):
        a = torch.full((2, LARGEST_K), of_a, dtype=torch.int8)
        b = torch.full((LARGEST_K, 3), of_b, dtype=torch.int8)
        assert module._exact_mm(a, b).unique().tolist() == [of_a * of_b * LARGEST_K]
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((7, 5000), (5000, 9)))
    assert torch.equal(module._exact_mm(a[:, ::2], b[::2]), (a[:, ::2].long() @ b[::2].long()).int())
    expanded = a[:1].expand(4, 5000)
    assert torch.equal(module._exact_mm(expanded, b), (expanded.long() @ b.long()).int())


def test_a_product_that_saturates_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(a: Tensor, b: Tensor) -> Tensor:
        """a + 128 times b, each pair added in int16, as oneDNN does before VNNI."""
        pairs = ((a.int() + 128)[:, :, None] * b.int()[None]).view(len(a), -1, 2, b.shape[1]).sum(2)
        return (pairs.clamp(-(2**15), 2**15 - 1).sum(1) - 128 * b.int().sum(0)).int()

    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not module._int_mm_is_exact.__wrapped__()


@pytest.mark.parametrize("shared_memory", [65_536, 101_376, 166_912, 232_448])
def test_tiles_fit_and_keep_the_multiprocessors_busy(shared_memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "device_limits", lambda _: DeviceLimits(shared_memory, 132))
    device = torch.device("meta")
    assert all(tile_for(M, 4096, True, device).shared_memory <= shared_memory for M in (1, 100, 1000, 10**6))
    assert 2 * tile_for(1024, 1024, True, device).count(1024, 1024) >= 132
    assert tile_for(16, 4096, True, device) == module._TILES[-1]
    assert tile_for(10**6, 4096, True, device).m >= 128


@pytest.mark.gpu
@pytest.mark.parametrize("contiguous_b", ["columns", "rows"])
@pytest.mark.parametrize("sizes", [(1, 4096, 4096), (300, 1024, 520), (2048, 1000, 4099), (8192, 4096, 8192)])
def test_large_products_are_exact(sizes: tuple[int, int, int], contiguous_b: str) -> None:
    M, K, N = sizes
    a = torch.randint(-127, 128, (M, K), dtype=torch.int8, device="cuda")
    b = torch.randint(-127, 128, (K, N), dtype=torch.int8, device="cuda")
    scale_a, scale_b = torch.rand(M, 1, device="cuda"), torch.rand(1, N, device="cuda")
    bias = torch.randn(N, device="cuda")
    got = scaled_mm(a, b if contiguous_b == "rows" else b.t().contiguous().t(), scale_a, scale_b, bias, torch.bfloat16)
    sums = (a.double() @ b.double()).float()  # exact in float64
    torch.testing.assert_close(got, (sums * scale_a * scale_b + bias).bfloat16(), rtol=0, atol=0)


@pytest.mark.gpu
def test_operands_of_more_than_two_to_the_31_values() -> None:
    a = torch.zeros(2**20 + 3, 2064, dtype=torch.int8, device="cuda")
    a[-5:] = torch.randint(-127, 128, (5, 2064), dtype=torch.int8, device="cuda")
    b = torch.randint(-127, 128, (32, 2064), dtype=torch.int8, device="cuda").t()
    one = torch.ones(1, 1, device="cuda")
    got = scaled_mm(a, b, one, one, None, torch.float32)
    assert torch.equal(got[-5:], (a[-5:].double() @ b.double()).float())
    assert got[:-5].count_nonzero() == 0
