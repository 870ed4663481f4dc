"""int8 quantisation by row, column and matrix, against values worked out by hand and against its error bound."""

import lq_kernels.rowwise as module
import pytest
import torch
from hostile import FLOATS, cut_out, heavy_tailed, to_device
from lq_kernels.rowwise import (
    INT8_MAX,
    SMALLEST_AMAX,
    quantize_columnwise_transposed,
    quantize_rowwise,
    quantize_tensorwise,
    quantize_tensorwise_transposed,
)
from torch import Tensor


def exactly_equal(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for value, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=0, atol=0, equal_nan=True)


def test_codes_of_a_row_worked_out_by_hand() -> None:
    codes, scale = quantize_rowwise(torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5, 63.4], [0, 2, -1, 0, 0, 0, 0.01]]))
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, 63], [0, 127, -64, 0, 0, 0, 1]]  # -63.5 and 0.635
    assert scale.tolist() == [[1], [torch.tensor(2 / 127).item()]]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quantize", [quantize_rowwise, quantize_tensorwise])
def test_values_come_back_within_half_a_step(quantize, dtype: torch.dtype) -> None:
    x = heavy_tailed(37, 1000, dtype)
    codes, scale = quantize(x)
    # Half a step, and three roundings of values up to 127 steps: factor, product and scale.
    bound = (0.5 + 3 * INT8_MAX * 2**-24) * scale.double()
    assert ((codes * scale.double() - x.double()).abs() <= bound).all()
    assert codes.abs().amax() == INT8_MAX


def test_the_largest_value_of_each_row_gets_the_largest_code() -> None:
    x = heavy_tailed(200, 33)[:-1]
    codes, _ = quantize_rowwise(x)
    largest = x.abs().argmax(dim=1, keepdim=True)
    torch.testing.assert_close(codes.gather(1, largest), (127 * x.gather(1, largest).sign()).to(torch.int8))


@pytest.mark.parametrize("dtype", FLOATS)
def test_transposed_ops_quantize_the_transpose(dtype: torch.dtype) -> None:
    x = cut_out(heavy_tailed(37, 130, dtype))
    exactly_equal(quantize_columnwise_transposed(x), quantize_rowwise(x.t()))
    exactly_equal(quantize_tensorwise_transposed(x), quantize_tensorwise(x.t()))
    codes, scale = quantize_tensorwise(x)
    exactly_equal(quantize_tensorwise_transposed(x), (codes.t().contiguous(), scale))


def test_zero_rows_have_scale_zero_and_codes_zero() -> None:
    codes, scale = quantize_rowwise(torch.tensor([[0.0, -0.0], [1, 2]]))
    assert codes[0].tolist() == [0, 0]
    assert scale[0].item() == 0
    assert quantize_tensorwise(torch.zeros(2, 3))[1].item() == 0


def test_rows_too_small_to_quantize_count_as_zero() -> None:
    below = torch.nextafter(torch.tensor(SMALLEST_AMAX), torch.tensor(0.0)).item()
    codes, scale = quantize_rowwise(torch.tensor([[SMALLEST_AMAX, 0], [below, 0], [2.0**-149, 0]]))
    assert codes[:, 0].tolist() == [127, 0, 0]
    assert scale.flatten().tolist() == [torch.tensor(SMALLEST_AMAX / 127).item(), 0, 0]


def test_a_row_that_is_not_finite_poisons_itself_only() -> None:
    x = torch.randn(4, 9)
    clean = quantize_rowwise(x[2:])
    x[0, 3], x[1, 5] = float("nan"), -float("inf")
    codes, scale = quantize_rowwise(x)
    assert codes[:2].abs().max() == 0
    assert scale[0].isnan()
    assert scale[1] == float("inf")
    assert (codes[:2] * scale[:2]).isnan().all()
    exactly_equal((codes[2:], scale[2:]), clean)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrices_give_empty_codes_and_zero_scales(shape: tuple[int, int]) -> None:
    rows, columns = shape
    for quantize, codes_shape, scales in [
        (quantize_rowwise, (rows, columns), rows),
        (quantize_columnwise_transposed, (columns, rows), columns),
        (quantize_tensorwise, (rows, columns), 1),
        (quantize_tensorwise_transposed, (columns, rows), 1),
    ]:
        codes, scale = quantize(torch.empty(shape))
        assert codes.shape == codes_shape
        assert scale.tolist() == [[0.0]] * scales


def test_programs_that_take_several_tiles_miss_none(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PARTIALS", 3)
    monkeypatch.setattr(module, "_PARTIALS_OF_COLUMN", 2)
    x = heavy_tailed(600, 200).flip(0)  # the zeros first
    for op in (quantize_tensorwise, quantize_tensorwise_transposed, quantize_columnwise_transposed):
        assert op.launcher is not None
        codes, scale = op.launcher(to_device(cut_out(x), device))
        exactly_equal((codes.cpu(), scale.cpu()), op.reference(x))


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", [quantize_rowwise, quantize_tensorwise, quantize_columnwise_transposed])
def test_matrices_of_more_than_two_to_the_31_values(quantize) -> None:
    x = torch.zeros(2**20 + 3, 2049, device="cuda", dtype=torch.bfloat16)
    x[-70:] = heavy_tailed(70, 2049, torch.bfloat16).to("cuda")
    codes, scale = quantize(x)
    codes, scale = (codes.t(), scale.t()) if quantize is quantize_columnwise_transposed else (codes, scale)
    kept = scale[-70:] if quantize is quantize_rowwise else scale
    expected = torch.where(kept > 0, codes[-70:] * kept, 0.0)
    assert ((expected - x[-70:].float()).abs() <= 0.51 * kept).all()
    assert codes[:-70].count_nonzero() == 0
