"""Quantisation by row, column and matrix, against values worked out by hand and against its error bound."""

from itertools import product as pairs
from typing import Any

import lq_kernels.rowwise_tiles as tiles
import pytest
import torch
from guarded_memory import guarded
from hostile import FLOATS, cut_out, heavy_tailed, to_device
from lq_kernels._op import Op
from lq_kernels.element_types import E4M3, E5M2, ELEMENT_TYPES, INT8
from lq_kernels.rowwise import (
    quantize_columnwise,
    quantize_columnwise_transposed,
    quantize_rowwise,
    quantize_tensorwise,
    quantize_tensorwise_transposed,
)
from lq_kernels.rowwise_rows import launch_rows
from lq_kernels.rowwise_tiles import launch_columns, launch_matrix
from samples_rowwise import rounded_past, to_fp8
from test_op import raises_everywhere
from torch import Tensor

OPS = [
    quantize_rowwise,
    quantize_columnwise,
    quantize_columnwise_transposed,
    quantize_tensorwise,
    quantize_tensorwise_transposed,
]
FP8 = [E4M3.dtype, E5M2.dtype]
every_type = pytest.mark.parametrize("dtype", list(ELEMENT_TYPES), ids=str)


def exactly_equal(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """To the bit: two zeros of different sign are different codes."""
    for value, reference in zip(got, expected, strict=True):
        assert value.dtype == reference.dtype
        if value.dtype.itemsize == 1:
            value, reference = value.view(torch.uint8), reference.view(torch.uint8)
        torch.testing.assert_close(value, reference, rtol=0, atol=0, equal_nan=True)


def seeded(seed: int) -> tuple[str, Tensor]:
    return "stochastic", torch.tensor([seed])


def test_int8_codes_of_a_row_worked_out_by_hand() -> None:
    codes, scale = quantize_rowwise(torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5, 63.4], [0, 2, -1, 0, 0, 0, 0.01]]))
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, 63], [0, 127, -64, 0, 0, 0, 1]]  # -63.5 and 0.635
    assert scale.tolist() == [[1], [torch.tensor(2 / 127).item()]]


def test_e4m3_codes_of_a_row_worked_out_by_hand() -> None:
    step = 2.0**-9  # of subnormal codes
    row = torch.tensor([[448, 1.0625, 1.1875, -1.07, step, step / 2, 1.5 * step, -0.4 * step, 420, 18.9]])
    codes, scale = quantize_rowwise(row, E4M3.dtype)
    assert codes.float().tolist() == [[448, 1.0, 1.25, -1.125, step, 0, 2 * step, 0, 416, 18]]
    assert scale.tolist() == [[1]]


def test_e5m2_codes_of_a_row_worked_out_by_hand() -> None:
    step = 2.0**-16  # of subnormal codes
    row = torch.tensor([[57344, 1.125, 1.375, -1.2, step, step / 2, 1.5 * step, -0.4 * step, 53000, 18.9]])
    codes, scale = quantize_rowwise(row / 4, E5M2.dtype)
    assert codes.float().tolist() == [[57344, 1.0, 1.5, -1.25, step, 0, 2 * step, 0, 49152, 20]]
    assert scale.tolist() == [[0.25]]


@every_type
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("op", [quantize_rowwise, quantize_columnwise, quantize_tensorwise])
def test_values_come_back_within_a_step(
    op: Op[..., Any], rounding: str, x_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    x = heavy_tailed(37, 1000, x_dtype)
    codes, scale = op(x, dtype) if rounding == "nearest" else op(x, dtype, *seeded(7))
    element = ELEMENT_TYPES[dtype]
    exact = x.double() / scale.double().where(scale > 0, 1.0)
    # The distance of neighbouring codes: 1, or that of the binade; a value just below a binade may round into it.
    step = torch.exp2(exact.abs().clamp(min=element.smallest_normal).log2().floor() - element.mantissa)
    step = torch.ones_like(step) if dtype == torch.int8 else step
    # Three roundings: factor, product and scale.
    bound = step * (0.5 if rounding == "nearest" else 1.0) + 3 * exact.abs() * 2.0**-24
    assert ((codes.double() - exact).abs() <= bound)[(scale > 0).expand_as(exact)].all()
    assert codes.float().abs().amax() == element.largest


@every_type
def test_the_largest_value_of_each_row_gets_the_largest_code(dtype: torch.dtype) -> None:
    x = heavy_tailed(200, 33)[:-1]
    codes, _ = quantize_rowwise(x, dtype)
    largest = x.abs().argmax(dim=1, keepdim=True)
    expected = ELEMENT_TYPES[dtype].largest * x.gather(1, largest).sign()
    torch.testing.assert_close(codes.float().gather(1, largest), expected, rtol=0, atol=0)


@every_type
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_ops_agree_about_a_matrix_and_its_transpose(x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    x = cut_out(heavy_tailed(37, 130, x_dtype))
    exactly_equal(quantize_columnwise_transposed(x, dtype), quantize_rowwise(x.t(), dtype))
    exactly_equal(quantize_tensorwise_transposed(x, dtype), quantize_tensorwise(x.t(), dtype))
    for options in ((dtype,), (dtype, *seeded(3))):
        for op, transposed in (
            (quantize_columnwise, quantize_columnwise_transposed),
            (quantize_tensorwise, quantize_tensorwise_transposed),
        ):
            codes, scale = op(x, *options)
            exactly_equal(transposed(x, *options), (codes.t().contiguous(), scale.t()))


@every_type
def test_zero_rows_have_scale_zero_and_codes_zero(dtype: torch.dtype) -> None:
    codes, scale = quantize_rowwise(torch.tensor([[0.0, -0.0], [1, 2]]), dtype)
    assert codes.view(torch.uint8)[0].tolist() == [0, 0]
    assert scale[0].item() == 0
    assert quantize_tensorwise(torch.zeros(2, 3), dtype)[1].item() == 0
    assert quantize_columnwise(torch.tensor([[0.0, 1.0]]), dtype, *seeded(1))[1][0, 0] == 0


@every_type
@pytest.mark.parametrize("options", [(), seeded(5)], ids=["nearest", "stochastic"])
def test_a_row_that_is_not_finite_poisons_itself_only(dtype: torch.dtype, options: tuple[Any, ...]) -> None:
    x = torch.randn(4, 9).flip(0)
    clean = quantize_rowwise(x, dtype, *options)
    x[2, 3], x[3, 5] = float("nan"), -float("inf")
    codes, scale = quantize_rowwise(x, dtype, *options)
    assert codes[2:].float().count_nonzero() == 0
    assert scale[2].isnan()
    assert scale[3] == float("inf")
    assert (codes[2:].float() * scale[2:]).isnan().all()
    exactly_equal((codes[:2], scale[:2]), (clean[0][:2], clean[1][:2]))


@every_type
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrices_give_empty_codes_and_zero_scales(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, columns = shape
    for quantize, codes_shape, scale in [
        (quantize_rowwise, (rows, columns), torch.zeros(rows, 1)),
        (quantize_columnwise, (rows, columns), torch.zeros(1, columns)),
        (quantize_columnwise_transposed, (columns, rows), torch.zeros(columns, 1)),
        (quantize_tensorwise, (rows, columns), torch.zeros(1, 1)),
        (quantize_tensorwise_transposed, (columns, rows), torch.zeros(1, 1)),
    ]:
        codes, got = quantize(torch.empty(shape), dtype)
        assert codes.shape == codes_shape
        assert codes.dtype == dtype
        assert torch.equal(got, scale)


DRAWS = 4000


@every_type
@pytest.mark.parametrize("op", [quantize_rowwise, quantize_columnwise, quantize_tensorwise])
def test_stochastic_codes_mean_the_value(op: Op[..., Any], dtype: torch.dtype) -> None:
    """Rows that repeat the same values draw different bits, so that they are draws of their rounding."""
    element = ELEMENT_TYPES[dtype]
    values = torch.cat([torch.randn(30), torch.randn(30) / 1000, torch.tensor([3.5, -3.5, 0.0])])
    largest = torch.full((1, len(values)), 3.5)  # the amax of each row, of each column, and of the matrix
    codes, scale = op(torch.cat([values.repeat(DRAWS, 1), largest]), dtype, *seeded(11))
    assert len(scale.unique()) == 1
    codes, scale = codes[:-1].double(), scale.flatten()[0].double()
    exact = values.double() * element.largest / 3.5
    step = torch.exp2(exact.abs().clamp(min=element.smallest_normal).log2().floor() - element.mantissa)
    step = torch.ones_like(step) if dtype == torch.int8 else step
    # A draw is one of two neighbours, so its deviation is at most half a step; six times that of the mean of all.
    # The factor, the product and the scale round once each.
    bound = (6 * 0.5 * DRAWS**-0.5 * step + 3 * 2.0**-24 * exact.abs()) * scale
    assert ((codes.mean(0) * scale - values).abs() <= bound).all()
    assert (codes.std(0) > 0.1 * step).double().mean() > 0.5  # the others lie close to a code


@every_type
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_values_that_are_codes_are_exact_whatever_the_seed(op: Op[..., Any], dtype: torch.dtype) -> None:
    element = ELEMENT_TYPES[dtype]
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    codes = codes[codes.isfinite() & (codes.abs() <= element.largest)]
    # Each row, each column and the matrix has the largest code.
    x = torch.stack([codes.roll(i) for i in range(len(codes))]) / 8
    for seed in (0, 1, -(2**40)):
        got, scale = op(x, dtype, *seeded(seed))
        assert (scale == 0.125).all()
        assert torch.equal(got.float() / 8, x.t() if "transposed" in op.name else x)


@every_type
def test_stochastic_rounding_never_passes_the_largest_code(dtype: torch.dtype) -> None:
    element = ELEMENT_TYPES[dtype]
    amax = rounded_past(element.largest)
    words = torch.tensor([0, 1, 2**31, 2**32 - 2, 2**32 - 1])
    for sign in (1, -1):
        codes, _ = element.quantize((sign * amax).expand(5), amax, words)
        assert (codes.float() == sign * element.largest).all()


def test_random_bits_depend_on_the_seed_and_the_place_only() -> None:
    x = torch.rand(64, 96)
    codes, _ = quantize_tensorwise(x, torch.int8, *seeded(1))
    exactly_equal((quantize_tensorwise(x, torch.int8, *seeded(1))[0],), (codes,))
    exactly_equal((quantize_tensorwise(x.view(96, 64), torch.int8, *seeded(1))[0].view(64, 96),), (codes,))
    exactly_equal((quantize_tensorwise(x.t().contiguous().t(), torch.int8, *seeded(1))[0],), (codes,))
    other, _ = quantize_tensorwise(x, torch.int8, *seeded(2))
    # Two draws of a fraction p differ with probability 2 p (1 - p): a third for uniform p, six deviations around it.
    different = (codes != other).double().mean().item()
    assert abs(different - 1 / 3) < 6 * (x.numel() * 9 / 2) ** -0.5


@pytest.mark.parametrize("options", [(torch.int8,), (torch.int8, *seeded(9)), (E4M3.dtype, *seeded(9))])
def test_programs_that_take_several_tiles_miss_none(
    options: tuple[Any, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_PARTIALS", 3)
    monkeypatch.setattr(tiles, "_PARTIALS_OF_COLUMN", 2)
    monkeypatch.setattr(tiles, "_PROGRAMS", 5)
    for rows in (280, 283):  # four rows at a time where codes are transposed, and not
        x = heavy_tailed(rows, 150).flip(0)  # the zeros first
        for op in OPS[1:]:
            assert op.launcher is not None
            codes, scale = op.launcher(to_device(cut_out(x), device), *(to_device(o, device) for o in options))
            exactly_equal((codes.cpu(), scale.cpu()), op.reference(x, *options))


@pytest.mark.parametrize("shape", [(5, 37), (37, 5), (132, 70), (2, 33000)])
def test_kernels_write_nothing_beside_their_results(shape: tuple[int, int], device: torch.device) -> None:
    M, N = shape
    x = to_device(cut_out(torch.randn(M, N)), device)
    for launch, scales in ((launch_rows, M), (launch_columns, N), (launch_matrix, 1)):
        for transposed in (False, True) if launch is not launch_rows else (False,):
            codes_buffer = torch.full((M * N + 64,), 77, dtype=torch.int8, device=device)
            scale_buffer = torch.full((scales + 64,), 77.0, device=device)
            codes = codes_buffer[: M * N].view((N, M) if transposed else (M, N))
            launch(x, codes.t() if transposed else codes, scale_buffer[:scales].view(-1, 1), None)
            assert (codes_buffer[M * N :] == 77).all()
            assert (scale_buffer[scales:] == 77).all()
            assert (scale_buffer[:scales] != 77).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="of memory that the interpreter reads")
@pytest.mark.parametrize("shape", [(5, 37), (132, 70), (3, 33000)])
def test_kernels_read_nothing_beside_their_operand(shape: tuple[int, int], device: torch.device) -> None:
    x = guarded(torch.randn(shape))
    for op, options in pairs(OPS, ((INT8.dtype,), (E4M3.dtype, "stochastic", guarded(torch.tensor([3]))))):
        assert op.launcher is not None
        exactly_equal(op.launcher(x, *options), op.reference(x, *options))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_wrong_options_are_errors(op: Op[..., Any]) -> None:
    x, seed = torch.ones(3, 5), torch.tensor([1])
    changes: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"dtype": torch.float16}, TypeError),
        ({"dtype": torch.uint8}, TypeError),
        ({"rounding": "up"}, ValueError),
        ({"rounding": "stochastic"}, ValueError),
        ({"seed": seed}, ValueError),
        ({"rounding": "stochastic", "seed": seed.int()}, ValueError),
        ({"rounding": "stochastic", "seed": torch.tensor([1, 2])}, ValueError),
        ({"rounding": "stochastic", "seed": seed.to("meta")}, ValueError),
    ]
    for change, error in changes:
        raises_everywhere(op, {"x": x, **change}, error)


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_fake_results_of_fp8_are_like_the_real_ones(op: Op[..., Any], dtype: torch.dtype, device: torch.device) -> None:
    for _, args in to_fp8(dtype):
        on_device = tuple(to_device(arg, device) for arg in args)
        torch.library.opcheck(op.overload, on_device, test_utils=("test_faketensor", "test_autograd_registration"))


def test_compiled_quantizers_give_what_they_give_in_eager() -> None:
    def both(x: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        return (
            *quantize_rowwise(x, E4M3.dtype),
            *quantize_columnwise(x * 2, E5M2.dtype, "stochastic", seed),
            *quantize_tensorwise_transposed(x, INT8.dtype, rounding="stochastic", seed=seed),
        )

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    x, seed = torch.randn(7, 33), torch.tensor([5])
    exactly_equal(compiled(x, seed), both(x, seed))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [(torch.int8,), (torch.int8, "stochastic"), (E4M3.dtype,)], ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_matrices_of_more_than_two_to_the_31_values(op: Op[..., Any], options: tuple[Any, ...]) -> None:
    x = torch.zeros(2**20 + 4, 2049, device="cuda", dtype=torch.bfloat16)
    x[-70:] = heavy_tailed(70, 2049, torch.bfloat16).to("cuda")
    seed = [torch.tensor([3], device="cuda")] * (len(options) > 1)
    codes, scale = op(x, *options, *seed)
    codes, scale = (codes.t(), scale.t()) if "transposed" in op.name else (codes, scale)
    kept = scale[-70:] if op is quantize_rowwise else scale
    expected = torch.where(kept > 0, codes[-70:].float() * kept, 0.0)
    if options[0] == torch.int8:
        assert ((expected - x[-70:].float()).abs() <= (0.51 if len(options) == 1 else 1.01) * kept).all()
    else:
        assert ((expected - x[-70:].float()).abs() <= 2.0**-4 * x[-70:].float().abs() + 2.0**-9 * kept).all()
    assert codes[:-70].view(torch.uint8).count_nonzero() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_random_bits_past_two_to_the_32_values(op: Op[..., Any]) -> None:
    x = torch.rand(2**18 + 4, 2**14, device="cuda", dtype=torch.bfloat16)
    codes, _ = op(x, torch.int8, "stochastic", torch.tensor([3], device="cuda"))
    codes = codes.t() if "transposed" in op.name else codes
    first, last = codes[:4], codes[-4:]
    assert (first != last).any()
    rows = (x[-4:].float() * 127 / x[-4:].float().abs().amax(1, keepdim=True)) if op is quantize_rowwise else None
    if rows is not None:
        assert ((last.float() == rows.floor()) | (last.float() == rows.ceil())).float().mean() > 0.999
