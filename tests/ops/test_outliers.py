"""int8 operands without outlier columns, against values worked out by hand, loops in float64 and an error bound."""

import lq_kernels.outliers as module
import pytest
import torch
from hostile import FLOATS, cut_out, heavy_tailed, to_device
from lq_kernels.double_quantize import double_quantize
from lq_kernels.outliers import quantize_rowwise_outliers
from lq_kernels.rowwise import quantize_columnwise_transposed, quantize_rowwise
from samples_outliers import THRESHOLD, at_the_threshold, with_outliers
from torch import Tensor

INT8_MAX = 127.0


def exactly_equal(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for value, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=0, atol=0, equal_nan=True)


def outlier_columns(x: Tensor, threshold: float) -> list[int]:
    rows = x.double().tolist()
    return [k for k in range(x.shape[1]) if any(abs(row[k]) >= threshold for row in rows)]


def test_codes_worked_out_by_hand() -> None:
    x = torch.tensor([[1.27, 9.0, 0.5, -8.0], [-2.0, 5.08, 1.0, 0.0], [0.0, 0.0, 0.0, 7.0]])
    codes, scale, columns, count = quantize_rowwise_outliers(x, 6.0)
    # Row 0 is scaled by 1.27, row 1 by the 5.08 in an outlier column, row 2 has nothing but an outlier.
    assert codes.tolist() == [[127, 0, 50, 0], [-50, 0, 25, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(scale, torch.tensor([[0.01], [0.04], [0.0]]))
    assert columns.tolist() == [1, 3, 4, 4]
    assert count.tolist() == [2]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threshold", [1.0, 2.5, THRESHOLD])
def test_codes_scales_and_columns_follow_the_formula(dtype: torch.dtype, threshold: float) -> None:
    x = with_outliers(37, 130, dtype)
    codes, scale, columns, count = quantize_rowwise_outliers(x, threshold)
    expected = outlier_columns(x, threshold)
    assert 0 < len(expected) == count
    assert columns.tolist() == expected + [130] * (130 - len(expected))
    for row, row_codes, row_scale in zip(x.double().tolist(), codes.tolist(), scale.flatten().tolist(), strict=True):
        amax = max([abs(value) for value in row if abs(value) < threshold], default=0.0)
        assert row_scale == pytest.approx(amax / INT8_MAX, rel=2.0**-23)
        for k, (value, code) in enumerate(zip(row, row_codes, strict=True)):
            steps = 0.0 if k in expected or not amax else value * INT8_MAX / amax
            assert abs(code - steps) <= 0.5 + 127 * 2.0**-22


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_value_at_the_threshold_is_an_outlier_and_the_one_below_is_not(dtype: torch.dtype) -> None:
    _, scale, columns, count = quantize_rowwise_outliers(at_the_threshold(dtype), THRESHOLD)
    assert columns[: int(count)].tolist() == [1, 2, 4]
    below = torch.nextafter(torch.tensor(THRESHOLD, dtype=dtype), torch.tensor(0, dtype=dtype))
    torch.testing.assert_close(scale[0], torch.full((1,), float(below) / INT8_MAX), rtol=2.0**-23, atol=0)


def test_without_outliers_codes_are_those_of_quantize_rowwise() -> None:
    x = heavy_tailed(37, 100)
    codes, scale, columns, count = quantize_rowwise_outliers(x, 1e9)
    exactly_equal((codes, scale), quantize_rowwise(x))
    assert count.item() == 0
    assert columns.tolist() == [100] * 100


def test_where_every_column_has_an_outlier_nothing_is_left() -> None:
    x = torch.randn(40, 40) + 9 * torch.eye(40)
    codes, scale, columns, count = quantize_rowwise_outliers(x, 5.0)
    assert codes.count_nonzero() == 0
    assert columns.tolist() == list(range(40))
    assert count.item() == 40
    assert (scale > 0).all()


def test_of_one_row_only_the_outliers_are_left_out() -> None:
    codes, scale, columns, count = quantize_rowwise_outliers(torch.tensor([[3.0, -6.0, 1.5, 6.0]]), 6.0)
    assert codes.tolist() == [[127, 0, 64, 0]]
    torch.testing.assert_close(scale, torch.tensor([[3 / 127]]))
    assert columns.tolist() == [1, 3, 4, 4]
    assert count.item() == 2


@pytest.mark.parametrize("threshold", [2.0, 3.0])
def test_values_come_back_with_the_outlier_columns_put_back(threshold: float) -> None:
    x = torch.randn(300, 200).half()
    codes, scale, columns, count = quantize_rowwise_outliers(x, threshold)
    listed = columns[: int(count)]
    values = codes * scale
    values[:, listed] = x[:, listed].float()
    torch.testing.assert_close(values, x.float(), rtol=0.05, atol=1.5e-2)
    assert ((values - x.float()).abs() <= 0.5001 * scale).all()


def test_a_nan_poisons_its_row_and_an_infinity_is_an_outlier() -> None:
    x = torch.randn(4, 9).clamp(-2, 2)
    clean_codes, clean_scale, *_ = quantize_rowwise_outliers(x, 6.0)
    x[0, 3], x[1, 5], x[2, 6] = float("nan"), -float("inf"), 7.0
    codes, scale, columns, count = quantize_rowwise_outliers(x, 6.0)
    assert columns[: int(count)].tolist() == [5, 6]
    assert scale[0].isnan()
    assert codes[0].count_nonzero() == 0
    assert scale[1:].isfinite().all()
    torch.testing.assert_close(scale[3], clean_scale[3], rtol=0, atol=0)
    kept = [0, 1, 2, 3, 4, 7, 8]
    torch.testing.assert_close(codes[3, kept], clean_codes[3, kept], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_column_codes_are_row_codes_of_the_transpose_without_the_outlier_columns(dtype: torch.dtype) -> None:
    x = with_outliers(44, 130, dtype)
    codes, column_codes, scale, column_scale, columns, count = double_quantize(x, THRESHOLD)
    exactly_equal((codes, scale, columns, count), quantize_rowwise_outliers(x, THRESHOLD))
    assert column_codes.is_contiguous()
    listed = set(columns[: int(count)].tolist())
    assert listed
    for k in range(130):
        inliers = [abs(value) for value in x[:, k].double().tolist() if abs(value) < THRESHOLD]
        assert column_scale[k].item() == pytest.approx(max(inliers, default=0.0) / INT8_MAX, rel=2.0**-23)
    others = [k for k in range(130) if k not in listed]
    expected, _ = quantize_columnwise_transposed(x[:, others])
    exactly_equal((column_codes[others],), (expected,))
    assert column_codes[sorted(listed)].count_nonzero() == 0


def test_a_nan_poisons_its_column_of_the_column_codes_even_beside_an_outlier() -> None:
    x = torch.tensor([[1.0, 9.0, 2.0], [3.0, float("nan"), 4.0], [5.0, 1.0, float("nan")]])
    _, column_codes, scale, column_scale, columns, count = double_quantize(x, 6.0)
    assert column_scale.flatten().isnan().tolist() == [False, True, True]
    assert scale.flatten().isnan().tolist() == [False, True, True]
    assert column_codes[1:].count_nonzero() == 0
    assert columns[: int(count)].tolist() == [1]


@pytest.mark.parametrize("op", [quantize_rowwise_outliers, double_quantize])
@pytest.mark.parametrize(("programs", "longest_row"), [(2, 16384), (3, 32)])
def test_programs_that_take_several_tiles_and_steps_miss_none(
    op, programs: int, longest_row: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "_PROGRAMS": programs,
        "_PROGRAMS_BY_COLUMN": programs,
        "_LONGEST_ROW": longest_row,
        "_LONG_ROW_STEP": 64,
        "_ROW_TILE": 512,
        "_CHUNK": 64,
        "_BAND": 256,
    }.items():
        monkeypatch.setattr(module, name, value)
    x = with_outliers(300, 150).flip(0)
    x[299, 149] = 50  # in the last tile only
    got = op.launcher(to_device(cut_out(x), device), THRESHOLD)
    exactly_equal(tuple(value.cpu() for value in got), op.reference(x, THRESHOLD))


@pytest.mark.parametrize("op", [quantize_rowwise_outliers, double_quantize])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrices_have_no_outliers(op, shape: tuple[int, int]) -> None:
    M, K = shape
    *quantized, columns, count = op(torch.empty(shape), 6.0)
    assert columns.tolist() == [K] * K
    assert count.tolist() == [0]
    scales = [value for value in quantized if value.dtype == torch.float32]
    assert [scale.tolist() for scale in scales] == [[[0.0]] * M, [[0.0]] * K][: len(scales)]


@pytest.mark.parametrize("op", [quantize_rowwise_outliers, double_quantize])
@pytest.mark.parametrize(
    ("x", "threshold", "error", "message"),
    [
        (torch.zeros(3, 4), 0.0, ValueError, "quantize_rowwise"),
        (torch.zeros(3, 4), -1.0, ValueError, "above 0"),
        (torch.zeros(3, 4), float("nan"), ValueError, "nan"),
        (torch.zeros(2, 3, 4), 6.0, ValueError, "reshape"),
        (torch.zeros(3, 4, dtype=torch.float64), 6.0, TypeError, "cast it"),
        (torch.zeros(3, 4, dtype=torch.int8), 6.0, TypeError, "int8"),
    ],
)
def test_inputs_that_are_refused(op, x: Tensor, threshold: float, error: type[Exception], message: str) -> None:
    for function in (op, op.launcher):
        with pytest.raises(error, match=message):
            function(x, threshold)
    with pytest.raises(error, match=message):
        op(x.to("meta"), threshold)


@pytest.mark.gpu
@pytest.mark.parametrize("op", [quantize_rowwise_outliers, double_quantize])
def test_rows_that_do_not_fit_into_registers_on_a_gpu(op) -> None:
    for x in (with_outliers(37, 20000, torch.bfloat16), with_outliers(5, 60000), with_outliers(300, 16384)):
        exactly_equal(tuple(value.cpu() for value in op(x.cuda(), THRESHOLD)), op.reference(x, THRESHOLD))


@pytest.mark.gpu
def test_matrices_of_more_than_two_to_the_31_values() -> None:
    x = torch.zeros(2**20 + 3, 2049, device="cuda", dtype=torch.bfloat16)
    last = with_outliers(70, 2049, torch.bfloat16)
    x[-70:] = last.to("cuda")
    codes, column_codes, scale, column_scale, columns, count = double_quantize(x, THRESHOLD)
    expected = double_quantize.reference(last, THRESHOLD)
    got = (codes[-70:], column_codes[:, -70:], scale[-70:], column_scale, columns, count)
    exactly_equal(tuple(value.cpu() for value in got), expected)
    assert codes[:-70].count_nonzero() == 0
