"""The products of 8-bit matrices, with scales and bias, against float64."""

import mmap
from collections.abc import Callable
from functools import partial
from itertools import product as pairs

import lq_kernels.scaled_mm as module
import lq_kernels.scaled_mm_tile as tile_module
import lq_kernels.scaled_mm_tma as tma_module
import pytest
import torch
from guarded_memory import guarded
from hostile import FLOATS, Arguments, cut_out, heavy_tailed, to_device
from lq_kernels._triton import DeviceLimits
from lq_kernels.element_types import ELEMENT_TYPES
from lq_kernels.rowwise import quantize_columnwise, quantize_rowwise, quantize_tensorwise
from lq_kernels.scaled_mm import LARGEST_K, int8_mm, scaled_mm
from lq_kernels.scaled_mm_tile import HOPPER_TILES, TILES, Tile, launch_tiles, tile_for
from lq_kernels.scaled_mm_tma import FP8_TILES, INT8_TILES, PRECISE_TILES, TmaTile, launch_tma, tma_tile_for
from samples_scaled_mm import FP8, cut_out_fp8, fp8_product, product, sum_bound
from test_op import raises_everywhere
from torch import Tensor

EPSILON = 2.0**-24  # half an ulp of float32, relative
INT8_PAIR = (torch.int8, torch.int8)


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


@pytest.mark.parametrize(
    ("types", "accumulation"),
    [(INT8_PAIR, "fast"), ((FP8[1], FP8[0]), "fast"), ((FP8[0], FP8[1]), "precise")],
    ids=["int8", "fp8", "fp8 precise"],
)
@pytest.mark.parametrize("tile", {(tile.m, tile.n, tile.k): tile for tile in (*HOPPER_TILES, *TILES)}.values(), ids=str)
def test_every_tile_is_exact_where_the_sums_are(
    tile: Tile, accumulation: str, types: tuple[torch.dtype, torch.dtype], device: torch.device
) -> None:
    if device.type != "cpu" and tile.shared_memory > tile_module.device_limits(device).shared_memory:
        pytest.skip("does not fit into the shared memory of this GPU")

    launch = partial(launch_tiles, precise=accumulation == "precise", tile=tile)
    for sizes in ((tile.m + 3, 2 * tile.k, tile.n + 5), (2 * tile.m, tile.k + 1, tile.n)):
        check_launch(launch, small_product(*sizes, types), device)


@pytest.mark.parametrize("types", [INT8_PAIR, (FP8[1], FP8[0])], ids=["int8", "fp8"])
@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tiles of its table are tried there")
def test_the_bulk_copy_path_is_exact_where_the_sums_are(
    parts: int, flatten: bool, types: tuple[torch.dtype, torch.dtype], device: torch.device
) -> None:
    tile = TmaTile(32, 64, 32, 4, 3, parts, flatten, programs=2, step=1.0, alone=1.0, rest=1.0)
    launch = partial(launch_tma, precise=False, tile=tile)
    for out_dtype, sizes in zip((*FLOATS, torch.bfloat16), TMA_SIZES, strict=True):
        a, b, *rest = small_product(*sizes, types)
        a, b = aligned(a), aligned(b.t()).t()
        check_launch(launch, (a, b, *rest[:-1], out_dtype), device)


# One program for all tiles, tails of M, N and K, one step along K, more groups of rows of tiles than one.
TMA_SIZES = [(37, 80, 136), (64, 64, 128), (1, 16, 8), (300, 48, 72)]


def aligned(x: Tensor) -> Tensor:
    """x (rows, K) in rows of a multiple of 16 bytes, longer than K, with values that count if they are read."""
    longer = torch.full((x.shape[0] + 1, (x.shape[1] + 31) // 16 * 16), 3, dtype=torch.int8).view(x.dtype)
    longer[:-1, : x.shape[1]] = x
    return longer[:-1, : x.shape[1]]


def small_product(M: int, K: int, N: int, types: tuple[torch.dtype, torch.dtype]) -> Arguments:
    """Whole numbers so small that every sum of them fits into the 14 bits of an fp8 sum, and scales as everywhere."""
    largest = 1 if K > 128 else 3
    a = cut_out(torch.randint(-largest, largest + 1, (M, K)).float())
    b = cut_out(torch.randint(-largest, largest + 1, (K, N)).float(), "columns")
    if types[0] == torch.int8:
        codes = [x.to(torch.int8) for x in (a, b)]
    else:
        codes = [cut_out_fp8(a.to(types[0])), cut_out_fp8(b.to(types[1]), "columns")]
    _, _, scale_a, scale_b, bias, dtype = product(M, 1, N)
    return *codes, scale_a, scale_b, bias, dtype


@pytest.mark.skipif(torch.cuda.is_available(), reason="of memory that the interpreter reads")
@pytest.mark.parametrize("sizes", [(5, 37, 9), (37, 64, 70), (64, 128, 128)])
def test_kernels_read_nothing_beside_their_operands(sizes: tuple[int, int, int], device: torch.device) -> None:
    for types in (INT8_PAIR, FP8):
        a, b, *rest, dtype = small_product(*sizes, types)
        a, b_transposed, *rest = (guarded(x.contiguous()) for x in (a, b.t(), *rest))
        launches = [partial(launch_tiles, precise=False, tile=tile) for tile in TILES[-2:]]
        if sizes == (64, 128, 128):
            tile = TmaTile(32, 64, 32, 4, 3, 1, True, programs=2, step=1.0, alone=1.0, rest=1.0)
            launches.append(partial(launch_tma, precise=False, tile=tile))
        for launch in launches:
            check_launch(launch, (a, b_transposed.t(), *rest, dtype), device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of memory that nothing is written to")
@pytest.mark.parametrize("path", ["tiles", "bulk copies"])
def test_scales_may_lie_further_apart_than_32_bits_count(path: str, device: torch.device) -> None:
    tile = TmaTile(32, 64, 32, 4, 3, 1, True, programs=2, step=1.0, alone=1.0, rest=1.0)
    way = partial(launch_tma, tile=tile) if path == "bulk copies" else partial(launch_tiles, tile=TILES[-1])
    a, b, scale_a, scale_b, bias, dtype = small_product(72, 48, 80, INT8_PAIR)
    a, b = aligned(a), aligned(b.t()).t()
    scale_a, scale_b = far_apart(scale_a), far_apart(scale_b.t()).t()
    check_launch(partial(way, precise=False), (a, b, scale_a, scale_b, bias, dtype), device)


def far_apart(scale: Tensor, near: int = 64) -> Tensor:
    """The same values (n, 1), those from `near` on 2^31 elements or more behind the first."""
    n, stride = len(scale), 2**31 // near
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE: memory is taken where it is written
    memory = mmap.mmap(-1, 4 * ((n - 1) * stride + 1), flags=flags)
    view = torch.frombuffer(memory, dtype=torch.float32).as_strided((n, 1), (stride, 1))
    return view.copy_(scale)


def check_launch(launch: Callable[..., None], args: Arguments, device: torch.device) -> None:
    """Scaled, scaled without a bias, and, for int8, the sums."""
    a, b, scale_a, scale_b, *_, dtype = args
    cases = [args, (a, b, scale_a[:1], scale_b, None, dtype)]
    results = [(case[:5], scaled_mm.reference(*case)) for case in cases]
    if a.dtype == torch.int8:
        results.append(((a, b, None, None, None), int8_mm.reference(a, b)))
    for operands, expected in results:
        buffer = torch.full((expected.numel() + 64,), 77, dtype=expected.dtype, device=device)
        out = buffer[: expected.numel()].view(expected.shape)
        launch(*(x if device.type == "cpu" else to_device(x, device) for x in operands), out)
        torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0)
        assert (buffer[expected.numel() :] == 77).all(), "it writes beside its result"


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
    for types in (INT8_PAIR, FP8):
        scaled = a[:, :0].to(types[0]), b[:0].to(types[1]), scale_a, scale_b
        assert torch.equal(scaled_mm(*scaled, bias, torch.float32), bias.expand(3, 5))
        assert torch.equal(scaled_mm(*scaled, None, torch.float32), torch.zeros(3, 5))


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
@pytest.mark.parametrize("precise", [True, False])
def test_tiles_fit_and_keep_the_multiprocessors_busy(
    shared_memory: int, precise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile_module, "device_limits", lambda _: DeviceLimits(shared_memory, 132))
    for hopper in (True, False):
        monkeypatch.setattr(tile_module, "is_hopper", lambda _, hopper=hopper: hopper)
        assert all(
            tile_for(*on_meta(M, 4096, 4096), precise).shared_memory <= shared_memory for M in (1, 100, 1000, 10**6)
        )
        assert 2 * tile_for(*on_meta(1024, 512, 1024), precise).count(1024, 1024) >= 132
        assert tile_for(*on_meta(16, 4096, 4096), precise) == TILES[-1]
        assert tile_for(*on_meta(10**6, 4096, 4096), precise).m >= 128
        for odd in ((10**6, 4097, 4096), (10**6, 4096, 4097)):
            assert tile_for(*on_meta(*odd), precise).m <= 64
        assert tile_for(*on_meta(10**6, 4096, 4096), precise).warps == (4 if hopper and not precise else 8)


def on_meta(M: int, K: int, N: int, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    return torch.empty(M, K, dtype=dtype, device="meta"), torch.empty(N, K, dtype=dtype, device="meta").t()


@pytest.fixture
def _on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tma_module, "is_hopper", lambda _: True)
    monkeypatch.setattr(tma_module, "device_limits", lambda _: DeviceLimits(232_448, 132))


def bulk_copied(a: Tensor, b: Tensor, out_dtype: torch.dtype = torch.bfloat16, precise: bool = False) -> TmaTile | None:
    return tma_tile_for(a, b, torch.empty(a.shape[0], b.shape[1], dtype=out_dtype, device="meta"), precise)


@pytest.mark.usefixtures("_on_hopper")
def test_the_bulk_copy_path_takes_what_the_copy_engine_can() -> None:
    a, b = on_meta(1024, 512, 256)
    assert bulk_copied(a, b) in INT8_TILES
    for precise, tiles in ((False, FP8_TILES), (True, PRECISE_TILES)):
        assert bulk_copied(a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), precise=precise) in tiles
    assert bulk_copied(a[:, :500], b[:500]) is not None  # K need not be whole, rows of memory must
    assert bulk_copied(*on_meta(1024, 512, 252)) is None  # rows of the result
    assert bulk_copied(*on_meta(1024, 512, 252), torch.float32) is not None
    assert bulk_copied(*on_meta(1024, 500, 256)) is None
    assert bulk_copied(a, torch.empty(512, 256, dtype=torch.int8, device="meta")) is None
    assert bulk_copied(a.t().contiguous().t(), b) is None
    assert bulk_copied(a[:1].expand(1024, 512), b) is None
    assert bulk_copied(a[:, ::2], b[::2]) is None
    assert bulk_copied(a[:, :0], b[:0]) is None
    assert bulk_copied(*on_meta(16, 512, 256)) is None  # mostly empty tiles
    unaligned = torch.zeros(1024 * 512 + 8, dtype=torch.int8)[8:].view(1024, 512)
    assert bulk_copied(unaligned, torch.zeros(256, 512, dtype=torch.int8).t()) is None
    assert bulk_copied(unaligned[:256], torch.zeros(256, 512, dtype=torch.int8).t()) is None
    assert bulk_copied(torch.zeros(256, 512, dtype=torch.int8), unaligned.t()) is None


def test_the_bulk_copy_path_is_for_hopper() -> None:
    assert tma_tile_for(torch.zeros(64, 64), torch.zeros(64, 64), torch.zeros(64, 64), False) is None


@pytest.mark.usefixtures("_on_hopper")
@pytest.mark.parametrize("tile", [*INT8_TILES, *FP8_TILES, *PRECISE_TILES], ids=str)
def test_bulk_copied_tiles_fit_into_shared_memory(tile: TmaTile) -> None:
    for out_dtype in (torch.bfloat16, torch.float32):
        assert tile.shared_memory(out_dtype) <= 232_448
        assert tile.n // tile.parts_of(out_dtype) >= 64
    assert tile.programs * tile.shared_memory(torch.bfloat16) <= 232_448
    assert tile.parts_of(torch.float32) <= 2  # as many as the kernel can


@pytest.mark.usefixtures("_on_hopper")
def test_the_bulk_copied_tile_is_the_fastest_of_its_table() -> None:
    wide, pair, low = FP8_TILES
    for (M, N, K), tile in {(8192, 8192, 8192): wide, (32768, 1024, 4096): pair, (512, 4096, 4096): low}.items():
        a, b = (x.to(torch.float8_e4m3fn) for x in on_meta(M, K, N))
        assert bulk_copied(a, b) == tile
    assert bulk_copied(*on_meta(8192, 8192, 8192)) == INT8_TILES[0]
    assert bulk_copied(*on_meta(32768, 768, 768)) == INT8_TILES[1]
    # A multiprocessor has 1 tile, then 3 of which 2 share a round.
    assert wide.time(128 * 132, 256, 1280, 132) == pytest.approx(10 * wide.step + wide.rest)
    assert pair.time(128 * 132, 384, 1280, 132) == pytest.approx(10 * (pair.step + pair.alone) + 2 * pair.rest)


def test_sums_of_int8_are_exact() -> None:
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((37, 5000), (5000, 9)))
    got = int8_mm(a, b)
    assert got.dtype == torch.int32
    assert torch.equal(got, (a.long() @ b.long()).int())
    assert int8_mm(a[:, :0], b[:0]).count_nonzero() == 0


@pytest.mark.parametrize("types", list(pairs(FP8, FP8)), ids=str)
@pytest.mark.parametrize("K", [1, 37, 1000])
def test_products_of_fp8_are_those_of_its_values(K: int, types: tuple[torch.dtype, torch.dtype]) -> None:
    a, b, scale_a, scale_b, bias, _ = fp8_product(5, K, 9, types)
    got = scaled_mm(a, b, scale_a, scale_b, bias, torch.float32)
    scaled = (a.double() @ b.double()) * scale_a.double() * scale_b.double()
    magnitude = (a.double().abs() @ b.double().abs()) * scale_a.double() * scale_b.double()
    # The products of two codes are exact in float32; each of K sums rounds, then the epilogue as for int8.
    bound = (K + 2) * EPSILON * magnitude + EPSILON * (scaled + bias.double()).abs()
    assert ((got.double() - scaled - bias.double()).abs() <= bound * 1.001).all()


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_a_linear_quantized_to_fp8_is_close_to_the_exact_one(dtype: torch.dtype) -> None:
    x, weight = heavy_tailed(37, 256), torch.randn(100, 256)
    element = ELEMENT_TYPES[dtype]
    exact = x.double() @ weight.double().t()
    magnitude = x.double().abs() @ weight.double().abs().t()
    for weights in (quantize_columnwise(weight.t(), dtype), quantize_tensorwise(weight.t(), dtype)):
        codes, scale = quantize_rowwise(x, dtype)
        got = scaled_mm(codes, weights[0], scale, weights[1], None, torch.float32)
        # Each operand is off by at most 2^-(mantissa + 1) of itself, or half a step of the subnormal codes.
        step = element.smallest_normal * 2.0**-element.mantissa
        relative = 2 * 2.0 ** -(element.mantissa + 1) * magnitude
        flushed = step * (scale * weight.abs().sum(1) + weights[1] * x.abs().sum(1, keepdim=True))
        assert ((got - exact).abs() <= 1.1 * (relative + flushed)).all()
        assert (got - exact).norm() < 2.0 ** -(element.mantissa + 1) * exact.norm()


def test_wrong_operands_are_errors() -> None:
    a, b, scale_a, scale_b, bias, dtype = fp8_product(3, 4, 5, (FP8[0], FP8[1]))
    arguments = {"a": a, "b": b, "scale_a": scale_a, "scale_b": scale_b, "bias": bias, "out_dtype": dtype}
    scaled_mm(**arguments)
    for change, error in [
        ({"b": b.view(torch.int8)}, TypeError),
        ({"a": a.float()}, TypeError),
        ({"a": a.view(torch.float8_e4m3fnuz)}, TypeError),
        ({"a": a[:, :3]}, ValueError),
        ({"accumulation": "exact"}, ValueError),
        ({"out_dtype": torch.int32}, TypeError),
    ]:
        raises_everywhere(scaled_mm, arguments | change, error)
    codes = torch.zeros(3, 4, dtype=torch.int8)
    for change, error in [
        ({"a": codes.float()}, TypeError),
        ({"b": codes.t().to(torch.uint8)}, TypeError),
        ({"b": codes}, ValueError),
        ({"a": codes[0]}, ValueError),
        ({"b": codes.t().to("meta")}, ValueError),
        ({"a": torch.zeros(1, LARGEST_K + 1, dtype=torch.int8), "b": torch.zeros(LARGEST_K + 1, 1).char()}, ValueError),
    ]:
        raises_everywhere(int8_mm, {"a": codes, "b": codes.t(), **change}, error)


def test_fake_results_of_fp8_are_like_the_real_ones(device: torch.device) -> None:
    for types, dtype in zip(pairs(FP8, FP8), (*FLOATS, torch.bfloat16), strict=True):
        args = tuple(to_device(x, device) for x in fp8_product(5, 37, 9, types, dtype))
        for accumulation in ("fast", "precise"):
            tests = ("test_faketensor", "test_autograd_registration")
            torch.library.opcheck(scaled_mm.overload, (*args, accumulation), test_utils=tests)


def test_compiled_products_give_what_they_give_in_eager() -> None:
    def both(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        (codes, scale), (w_codes, w_scale) = quantize_rowwise(x, FP8[1]), quantize_rowwise(weight, FP8[0])
        sums = int8_mm(quantize_rowwise(x)[0], quantize_rowwise(weight)[0].t())
        return scaled_mm(codes, w_codes.t(), scale, w_scale.t(), None, torch.bfloat16, "precise"), sums

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (5, 7):
        args = torch.randn(tokens, 37), torch.randn(11, 37)
        torch.testing.assert_close(compiled(*args), both(*args), rtol=0, atol=0)


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


hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("types", [INT8_PAIR, *pairs(FP8, FP8)], ids=str)
@pytest.mark.parametrize("tile", [*INT8_TILES, *FP8_TILES, *PRECISE_TILES], ids=str)
def test_bulk_copied_tiles_are_exact_where_the_sums_are(
    tile: TmaTile, types: tuple[torch.dtype, torch.dtype], device: torch.device
) -> None:
    launch = partial(launch_tma, precise=tile in PRECISE_TILES, tile=tile)
    for out_dtype, sizes in zip(FLOATS, ((1000, 336, 520), (128, 80, 5000), (5000, 1040, 264)), strict=True):
        a, b, *rest = small_product(*sizes, types)
        a, b = aligned(a), aligned(b.t()).t()
        check_launch(launch, (a, b, *rest[:-1], out_dtype), device)


@pytest.mark.gpu
@hopper
def test_both_paths_give_the_same_bits_for_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.randint(-127, 128, (4096, 2048), dtype=torch.int8, device="cuda")
    b = torch.randint(-127, 128, (3072, 2048), dtype=torch.int8, device="cuda").t()
    scale_a, scale_b = torch.rand(4096, 1, device="cuda"), torch.rand(1, 3072, device="cuda")
    bulk_copied = scaled_mm(a, b, scale_a, scale_b, scale_b[0], torch.bfloat16), int8_mm(a, b)
    monkeypatch.setattr(module, "tma_tile_for", lambda *_: None)
    tiled = scaled_mm(a, b, scale_a, scale_b, scale_b[0], torch.bfloat16), int8_mm(a, b)
    assert all(torch.equal(*results) for results in zip(bulk_copied, tiled, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("types", list(pairs(FP8, FP8)), ids=str)
@pytest.mark.parametrize("sizes", [(64, 4096, 128), (60, 4100, 121)])
def test_fp8_sums_are_within_their_bound(sizes: tuple[int, int, int], types: tuple[torch.dtype, torch.dtype]) -> None:
    args = fp8_product(*sizes, types)
    for accumulation in ("fast", "precise"):
        sums, errors = sum_bound(args[0].double(), args[1].double(), accumulation)
        a, b, one = (to_device(x, torch.device("cuda")) for x in (*args[:2], torch.ones(1, 1)))
        got = scaled_mm(a, b, one, one, None, torch.float32, accumulation).cpu()
        assert ((got - sums).abs() <= errors).all()


@pytest.mark.gpu
@hopper
def test_precise_sums_are_closer_than_fast_ones() -> None:
    a = torch.rand(256, 8192, device="cuda").to(FP8[0])
    b = torch.rand(256, 8192, device="cuda").to(FP8[0]).t()
    one, exact = torch.ones(1, 1, device="cuda"), a.double() @ b.double()
    fast, precise = (
        (scaled_mm(a, b, one, one, None, torch.float32, accumulation) - exact).norm()
        for accumulation in ("fast", "precise")
    )
    assert precise < fast / 4


@pytest.mark.gpu
def test_operands_of_more_than_two_to_the_31_values() -> None:
    a = torch.zeros(2**20 + 3, 2064, dtype=torch.int8, device="cuda")
    a[-5:] = torch.randint(-127, 128, (5, 2064), dtype=torch.int8, device="cuda")
    b = torch.randint(-127, 128, (32, 2064), dtype=torch.int8, device="cuda").t()
    one = torch.ones(1, 1, device="cuda")
    got = scaled_mm(a, b, one, one, None, torch.float32)
    assert torch.equal(got[-5:], (a[-5:].double() @ b.double()).float())
    assert got[:-5].count_nonzero() == 0
