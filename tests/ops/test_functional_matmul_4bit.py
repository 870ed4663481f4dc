"""Products with packed 4-bit weights under bitsandbytes' names."""

import pytest
import torch
from lq_kernels import functional as F

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(130,), (1, 130), (5, 130), (2, 3, 130)])
def test_the_4_bit_product_is_that_of_the_restored_weight(
    shape: tuple[int, ...], quant_type: str, compress: bool
) -> None:
    packed, state = F.quantize_4bit(torch.randn(37, 130), compress_statistics=compress, quant_type=quant_type)
    weight = F.dequantize_4bit(packed, state)
    x, bias = torch.randn(shape, requires_grad=True), torch.randn(37, requires_grad=True)
    expected = torch.nn.functional.linear(x, weight, bias)
    for B in (packed, packed.t()):
        out = F.matmul_4bit(x, B, state, bias=bias)
        torch.testing.assert_close(out, expected)
        grad = torch.randn(out.shape)
        for value, other in zip(*(torch.autograd.grad(y, (x, bias), grad, True) for y in (out, expected)), strict=True):
            torch.testing.assert_close(value, other)


def test_the_gradient_of_the_bias_is_summed_over_all_rows() -> None:
    packed, state = F.quantize_nf4(torch.randn(37, 64))
    bias = torch.randn(37, requires_grad=True)
    F.matmul_4bit(torch.randn(2, 3, 5, 64), packed, state, bias=bias).sum().backward()
    assert bias.grad.tolist() == [30.0] * 37


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_4_bit_product_has_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    packed, state = F.quantize_nf4(torch.randn(37, 64, dtype=torch.bfloat16))
    x = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    out = F.matmul_4bit(x, packed, state, bias=torch.randn(37, dtype=dtype))
    out.sum().backward()
    assert out.dtype == x.grad.dtype == dtype
    assert F.matmul_4bit(x[:0], packed, state).shape == (0, 37)


def test_a_weight_that_was_quantised_as_its_transpose_is_read_with_a_warning() -> None:
    x, weight = torch.randn(3, 64, requires_grad=True), torch.randn(64, 37)
    packed, state = F.quantize_nf4(weight)
    bias = torch.randn(37)
    with pytest.warns(DeprecationWarning, match="quantise its transpose"):
        out = F.matmul_4bit(x, packed, state, bias=bias)
    torch.testing.assert_close(out, x @ F.dequantize_nf4(packed, state) + bias)
    out.sum().backward()
    torch.testing.assert_close(x.grad, (F.dequantize_nf4(packed, state).sum(1)).expand(3, 64))


def test_out_of_a_4_bit_product_is_written_and_has_no_gradient() -> None:
    packed, state = F.quantize_nf4(torch.randn(37, 64))
    x, out = torch.randn(1, 64, requires_grad=True), torch.empty(1, 37)
    with pytest.raises(RuntimeError, match="out= has no gradients"):
        F.matmul_4bit(x, packed, state, out=out)
    assert F.gemv_4bit(x, packed.t(), out=out, state=state) is out
    assert torch.equal(out, F.matmul_4bit(x, packed, state))


def test_a_gradient_of_the_gradient_of_a_4_bit_product_is_right() -> None:
    """The product is linear in its input, so that its gradient is linear in the gradient it is given."""
    packed, state = F.quantize_nf4(torch.randn(37, 64))
    weight = F.dequantize_nf4(packed, state)
    x = torch.randn(3, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(F.matmul_4bit(x, packed, state).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    torch.testing.assert_close(second, 8 * x @ weight.t() @ weight @ weight.t() @ weight, rtol=1e-4, atol=1e-2)


# bitsandbytes' bounds for gemv_4bit against matmul_4bit, of errors divided by sqrt(dim): mean + 7 deviations of the
# mean error, relative error and largest error. It takes the means of 100 products; the bounds hold for each of 3 here.
GEMV = {
    (torch.float16, 512): (0.000052 + 7 * 0.0000063, 0.00024 + 7 * 0.000357, 0.00042 + 7 * 0.0000687),
    (torch.float16, 1024): (0.000018 + 7 * 0.0000028, 0.0001 + 7 * 0.000197, 0.00017 + 7 * 0.0000179),
    (torch.float32, 512): (2e-8 + 7 * 2e-9, 8e-7 + 7 * 1.2e-6, 6e-8 + 7 * 2e-8),
    (torch.float32, 1024): (1e-8 + 7 * 2e-9, 5e-7 + 7 * 1.6e-7, 5e-8 + 7 * 1e-8),
    (torch.bfloat16, 512): (0.00042 + 7 * 0.000059, 0.0041 + 7 * 0.01153, 0.0037 + 7 * 0.000556),
    (torch.bfloat16, 1024): (0.00014 + 7 * 0.0000095, 0.0012 + 7 * 0.000679, 0.001 + 7 * 0.000137),
}


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dim", [128, 512, 1024])
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_row_is_multiplied_as_exactly_as_published(
    dtype: torch.dtype, dim: int, quant_type: str, compress: bool, device: torch.device
) -> None:
    bounds = GEMV[dtype, 512 if dim <= 512 else 1024]
    weight = (torch.randn(dim, dim) / dim**0.5).to(device, dtype)
    packed, state = F.quantize_4bit(weight, compress_statistics=compress, quant_type=quant_type)
    for _ in range(3):
        x = torch.randn(1, dim).to(device, dtype)
        row, product = F.gemv_4bit(x, packed.t(), state=state), F.matmul_4bit(x.requires_grad_(), packed.t(), state)
        error = (row - product).abs().float()
        relative = error / (product.abs().float() + 1e-5)
        for value, bound in zip((error.mean(), relative.mean(), error.max()), bounds, strict=True):
            assert value / dim**0.5 <= bound


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_times_the_identity_is_itself(dtype: torch.dtype) -> None:
    for quant_type in ("nf4", "fp4"):
        packed, state = F.quantize_4bit(torch.eye(128, dtype=dtype), quant_type=quant_type)
        x = torch.randn(1, 128, dtype=dtype)
        assert torch.equal(F.gemv_4bit(x, packed.t(), state=state), x)
