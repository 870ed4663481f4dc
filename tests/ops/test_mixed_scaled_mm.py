"""The product of LLM.int8() and the rescaling of int32 sums, against float64."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import lq_kernels.mixed_scaled_mm_tile as tile_module
import lq_kernels.mixed_scaled_mm_tma as tma_module
import pytest
import torch
from guarded_memory import guarded, new_tensors_guarded
from hostile import FLOATS, heavy_tailed, to_device
from lq_kernels._triton import device_limits
from lq_kernels.mixed_scaled_mm import mixed_scaled_mm
from lq_kernels.outliers import quantize_rowwise_outliers
from lq_kernels.rescale_int32 import rescale_int32
from lq_kernels.rowwise import quantize_rowwise
from lq_kernels.scaled_mm import int8_mm, scaled_mm
from lq_kernels.scaled_mm_tile import HOPPER_TILES, TILES, Tile, is_hopper
from lq_kernels.scaled_mm_tma import TmaTile
from samples_outliers import THRESHOLD, mixed_product, mixed_product_bound, scaled_sums, with_outliers
from test_scaled_mm import far_apart
from torch import Tensor

EPSILON = 2.0**-24  # half an ulp of float32, relative


def llm_int8(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    weight_codes, weight_scale = quantize_rowwise(weight)
    codes, scale, columns, count = quantize_rowwise_outliers(x, threshold)
    return mixed_scaled_mm(x, codes, scale, weight_codes, weight_scale, columns, count, bias, x.dtype)


def exact(args: tuple) -> Tensor:
    """The formula in float64, column by column."""
    x, codes, scale, weight_codes, weight_scale, columns, count, bias, _ = args
    weight = weight_codes.double() * weight_scale.double()
    out = (codes.double() * scale.double()) @ weight.t()
    rounded = (weight_codes.float() * weight_scale).to(x.dtype).double()
    for k in columns.tolist()[: int(count)]:
        out += x[:, k, None].double() * rounded[None, :, k]
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 37, 9), (40, 1000, 33), (3, 64, 130)])
def test_products_are_those_of_float64_up_to_their_bound(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    args = mixed_product(*sizes, dtype)
    error = (mixed_scaled_mm(*args).double() - exact(args)).abs()
    assert (error <= mixed_product_bound(*args)).all()


def test_without_outliers_it_is_the_scaled_product_to_the_bit() -> None:
    x, codes, scale, weight_codes, weight_scale, columns, count, bias, dtype = mixed_product(37, 100, 50, threshold=1e9)
    assert count.item() == 0
    got = mixed_scaled_mm(x, codes, scale, weight_codes, weight_scale, columns, count, bias, dtype)
    expected = scaled_mm(codes, weight_codes.t(), scale, weight_scale.t(), bias, dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_linear_with_outliers_loses_what_int8_loses_without_them() -> None:
    inliers = torch.randn(64, 512).clamp(-5, 5)
    weight = torch.randn(128, 512) / 512**0.5
    x = inliers.clone()
    x[:, [7, 100, 300]] *= 60
    plain_codes, plain_scale = quantize_rowwise(x)
    weight_codes, weight_scale = quantize_rowwise(weight)
    plain = scaled_mm(plain_codes, weight_codes.t(), plain_scale, weight_scale.t(), None, torch.float32)

    def error(got: Tensor, of: Tensor) -> float:
        return (got.double() - of.double() @ weight.double().t()).norm().item()

    of_inliers = error(llm_int8(inliers, weight, None, 1e9), inliers)
    # The outlier columns see the rounding of the weight only, but with their size.
    weight_error = (weight.double() - weight_codes.double() * weight_scale.double())[:, [7, 100, 300]]
    of_outliers = (x[:, [7, 100, 300]].double() @ weight_error.t()).norm().item()
    got = error(llm_int8(x, weight, None, THRESHOLD), x)
    assert got < 1.1 * (of_inliers**2 + of_outliers**2) ** 0.5
    assert got < 0.2 * error(plain, x)


@pytest.mark.parametrize("threshold", [THRESHOLD, 2.5])
def test_the_chain_stays_within_the_published_tolerance_of_a_half_precision_product(threshold: float) -> None:
    x, weight = torch.randn(64, 64).half(), torch.nn.init.xavier_uniform_(torch.empty(512, 64)).half()
    got = llm_int8(x, weight, None, threshold)
    torch.testing.assert_close(got, (x.float() @ weight.float().t()).half(), atol=0.025, rtol=0.05)


def test_a_row_with_a_nan_or_an_infinity_shows_it_and_no_other_row_does() -> None:
    x, weight = torch.randn(5, 40).clamp(-3, 3), torch.randn(8, 40)
    clean = llm_int8(x, weight, None, THRESHOLD)
    x[1, 3], x[3, 5] = float("nan"), float("inf")
    got = llm_int8(x, weight, None, THRESHOLD)
    assert not got[[1, 3]].isfinite().any()
    # Column 5 is multiplied in floats now, which differs by the rounding of its values.
    torch.testing.assert_close(got[[0, 2, 4]], clean[[0, 2, 4]], atol=0.05, rtol=0.05)


def test_nothing_but_the_listed_columns_is_read_of_the_list() -> None:
    args = list(mixed_product(20, 30, 10))
    expected = mixed_scaled_mm.reference(*args)
    columns, count = args[5].clone(), args[6]
    columns[int(count) :] = -5
    args[5] = columns
    assert mixed_scaled_mm.launcher is not None
    if not torch.cuda.is_available():
        torch.testing.assert_close(mixed_scaled_mm.launcher(*args), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed_scaled_mm(*args), expected, rtol=0, atol=0)


def within_bound(got: Tensor, args: tuple) -> bool:
    reference = mixed_scaled_mm.reference(*args).double()
    return bool(((got.cpu().double() - reference).abs() <= mixed_product_bound(*args)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tile", list(dict.fromkeys(HOPPER_TILES + TILES)), ids=str)
def test_every_tile_gives_the_result_of_the_reference(
    tile: Tile, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type != "cpu" and tile.shared_memory > device_limits(device).shared_memory:
        pytest.skip("does not fit into the shared memory of this GPU")
    monkeypatch.setattr(tile_module, "tile_for", lambda *_, **__: tile)
    monkeypatch.setattr("lq_kernels.mixed_scaled_mm.mixed_tile_for", lambda *_, **__: None)
    for sizes in ((tile.m + 3, 2 * tile.k, tile.n + 5), (2 * tile.m, tile.k + 1, tile.n)):
        args = mixed_product(*sizes, dtype)
        assert mixed_scaled_mm.launcher is not None
        assert within_bound(mixed_scaled_mm.launcher(*(to_device(arg, device) for arg in args)), args)


@pytest.mark.parametrize(
    ("outliers", "out_dtype"),
    [
        (0, torch.float16),
        (1, torch.float16),
        (3, torch.float32),
        (17, torch.float16),
        (33, torch.float16),
        (40, torch.float16),
    ],
)
@pytest.mark.parametrize("tile", tma_module.TILES, ids=lambda tile: f"{tile.m} x {tile.n}")
def test_every_tile_of_hopper_gives_the_result_of_the_reference(
    tile: TmaTile, outliers: int, out_dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tma_module, "_LIMIT", 32)  # the others find no room
    if device.type != "cpu" and not is_hopper(device):
        pytest.skip("not a Hopper GPU")
    x = torch.randn(tile.m + 70, 3 * tile.k + 16).clamp(-5, 5)
    x[5, :outliers] = 9
    *operands, bias, _ = mixed_product(len(x), x.shape[1], 2 * tile.n + 16, x=x.half())
    x, codes, scale, weight_codes, weight_scale, columns, count = (operand.contiguous() for operand in operands)
    if outliers in (3, 40):
        x, weight_scale = x.t().contiguous().t(), weight_scale[:1]
    elif device.type == "cpu":
        weight_scale = far_apart(weight_scale, near=2 * tile.n)
    args: tuple[Any, ...] = (x, codes, scale, weight_codes, weight_scale, columns, count, bias, out_dtype)
    out = torch.full((len(x), len(weight_codes)), float("nan"), dtype=out_dtype, device=device)
    launch: Any = tma_module.launch_mixed_tma
    place = (
        (lambda arg: arg if arg is weight_scale else guarded(arg))
        if device.type == "cpu"
        else partial(to_device, device=device)
    )
    with new_tensors_guarded() if device.type == "cpu" else nullcontext():  # the room for outliers too
        launch(*(place(arg) for arg in args[:-1]), out, tile)
    assert count.item() == outliers
    assert within_bound(out, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_linear_gives_what_it_gives_in_eager(dynamic: bool) -> None:
    compiled = torch.compile(llm_int8, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for tokens in (5, 6, 1):
        args = with_outliers(tokens, 37), torch.randn(11, 37), torch.randn(11), THRESHOLD
        torch.testing.assert_close(compiled(*args), llm_int8(*args), rtol=0, atol=0)


NAMES = ("x", "codes", "scale", "weight_codes", "weight_scale", "columns", "count", "bias", "out_dtype")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(37)}, ValueError, "x and codes"),
        ({"x": torch.zeros(37, 99)}, ValueError, "weight_codes"),
        ({"x": torch.zeros(37, 100, dtype=torch.float64)}, ValueError, "takes x"),
        ({"codes": torch.zeros(36, 100, dtype=torch.int8)}, ValueError, "codes"),
        ({"codes": torch.zeros(37, 100)}, ValueError, "takes codes"),
        ({"scale": torch.zeros(1, 37)}, ValueError, "takes scale"),
        ({"scale": torch.zeros(37, 1, dtype=torch.float64)}, ValueError, "takes scale"),
        ({"weight_codes": torch.zeros(9, 100, dtype=torch.uint8)}, ValueError, "takes weight_codes"),
        ({"weight_scale": torch.zeros(1, 9)}, ValueError, "takes weight_scale"),
        ({"columns": torch.zeros(99, dtype=torch.int32)}, ValueError, "takes columns"),
        ({"columns": torch.zeros(100, dtype=torch.int64)}, ValueError, "takes columns"),
        ({"count": torch.zeros((), dtype=torch.int32)}, ValueError, "takes count"),
        ({"bias": torch.zeros(8)}, ValueError, "takes bias"),
        ({"bias": torch.zeros(9, dtype=torch.int32)}, ValueError, "takes bias"),
        ({"bias": torch.zeros(9, device="meta")}, ValueError, "one device"),
        ({"out_dtype": torch.float64}, TypeError, "float64"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change: dict, error: type[Exception], message: str) -> None:
    args = dict(zip(NAMES, mixed_product(37, 100, 9), strict=True)) | change
    assert mixed_scaled_mm.launcher is not None
    for function in (mixed_scaled_mm, mixed_scaled_mm.launcher):
        with pytest.raises(error, match=message):
            function(*args.values())


def test_more_products_than_int32_holds_are_refused() -> None:
    x, codes, weight = torch.zeros(1, 131_072), *torch.zeros(2, 1, 131_072, dtype=torch.int8)
    columns, count = torch.zeros(131_072, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="split K"):
        mixed_scaled_mm(x, codes, torch.ones(1, 1), weight, torch.ones(1, 1), columns, count, None, torch.float32)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rescaled_sums_are_those_of_float64_up_to_their_roundings(dtype: torch.dtype) -> None:
    total, row_scale, column_scale = scaled_sums(37, 100)
    bias = torch.randn(100)
    scaled = total.double() * row_scale.double() * column_scale.double()
    expected = scaled + bias.double()
    bound = 3 * EPSILON * scaled.abs() + (EPSILON + torch.finfo(dtype).eps / 2) * expected.abs()
    bound += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((rescale_int32(total, row_scale, column_scale, bias, dtype) - expected).abs() <= bound * 1.02).all()


def test_the_factor_of_two_int8_scales_is_one_over_16129() -> None:
    """A constant with a wrong digit, 6.200124e-5, would be off by 1.8e-5."""
    scale = torch.ones(1, 1) / 127
    got = rescale_int32(torch.tensor([[16129, 1, 16129 * 1000]], dtype=torch.int32), scale, scale, None, torch.float32)
    expected = torch.tensor([[1, 1 / 16129, 1000]], dtype=torch.float64)
    assert ((got - expected).abs() <= 4 * EPSILON * expected).all()


def test_sums_beyond_two_to_the_24_are_exact_until_they_are_rescaled() -> None:
    total = int8_mm(torch.full((1, 1041), 127, dtype=torch.int8), torch.full((1041, 1), 127, dtype=torch.int8))
    assert total.item() == 16_790_289  # odd, which float32 is not from 2^24 on
    one = torch.ones(1, 1)
    assert rescale_int32(total, one, one, None, torch.float32).item() == 16_790_288
    assert rescale_int32(total + 2, one, one, None, torch.float32).item() == 16_790_292  # a tie, to even


def test_a_result_that_float16_cannot_hold_survives_in_bfloat16_and_float32() -> None:
    total, scale = torch.full((1, 1), 2**30, dtype=torch.int32), torch.full((1, 1), 1.0)
    assert rescale_int32(total, scale, scale, None, torch.float16).isinf().all()
    assert rescale_int32(total, scale, scale, None, torch.bfloat16).item() == 2**30
    assert rescale_int32(total, scale, scale, None, torch.float32).item() == 2**30


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"total": torch.zeros(37, dtype=torch.int32)}, ValueError),
        ({"total": torch.zeros(37, 100)}, ValueError),
        ({"row_scale": torch.zeros(37)}, ValueError),
        ({"row_scale": torch.zeros(1, 37)}, ValueError),
        ({"column_scale": torch.zeros(100, 1)}, ValueError),
        ({"column_scale": torch.zeros(1, 100, dtype=torch.float64)}, ValueError),
        ({"bias": torch.zeros(99)}, ValueError),
        ({"bias": torch.zeros(100, dtype=torch.int32)}, ValueError),
        ({"bias": torch.zeros(100, device="meta")}, ValueError),
        ({"out_dtype": torch.int8}, TypeError),
    ],
)
def test_sums_and_scales_that_do_not_fit_are_refused(change: dict, error: type[Exception]) -> None:
    total, row_scale, column_scale = scaled_sums(37, 100)
    args = {"total": total, "row_scale": row_scale, "column_scale": column_scale, "bias": None} | change
    args.setdefault("out_dtype", torch.float32)
    assert rescale_int32.launcher is not None
    for function in (rescale_int32, rescale_int32.launcher):
        with pytest.raises(error):
            function(**args)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("outliers", [0, 5, 100])
@pytest.mark.parametrize("sizes", [(1, 4096, 4096), (300, 1024, 520), (2048, 1000, 4099), (4096, 4096, 8192)])
def test_large_products_on_a_gpu(sizes: tuple[int, int, int], outliers: int, dtype: torch.dtype) -> None:
    M, K, N = sizes
    x = heavy_tailed(M, K).clamp(-5, 5)
    x[0, torch.randperm(K)[:outliers]] = 30
    x = x.to("cuda", dtype)
    codes, scale, columns, count = quantize_rowwise_outliers(x, THRESHOLD)
    weight_codes, weight_scale = quantize_rowwise(torch.randn(N, K, device="cuda"))
    args = (x, codes, scale, weight_codes, weight_scale, columns, count, torch.randn(N, device="cuda"), dtype)
    error = (mixed_scaled_mm(*args).double() - exact(args)).abs()
    assert count.item() == outliers
    assert (error <= mixed_product_bound(*args)).all()
