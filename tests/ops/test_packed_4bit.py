"""matmul_4bit: the product with a weight that is read back from 4 bits, and its gradients."""

from typing import Any

import pytest
import torch
from lq_kernels.blockwise_4bit import dequantize_4bit
from lq_kernels.nested_scales import dequantize_scales, quantize_scales
from lq_kernels.packed_4bit import Nested, Packed4bit, matmul_4bit
from torch import Tensor
from torch.nn.functional import linear

N, K = 24, 40
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def weight(double: bool = False, quant_type: str = "nf4", dtype: torch.dtype = torch.float32) -> Packed4bit:
    return Packed4bit.quantize(torch.randn(N, K, dtype=dtype), 64, quant_type, double=double)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("shape", [(K,), (1, K), (5, K), (2, 3, K), (0, K), (2, 0, K)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("double", [False, True])
def test_output_and_gradients_are_those_of_a_linear_with_the_weight_read_back(
    shape: tuple[int, ...], dtype: torch.dtype, double: bool
) -> None:
    packed, x, bias = weight(double), leaf(*shape, dtype=dtype), leaf(N, dtype=dtype)
    output = matmul_4bit(x, packed, bias)
    expected = linear(x, packed.dequantize(dtype), bias)
    assert output.dtype == dtype
    assert torch.equal(output, expected)
    grad = torch.randn_like(output)
    grad_x, grad_bias = torch.autograd.grad(output, (x, bias), grad)
    expected_x, expected_bias = torch.autograd.grad(expected, (x, bias), grad)
    # A product of one row may add up its terms in another order; N terms of about 1, half an ulp each.
    torch.testing.assert_close(grad_x, expected_x, rtol=0, atol=N * torch.finfo(dtype).eps)
    torch.testing.assert_close(grad_bias, expected_bias, rtol=0, atol=6 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_product_is_that_of_codes_and_scales(quant_type: str) -> None:
    packed = weight(quant_type=quant_type)
    x = torch.randn(7, K)
    exact = x.double() @ packed.dequantize().double().t()
    bound = K * torch.finfo(torch.float32).eps * (x.double().abs() @ packed.dequantize().double().abs().t())
    assert ((matmul_4bit(x, packed).double() - exact).abs() <= bound).all()


def test_the_bias_gets_the_sum_over_all_leading_dimensions() -> None:
    bias = leaf(N)
    output = matmul_4bit(torch.randn(2, 3, 4, K), weight(), bias)
    (grad,) = torch.autograd.grad(output, bias, torch.ones_like(output))
    assert torch.equal(grad, torch.full((N,), 24.0))


def test_only_what_asks_for_a_gradient_gets_one() -> None:
    packed, x = weight(), leaf(3, K)
    matmul_4bit(x, packed, torch.randn(N)).sum().backward()
    torch.testing.assert_close(x.grad, packed.dequantize().sum(0).expand(3, K))
    bias = leaf(N)
    matmul_4bit(torch.randn(3, K), packed, bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((N,), 3.0), rtol=0, atol=0)
    assert not matmul_4bit(torch.randn(3, K), packed).requires_grad


def test_backward_keeps_nothing_but_the_packed_weight() -> None:
    saved: list[Tensor] = []
    packed = weight()

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = matmul_4bit(leaf(3, K), packed, leaf(N))
    assert saved == []
    node: Any = output.grad_fn
    assert vars(node) == {"weight": packed}


def test_a_gradient_can_be_differentiated_again() -> None:
    packed, x = weight(), leaf(3, K)

    def penalty(y: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        return (grad**2).sum()

    (got,) = torch.autograd.grad(penalty(matmul_4bit(x, packed)), x)
    (expected,) = torch.autograd.grad(penalty(linear(x, packed.dequantize())), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kept_from", FLOATS)
def test_the_output_has_the_dtype_of_the_input(dtype: torch.dtype, kept_from: torch.dtype) -> None:
    packed = weight(dtype=kept_from)
    assert packed.dequantize().dtype == kept_from
    output = matmul_4bit(torch.randn(3, K, dtype=dtype), packed, torch.randn(N))
    assert output.dtype == dtype


@pytest.mark.parametrize("dtype", FLOATS)
def test_autocast_decides_the_dtype_and_gradients_keep_theirs(dtype: torch.dtype) -> None:
    packed, x, bias = weight(), leaf(3, K, dtype=dtype), leaf(N)
    with torch.autocast("cpu", torch.bfloat16):
        output = matmul_4bit(x, packed, bias)
        expected = linear(x, packed.dequantize(), bias)
    assert output.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(output, expected)
    gradients = torch.autograd.grad(output.sum(), (x, bias))
    assert [grad.dtype for grad in gradients] == [dtype, torch.float32]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_it_compiles_as_one_graph(double: bool, dynamic: bool) -> None:
    torch._dynamo.reset()
    packed, bias = weight(double), leaf(N)

    def layer(x: Tensor, packed: Packed4bit, bias: Tensor) -> Tensor:
        return matmul_4bit(x, packed, bias).relu()

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (3, 5):
        x = leaf(2, rows, K)
        expected = layer(x, packed, bias)
        got = compiled(x, packed, bias)
        assert torch.equal(got, expected)
        gradients = torch.autograd.grad(got.sum(), (x, bias))
        torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), (x, bias)))
        with torch.autocast("cpu", torch.bfloat16):
            assert compiled(x, packed, bias).dtype == torch.bfloat16


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_outputs_are_as_near_as_published(quant_type: str) -> None:
    """bitsandbytes' own bound on its test of the same name."""
    w, x = torch.randn(256, 256), torch.randn(128, 256)
    got = matmul_4bit(x, Packed4bit.quantize(w, 64, quant_type))
    assert (got - x @ w.t()).abs().mean() / 256**0.5 < 0.115


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_computes_the_same(quant_type: str, double: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    w, bias = torch.randn(N, K), torch.randn(N)
    packed, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type=quant_type, compress_statistics=double)
    nested = Nested(state.absmax, state.state2.absmax, state.offset) if double else None
    ours = Packed4bit(packed, None if double else state.absmax, 64, quant_type, (N, K), torch.float32, nested)
    x = leaf(2, 3, K)
    expected = bnb.matmul_4bit(x, packed.t(), quant_state=state, bias=bias)
    got = matmul_4bit(x, ours, bias)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(got)
    torch.testing.assert_close(
        torch.autograd.grad(got, x, grad), torch.autograd.grad(expected, x, grad), rtol=1e-5, atol=1e-5
    )


def test_a_packed_tensor_is_read_back_from_either_kind_of_scales() -> None:
    w = torch.randn(N, K)
    plain = Packed4bit.quantize(w, 32, "fp4", torch.bfloat16)
    assert plain.packed.dtype == torch.bfloat16
    scale = w.view(-1, 32).abs().amax(1)
    assert torch.equal(plain.plain_scale(), scale)
    assert torch.equal(plain.dequantize(), dequantize_4bit(plain.packed, scale, 32, "fp4", [N, K], w.dtype))
    double = Packed4bit.quantize(w, 32, "fp4", double=True)
    assert torch.equal(double.packed, plain.packed.view(torch.uint8).view(-1, 1))
    scale = dequantize_scales(*quantize_scales(scale))
    assert torch.equal(double.plain_scale(), scale)
    assert torch.equal(double.dequantize(), dequantize_4bit(double.packed, scale, 32, "fp4", [N, K], w.dtype))


def test_wrong_arguments_say_what_was_expected() -> None:
    packed = weight()
    with pytest.raises(ValueError, match=r"got torch.float64"):
        matmul_4bit(torch.zeros(3, K, dtype=torch.float64), packed)
    with pytest.raises(ValueError, match=r"got \(3, 41\) and \(24, 40\)"):
        matmul_4bit(torch.zeros(3, 41), packed)
    with pytest.raises(ValueError, match=r"got \(\) and"):
        matmul_4bit(torch.zeros(()), packed)
    with pytest.raises(ValueError, match=r"is \(24,\), got \(40,\)"):
        matmul_4bit(torch.zeros(3, K), packed, torch.zeros(K))
    with pytest.raises(ValueError, match=r"\(N, K\), got \(3, 40\) and \(2, 3, 40\)"):
        matmul_4bit(torch.zeros(3, K), Packed4bit.quantize(torch.zeros(2, 3, K)))
    with pytest.raises(ValueError, match="either `scale` or `nested`"):
        Packed4bit(packed.packed, None, 64, "nf4", (N, K), torch.float32)
    with pytest.raises(ValueError, match="either `scale` or `nested`"):
        Packed4bit(packed.packed, packed.scale, 64, "nf4", (N, K), torch.float32, weight(double=True).nested)


WIDE = 128  # columns: whole blocks, which products in 8 bits want
STEPS = {"int8": 2 * 127.0, "fp8": 16.0}  # half a step: of int8 amax / 254, of e4m3 a sixteenth of a value or less


def rounding_of(x: Tensor, compute: str) -> Tensor:
    """By how much a row's 8-bit codes may miss its values: half a step of its largest."""
    return (x.double().abs().amax(-1, keepdim=True) / STEPS[compute]).expand(x.shape)


def bound_of_8_bits(x: Tensor, w: Tensor, x_error: Tensor, w_error: Tensor) -> Tensor:
    """|sum of x w - of both rounded| <= sum of |x| dw + dx |w| + dx dw, and float32's and fp8's own rounding."""
    x, w = x.double().abs(), w.double().abs()
    return (x @ w_error.t() + x_error @ w.t() + x_error @ w_error.t()) * 1.01 + 2.0**-9 * (x @ w.t())


@pytest.mark.parametrize("compute", ["int8", "fp8"])
@pytest.mark.parametrize("double", [False, True])
def test_products_in_8_bits_are_right_within_their_rounding(compute: str, double: bool) -> None:
    packed = Packed4bit.quantize(torch.randn(N, WIDE) * torch.exp(torch.randn(N, 1)), double=double)
    x, bias = torch.randn(2, 5, WIDE, requires_grad=True), leaf(N)
    weight = packed.dequantize()
    output = matmul_4bit(x, packed, bias, compute)
    assert (output.shape, output.dtype) == ((2, 5, N), torch.float32)
    exact = x.double() @ weight.double().t() + bias.double()
    errors = rounding_of(x, compute), rounding_of(weight, compute)
    assert ((output - exact).abs() <= bound_of_8_bits(x, weight, *errors)).all()

    grad = torch.randn_like(output)
    grad_x, grad_bias = torch.autograd.grad(output, (x, bias), grad)
    columns = weight.t().contiguous()
    # A column's scale is that of its largest block, which may be larger than its own largest value.
    of_blocks = packed.plain_scale().view(N, -1).amax(0).repeat_interleave(64)[:, None]
    errors = rounding_of(grad, compute), (of_blocks.double() / STEPS[compute]).expand(columns.shape)
    assert ((grad_x - grad.double() @ weight.double()).abs() <= bound_of_8_bits(grad, columns, *errors)).all()
    torch.testing.assert_close(grad_bias, grad.sum((0, 1)))


@pytest.mark.parametrize("compute", ["int8", "fp8"])
def test_products_in_8_bits_keep_nothing_but_the_packed_weight(compute: str) -> None:
    packed = Packed4bit.quantize(torch.randn(N, WIDE))
    node: Any = matmul_4bit(leaf(3, WIDE), packed, compute=compute).grad_fn
    assert node.weight is packed
    assert not any(isinstance(value, Tensor) for value in vars(node).values())
    assert node.saved_tensors == ()


@pytest.mark.parametrize("compute", ["int8", "fp8"])
def test_products_in_8_bits_have_the_dtype_of_the_input_and_take_no_rows(compute: str) -> None:
    packed = Packed4bit.quantize(torch.randn(N, WIDE))
    for dtype in FLOATS:
        for shape in [(WIDE,), (0, WIDE), (2, 0, WIDE), (3, WIDE)]:
            x = leaf(*shape, dtype=dtype)
            output = matmul_4bit(x, packed, torch.randn(N), compute)
            assert (output.shape, output.dtype) == ((*shape[:-1], N), dtype)
            (grad,) = torch.autograd.grad(output, x, torch.ones_like(output))
            assert (grad.shape, grad.dtype) == (x.shape, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert matmul_4bit(torch.randn(3, WIDE), packed, compute=compute).dtype == torch.bfloat16


def test_a_gradient_in_8_bits_can_be_differentiated_again() -> None:
    packed, x = Packed4bit.quantize(torch.randn(N, WIDE)), leaf(3, WIDE)
    (grad,) = torch.autograd.grad(matmul_4bit(x, packed, compute="int8").square().sum(), x, create_graph=True)
    (got,) = torch.autograd.grad(grad.square().sum(), x)
    weight = packed.dequantize()
    expected = 8 * x @ weight.t() @ weight @ weight.t() @ weight
    assert (got - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("compute", ["int8", "fp8"])
def test_products_in_8_bits_compile_as_one_graph(compute: str) -> None:
    torch._dynamo.reset()
    packed, x = Packed4bit.quantize(torch.randn(N, WIDE)), leaf(3, WIDE)

    def layer(x: Tensor) -> Tensor:
        return matmul_4bit(x, packed, compute=compute).relu()

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    got, expected = compiled(x), layer(x)
    assert torch.equal(got, expected)
    assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in (got, expected)))


def test_what_cannot_be_computed_in_8_bits_is_named() -> None:
    with pytest.raises(ValueError, match="computes in 'int8', 'fp8' or None, got 'int4'"):
        matmul_4bit(torch.randn(3, K), weight(), compute="int4")
    with pytest.raises(ValueError, match="whole blocks, got 40 columns in blocks of 64"):
        matmul_4bit(torch.randn(3, K), weight(), compute="int8")
