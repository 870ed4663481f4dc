"""bitsandbytes' int8 functions and, from the time it had SwitchBack, its row, column and global ones."""

import pytest
import torch
from hostile import heavy_tailed
from lq_kernels import functional as F
from lq_kernels.outliers import quantize_rowwise_outliers
from torch._subclasses.fake_tensor import FakeTensorMode

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALF_A_STEP = 0.5 + 127 * 2**-22  # of int8, and four float32 roundings of up to 127 steps


@pytest.mark.parametrize("shape", [(37, 130), (2, 3, 130), (130,), (0, 130)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_rows_keep_their_maxima(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    A = torch.randn(shape).mul(3).to(dtype)
    codes, stats, outliers = F.int8_vectorwise_quant(A)
    assert (codes.dtype, codes.shape, outliers) == (torch.int8, A.shape, None)
    assert torch.equal(stats, A.reshape(-1, 130).float().abs().amax(1)) or dtype == torch.float32
    torch.testing.assert_close(stats, A.reshape(-1, 130).float().abs().amax(1), rtol=2**-23, atol=0)
    restored = F.int8_vectorwise_dequant(codes, stats)
    assert (restored.dtype, restored.shape) == (torch.float32, A.shape)
    assert ((restored - A.float()).abs().reshape(-1, 130) <= stats[:, None] / 127 * HALF_A_STEP).all()


def test_every_maximum_of_16_bits_comes_back_exactly() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(0x7F80 if dtype == torch.bfloat16 else 0x7C00, dtype=torch.int16).view(dtype)[:, None]
        kept = torch.where(every.float() < 2.0**-118, 0.0, every.float())[:, 0]
        assert torch.equal(F.int8_vectorwise_quant(every)[1], kept)


def test_outlier_columns_are_listed_and_leave_codes_and_maxima() -> None:
    A = torch.randn(20, 130).clamp(-2, 2).half()
    A[3, 17] = 7.0
    A[9, 100] = -3.0
    codes, stats, columns = F.int8_vectorwise_quant(A, threshold=3.0)
    assert (columns.dtype, columns.tolist()) == (torch.int64, [17, 100])
    assert not codes[:, [17, 100]].any()
    assert torch.equal(stats, A.float().masked_fill(A.abs() >= 3, 0).abs().amax(1))
    assert F.int8_vectorwise_quant(A, threshold=20.0)[2].tolist() == []
    lone = F.int8_vectorwise_quant(A[3:4], threshold=3.0)
    assert lone[2].tolist() == [17]
    assert lone[0][0, 100] != 0


def test_the_int8_product_is_exact() -> None:
    A, B = torch.randint(-127, 128, (2, 3, 1031)).to(torch.int8), torch.randint(-127, 128, (37, 1031)).to(torch.int8)
    out = torch.empty(2, 3, 37, dtype=torch.int32)
    assert F.int8_linear_matmul(A, B, out=out) is out
    assert torch.equal(out, (A.long() @ B.long().t()).int())
    assert torch.equal(F.int8_linear_matmul(A, B), out)


@pytest.mark.parametrize("bias_dtype", [None, *FLOATS])
def test_sums_become_values_with_one_rounding(bias_dtype: torch.dtype | None) -> None:
    total = torch.randint(-(2**23), 2**23, (2, 10, 37), dtype=torch.int32)
    rows, columns = torch.rand(20), torch.rand(37)
    bias = None if bias_dtype is None else torch.randn(37).to(bias_dtype)
    exact = total.double() * (rows.double() / 127).view(2, 10, 1) * (columns.double() / 127)
    exact = exact if bias is None else exact + bias.double()
    out = F.int8_mm_dequant(total, rows, columns, bias=bias)
    assert (out.dtype, out.shape) == (torch.float16, total.shape)
    torch.testing.assert_close(out.double(), exact, rtol=2**-11 + 2**-20, atol=2**-24)
    full = torch.empty(2, 10, 37)
    assert F.int8_mm_dequant(total, rows, columns, out=full, bias=bias) is full
    # scales, products and the sum are rounded: 5 roundings of 2^-24, of terms that may cancel
    torch.testing.assert_close(full.double(), exact, rtol=5 * 2**-24, atol=5 * 2**-24 * 4)


@pytest.mark.parametrize("dtype", [None, *FLOATS])
def test_the_scaled_product_is_product_and_values_in_one(dtype: torch.dtype | None) -> None:
    A, B = heavy_tailed(12, 130).half(), torch.randn(37, 130).half()
    (CA, SCA, _), (CB, SCB, _) = F.int8_vectorwise_quant(A), F.int8_vectorwise_quant(B)
    bias = torch.randn(37)
    out = F.int8_scaled_mm(CA, CB, SCA, SCB, bias, dtype)
    assert out.dtype == (dtype or torch.float16)
    expected = torch.empty(12, 37, dtype=out.dtype)
    F.int8_mm_dequant(F.int8_linear_matmul(CA, CB), SCA, SCB, out=expected, bias=bias)
    assert torch.equal(out, expected)
    assert torch.equal(F.int8_scaled_mm(CA.view(3, 4, 130), CB, SCA, SCB, bias, dtype), expected.view(3, 4, 37))


def test_the_half_precision_chain_is_as_accurate_as_published() -> None:
    A, B = torch.randn(128, 256).half() / 16, torch.randn(96, 256).half() / 2
    (CA, SCA, _), (CB, SCB, _) = F.int8_vectorwise_quant(A), F.int8_vectorwise_quant(B)
    out = F.int8_mm_dequant(F.int8_linear_matmul(CA, CB), SCA, SCB)
    torch.testing.assert_close(out, A @ B.t(), atol=0.025, rtol=0.05)
    bad = ~torch.isclose(out, A @ B.t(), atol=0.015, rtol=0.1)
    assert bad.float().mean() <= 0.01


@pytest.mark.parametrize("leading", [(12,), (3, 4)])
def test_outlier_columns_are_multiplied_in_floats(leading: tuple[int, ...]) -> None:
    A, B, bias = torch.randn(*leading, 130).half(), torch.randn(37, 130).half(), torch.randn(37).half()
    A[..., 5] *= 30
    A[..., 70] *= 30
    CA, SCA, columns = F.int8_vectorwise_quant(A, threshold=6.0)
    CB, SCB, _ = F.int8_vectorwise_quant(B)
    out, sub_A = F.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, columns, bias)
    assert (out.dtype, out.shape) == (A.dtype, (*leading, 37))
    assert torch.equal(sub_A, A.reshape(12, 130)[:, columns])
    weight = F.int8_vectorwise_dequant(CB, SCB)
    expected = F.int8_vectorwise_dequant(CA, SCA).double() @ weight.double().t() + bias.double()
    assert (out.double() - expected).abs().mean() > 1
    expected += A[..., columns].double() @ weight.half()[:, columns].double().t()
    torch.testing.assert_close(out.double(), expected, rtol=2**-11, atol=1e-4)
    plain = F.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, None, bias)
    assert torch.equal(plain[0], F.int8_scaled_mm(CA, CB, SCA, SCB, bias))
    assert plain[1] is None


def test_outlier_columns_as_a_pair_need_nothing_from_the_host() -> None:
    A, B = torch.randn(12, 130), torch.randn(37, 130)
    A[:, 7] *= 30
    CB, SCB, _ = F.int8_vectorwise_quant(B)
    CA, SCA, columns = F.int8_vectorwise_quant(A, threshold=6.0)
    pair = quantize_rowwise_outliers(A, 6.0)[2:]
    out, sub_A = F.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, pair)
    assert torch.equal(out, F.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, columns)[0])
    assert sub_A is None
    with FakeTensorMode():  # which has no values to read
        A, B = torch.randn(12, 130), torch.randn(37, 130)
        CB, SCB, _ = F.int8_vectorwise_quant(B)
        codes, _, columns, count = quantize_rowwise_outliers(A, 6.0)
        out, _ = F.int8_mixed_scaled_mm(A, codes, CB, torch.rand(12), SCB, (columns, count))
        assert out.shape == (12, 37)


@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("leading", [(12,), (3, 4)])
def test_double_quantisation_is_both_quantisations(leading: tuple[int, ...], threshold: float) -> None:
    A = torch.randn(*leading, 130).half()
    rows = A.reshape(12, 130)
    by_row, by_column, row_stats, col_stats, columns = F.int8_double_quant(A, threshold=threshold)
    assert by_row.shape == by_column.shape == A.shape
    codes, stats, listed = F.int8_vectorwise_quant(A, threshold)
    assert torch.equal(by_row, codes)
    assert torch.equal(row_stats, stats)
    inliers = rows.float().masked_fill((rows.abs() >= threshold) & (threshold > 0), 0)
    assert torch.equal(col_stats, inliers.abs().amax(0))
    restored = by_column.reshape(12, 130).float() * col_stats / 127
    if threshold:
        assert torch.equal(columns, listed)
        inliers[:, columns] = 0
    else:
        assert columns is None
    assert ((restored - inliers).abs() <= col_stats / 127 * HALF_A_STEP).all()


def test_double_quantisation_writes_where_asked() -> None:
    A = torch.randn(12, 130).half()
    expected = F.int8_double_quant(A)
    buffers = [torch.empty_like(value) for value in (expected[3], expected[2], expected[1], expected[0])]
    got = F.int8_double_quant(A, *buffers)
    assert [got[3] is buffers[0], got[2] is buffers[1], got[1] is buffers[2], got[0] is buffers[3]] == [True] * 4
    for value, other in zip(got[:4], expected[:4], strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("dtype", FLOATS)
def test_switchback_codes_and_maxima(dtype: torch.dtype) -> None:
    x = heavy_tailed(37, 130).to(dtype)
    magnitudes = x.abs()
    for (codes, absmax), of_x, expected in (
        (F.quantize_rowwise(x), x, magnitudes.amax(1)),
        (F.quantize_columnwise_and_transpose(x), x.t(), magnitudes.amax(0)),
        (F.quantize_global(x), x, magnitudes.amax().view(1)),
        (F.quantize_global_transpose(x), x.t(), magnitudes.amax().view(1)),
    ):
        assert (codes.dtype, codes.shape, codes.is_contiguous()) == (torch.int8, of_x.shape, True)
        assert absmax.dtype == dtype
        torch.testing.assert_close(absmax, expected, rtol=2**-23 if dtype == torch.float32 else 0, atol=0)
        steps = absmax.double().view(-1, 1) / 127
        assert ((codes.double() * steps - of_x.double()).abs() <= steps * HALF_A_STEP).all()
    codes, absmax = F.quantize_rowwise(x)
    restored = F.dequantize_rowwise(codes, absmax)
    assert restored.dtype == torch.float16
    assert F.dequantize_rowwise(codes, absmax, torch.float32).dtype == torch.float32
    torch.testing.assert_close(
        restored.double(), codes * absmax.double()[:, None] / 127, rtol=2**-11 + 2**-20, atol=1e-7
    )


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16, torch.float32])
def test_switchback_products_are_those_of_the_restored_values(out_dtype: torch.dtype | None) -> None:
    x, weight, bias = torch.randn(13, 83).half(), torch.randn(332, 83).half(), torch.randn(332).half()
    kwargs = {} if out_dtype is None else {"out_dtype": out_dtype}
    rounding = torch.finfo(out_dtype or torch.float16).eps / 2
    a, state_x = F.quantize_rowwise(x)
    exact_x = a.double() * state_x.double()[:, None] / 127
    for (b, state_w), multiply in (
        (F.quantize_rowwise(weight), F.int8_matmul_rowwise_dequantize),
        (F.quantize_global(weight), F.int8_matmul_mixed_dequantize),
    ):
        out = multiply(a, b.t(), state_x, state_w, bias, **kwargs)
        assert out.dtype == (out_dtype or torch.float16)
        exact = exact_x @ (b.double() * state_w.double().view(-1, 1) / 127).t() + bias.double()
        torch.testing.assert_close(out.double(), exact, rtol=rounding + 2**-20, atol=1e-5)
        assert torch.equal(multiply(a, b.t(), state_x, state_w, None, **kwargs).isfinite(), out.isfinite())
