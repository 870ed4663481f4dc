"""Simulated fp8 against a simulation of single blocks, and products in float64."""

import pytest
import torch
from hostile import FLOATS, heavy_tailed
from lq_kernels.blockwise import dequantize_blockwise, quantize_blockwise
from lq_kernels.codebooks import create_fp8_map
from lq_kernels.fake_quantize import LARGEST_BLOCK, fake_quantize_blockwise, fake_quantize_tensorwise
from lq_kernels.simulated_fp8 import matmul_fp8_global, matmul_fp8_mixed, simulated_block_size
from samples_fake_quantize import fp8_map
from torch import Tensor

E4M3, E5M2 = fp8_map(4, 3), fp8_map(5, 2)


def nearest(v: Tensor, code: Tensor) -> Tensor:
    """v float32 -> the nearest value of the code book, the lower of two: by search among the midpoints."""
    return code[torch.searchsorted((code[1:] + code[:-1]) / 2, v)].double()


def rounded(x: Tensor, code: Tensor, block_size: int | None = None, row_length: int | None = None) -> Tensor:
    """x float, its blocks one after the other -> float64; without a block size one scale for all."""
    out = []
    for row in x.float().reshape(-1, row_length or x.numel()):
        for block in row.split(block_size or x.numel()):
            amax = block.abs().max()
            v = block * (torch.ones(()) / amax) if block_size else block / amax
            out.append(nearest(v, code) * amax.double() if amax else block.double())
    return torch.cat(out).view(x.shape)


def close(got: Tensor, expected: Tensor) -> None:
    """Up to the rounding to the dtype of `got`, and float32's roundings of quotient and product."""
    eps = torch.finfo(got.dtype).eps
    tiny = torch.finfo(got.dtype).smallest_normal * eps
    torch.testing.assert_close(got.double(), expected, rtol=eps / 2 + 2.0**-22, atol=tiny)


def test_the_maps_are_bitsandbytes_fp8_and_not_ocps() -> None:
    for code, values, total in (
        (E4M3, {129: 1.0172527e-6, 135: 7.1207683e-6, 143: 6.1035156e-5, 254: 0.93333334}, 24.5326421),
        (E5M2, {129: 3.326152e-11, 132: 5.3218435e-10, 254: 0.85714287}, 12.5714288),
    ):
        for index, value in values.items():
            assert code[index].item() == pytest.approx(value, rel=1e-6)
        assert code.abs().sum().item() == pytest.approx(total, rel=1e-7)
        assert (code[[0, 127, 128, 255]] == torch.tensor([-1.0, 0, 0, 1])).all()
    torch.testing.assert_close(create_fp8_map(True, 4, 3, 8), E4M3, rtol=2.0**-23, atol=0)
    torch.testing.assert_close(create_fp8_map(True, 5, 2, 8), E5M2, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("code", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_values_become_the_nearest_of_the_code_book(code: Tensor, dtype: torch.dtype) -> None:
    x = heavy_tailed(7, 130, dtype)
    close(fake_quantize_tensorwise(x, code), rounded(x, code))
    close(fake_quantize_blockwise(x, code, 64, x.numel()), rounded(x, code, 64))
    close(fake_quantize_blockwise(x, code, 64, 130), rounded(x, code, 64, 130))


def test_what_is_rounded_is_rounded_once() -> None:
    x = fake_quantize_tensorwise(heavy_tailed(30, 40), E4M3)
    assert torch.equal(fake_quantize_tensorwise(x, E4M3), x)
    assert len(x.unique()) <= 255


@pytest.mark.parametrize("dtype", FLOATS)
def test_flat_blocks_are_those_of_quantize_blockwise_to_the_bit(dtype: torch.dtype) -> None:
    x = heavy_tailed(9, 333, dtype)
    for block_size in (64, 100, 4096):
        codes, scale = quantize_blockwise(x, E4M3, block_size)
        expected = dequantize_blockwise(codes, scale, E4M3, block_size, dtype)
        assert torch.equal(fake_quantize_blockwise(x, E4M3, block_size, x.numel()), expected)


def test_blocks_of_rows_do_not_see_other_rows() -> None:
    x = heavy_tailed(9, 300)
    by_row = fake_quantize_blockwise(x, E4M3, 512, 300)
    for row, expected in zip(x, by_row, strict=True):
        assert torch.equal(fake_quantize_blockwise(row, E4M3, 512, 300), expected)
    x[4] *= 1e6
    assert torch.equal(fake_quantize_blockwise(x, E4M3, 512, 300)[[3, 5]], by_row[[3, 5]])
    assert not torch.equal(fake_quantize_blockwise(x, E4M3, 512, x.numel())[[3, 5]], by_row[[3, 5]])


def test_what_is_not_finite_shows_in_its_block_or_tensor_and_zeros_stay() -> None:
    x = torch.randn(4, 8)
    x[1, 2], x[2, 3], x[3] = float("nan"), float("inf"), 0.0
    got = fake_quantize_blockwise(x, E4M3, 64, 8)
    assert got.isnan().all(dim=1).tolist() == [False, True, True, False]
    assert got[3].count_nonzero() == 0
    assert fake_quantize_tensorwise(x, E4M3).isnan().all()
    assert fake_quantize_tensorwise(torch.zeros(3), E4M3).count_nonzero() == 0


@pytest.mark.parametrize(
    ("features", "block_size"),
    [(1, 64), (64, 64), (65, 128), (129, 256), (512, 512), (768, 1024), (1025, 2048), (2049, 4096), (28672, 4096)],
)
def test_the_block_size_is_bitsandbytes_rule(features: int, block_size: int) -> None:
    assert simulated_block_size(features) == block_size


def mixed_by_hand(a: Tensor, b: Tensor, grad: Tensor, sizes: tuple[int, int], by_row: bool) -> tuple[Tensor, ...]:
    """output, gradient of a and gradient of b in float64."""
    K, N = b.shape
    rounded_b = rounded(b, E4M3)
    rounded_a = rounded(a, E4M3, sizes[0], K if by_row else None)
    rounded_grad = rounded(grad, E5M2, sizes[1], N if by_row else None)
    grad_b = a.double().reshape(-1, K).t() @ grad.double().reshape(-1, N)
    return rounded_a @ rounded_b, rounded_grad @ rounded_b.t(), grad_b


def global_by_hand(a: Tensor, b: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    K, N = b.shape
    rounded_a, rounded_b = rounded(a, E4M3), rounded(b, E4M3)
    rounded_grad = rounded(grad, E5M2)
    return rounded_a @ rounded_b, rounded_grad @ rounded_b.t(), rounded_a.view(-1, K).t() @ rounded_grad.view(-1, N)


def with_gradients(function, a: Tensor, b: Tensor, grad: Tensor, *args, **kwargs) -> tuple[Tensor, ...]:
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    output = function(a, b, E4M3.to(a.device), E5M2.to(a.device), *args, **kwargs)
    output.backward(grad)
    grad_a, grad_b = a.grad, b.grad
    assert grad_a is not None
    assert grad_b is not None
    assert grad_a.dtype == a.dtype == output.dtype == grad_b.dtype
    return output.detach(), grad_a, grad_b


def near(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for value, reference in zip(got, expected, strict=True):
        # Each operand is rounded once to the dtype, then the sum.
        tolerance = 4 * torch.finfo(value.dtype).eps
        largest = float(reference.abs().max())
        torch.testing.assert_close(value.double(), reference, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1,), (2, 1, 3)])
@pytest.mark.parametrize("by_row", [False, True])
def test_the_mixed_product_and_its_gradients(shape: tuple[int, ...], dtype: torch.dtype, by_row: bool) -> None:
    a = (torch.randn(*shape, 100) * torch.exp(torch.randn(*shape, 1))).to(dtype)
    b, grad = torch.randn(100, 70).to(dtype), torch.randn(*shape, 70).to(dtype)
    expected = mixed_by_hand(a, b, grad, (64, 32), by_row)
    near(with_gradients(matmul_fp8_mixed, a, b, grad, 64, 32, by_row=by_row), expected)
    # A weight comes as the transpose of a parameter.
    near(with_gradients(matmul_fp8_mixed, a, b.t().contiguous().t(), grad, 64, 32, by_row=by_row), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1,)])
def test_the_global_product_and_its_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a, b, grad = torch.randn(*shape, 100).to(dtype), torch.randn(100, 70).to(dtype), torch.randn(*shape, 70).to(dtype)
    expected = global_by_hand(a, b, grad)
    near(with_gradients(matmul_fp8_global, a, b, grad), expected)
    near(with_gradients(matmul_fp8_global, a, b.t().contiguous().t(), grad), expected)


def test_block_sizes_follow_the_features_when_they_are_not_given() -> None:
    a, b, grad = torch.randn(5, 100), torch.randn(100, 300), torch.randn(5, 300)
    got = with_gradients(matmul_fp8_mixed, a, b, grad)
    for value, expected in zip(got, with_gradients(matmul_fp8_mixed, a, b, grad, 128, 512), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("function", [matmul_fp8_mixed, matmul_fp8_global])
def test_products_stay_within_the_published_tolerances(function) -> None:
    a, b = torch.randn(64, 256), torch.randn(256, 128) / 16
    grad = torch.randn(64, 128) / 64
    output, grad_a, grad_b = with_gradients(function, a, b, grad)
    assert (output - a @ b).abs().mean() < 0.115
    torch.testing.assert_close(grad_a, grad @ b.t(), atol=0.015, rtol=0.1)
    exact = a.t() @ grad
    assert (~torch.isclose(grad_b, exact, 0.3, 0.06)).float().mean() <= 0.1
    assert (~torch.isclose(grad_b, exact, 0.3, 0.1)).float().mean() <= 0.02
    torch.testing.assert_close(grad_b, exact, atol=0.18, rtol=0.3)
    assert grad_b.count_nonzero() == grad_b.numel()


@pytest.mark.parametrize("function", [matmul_fp8_mixed, matmul_fp8_global])
@pytest.mark.parametrize(
    ("shape_a", "shape_b"),
    [((0, 5), (5, 7)), ((3, 5), (5, 0)), ((3, 0), (0, 7)), ((2, 0, 5), (5, 7)), ((0, 0), (0, 0))],
)
def test_empty_operands_give_zeros_and_zero_gradients(
    function, shape_a: tuple[int, ...], shape_b: tuple[int, int]
) -> None:
    a, b = torch.randn(shape_a), torch.randn(shape_b)
    grad = torch.randn(*shape_a[:-1], shape_b[1])
    for value, shape in zip(with_gradients(function, a, b, grad), (grad.shape, shape_a, shape_b), strict=True):
        assert torch.equal(value, torch.zeros(shape))


@pytest.mark.parametrize("function", [matmul_fp8_mixed, matmul_fp8_global])
def test_only_the_gradients_that_are_wanted_are_computed(function) -> None:
    a, b = torch.randn(5, 8), torch.randn(8, 3)
    for wanted in ("a", "b"):
        operands = {"a": a.clone().requires_grad_(wanted == "a"), "b": b.clone().requires_grad_(wanted == "b")}
        function(**operands, fw_code=E4M3, bw_code=E5M2).sum().backward()
        assert [name for name, value in operands.items() if value.grad is not None] == [wanted]


@pytest.mark.parametrize("function", [matmul_fp8_mixed, matmul_fp8_global])
def test_tensors_are_kept_where_hooks_see_them_and_an_input_is_kept_as_it_is(function) -> None:
    kept: list[Tensor] = []
    a, b = torch.randn(5, 8, requires_grad=True), torch.randn(8, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        function(a, b, E4M3, E5M2)
    assert any(x.data_ptr() == a.data_ptr() for x in kept)
    assert any(torch.equal(x, fake_quantize_tensorwise(b, E4M3)) for x in kept)
    assert all(x.shape in (a.shape, b.shape, E4M3.shape) for x in kept)


@pytest.mark.parametrize("function", [matmul_fp8_mixed, matmul_fp8_global])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_products_give_what_they_give_in_eager(function, dynamic: bool) -> None:
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for shape in ((5,), (6,), (2, 3)):
        args = torch.randn(*shape, 40), torch.randn(40, 30), torch.randn(*shape, 30)
        for value, expected in zip(with_gradients(compiled, *args), with_gradients(function, *args), strict=True):
            assert torch.equal(value, expected)


@pytest.mark.parametrize("function", [matmul_fp8_mixed, matmul_fp8_global])
def test_a_gradient_of_a_gradient_is_refused(function) -> None:
    a, b = torch.randn(3, 8, requires_grad=True), torch.randn(8, 4)
    for loss in (function(a, b, E4M3, E5M2).square().sum(), function(a, b, E4M3, E5M2).sum()):
        with pytest.raises(RuntimeError, match="has no gradient of its gradient, and create_graph=True asks for one"):
            torch.autograd.grad(loss, a, create_graph=True)


@pytest.mark.parametrize("function", [matmul_fp8_mixed, matmul_fp8_global])
@pytest.mark.parametrize(
    ("a", "b", "code", "error", "message"),
    [
        (torch.zeros(8), torch.zeros(8, 3), E4M3, ValueError, "two dimensions"),
        (torch.zeros(5, 8), torch.zeros(7, 3), E4M3, ValueError, "takes a"),
        (torch.zeros(5, 8), torch.zeros(8), E4M3, ValueError, "takes a"),
        (torch.zeros(5, 8), torch.zeros(8, 3).half(), E4M3, TypeError, "one dtype"),
        (torch.zeros(5, 8).double(), torch.zeros(8, 3).double(), E4M3, TypeError, "float64"),
        (torch.zeros(5, 8), torch.zeros(8, 3), E4M3[:255], ValueError, "code book"),
        (torch.zeros(5, 8), torch.zeros(8, 3), E4M3.double(), ValueError, "code book"),
    ],
)
def test_operands_that_are_refused(function, a, b, code, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function(a, b, code, code)


@pytest.mark.parametrize(
    ("block_size", "row_length", "message"),
    [(0, 5, "1 to 4096"), (LARGEST_BLOCK + 1, 5, "1 to 4096"), (64, 7, "rows of 7"), (64, 0, "rows of 0")],
)
def test_blocks_that_do_not_fit_are_refused(block_size: int, row_length: int, message: str) -> None:
    assert fake_quantize_blockwise.launcher is not None
    for function in (fake_quantize_blockwise, fake_quantize_blockwise.launcher):
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(3, 5), E4M3, block_size, row_length)


def test_no_feature_has_no_block_size() -> None:
    with pytest.raises(ValueError, match="one feature"):
        simulated_block_size(0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_products_on_a_gpu_are_those_of_the_reference(dtype: torch.dtype) -> None:
    a, b, grad = torch.randn(70, 500).to(dtype), torch.randn(500, 300).to(dtype), torch.randn(70, 300).to(dtype)
    for function in (matmul_fp8_mixed, matmul_fp8_global):
        got = with_gradients(function, a.cuda(), b.cuda(), grad.cuda())
        near(tuple(value.cpu() for value in got), tuple(v.double() for v in with_gradients(function, a, b, grad)))


@pytest.mark.gpu
def test_tensors_of_more_than_two_to_the_31_values() -> None:
    x = torch.zeros(2**31 + 4133, device="cuda", dtype=torch.bfloat16)
    x[-5:] = torch.tensor([1.0, -0.4, 0.3, 0.06, 0.001])
    expected = fake_quantize_tensorwise(x[-5:].cpu(), E4M3)
    code = E4M3.cuda()
    assert torch.equal(fake_quantize_tensorwise(x, code)[-5:].cpu(), expected)
    assert torch.equal(fake_quantize_blockwise(x, code, 4096, x.numel())[-5:].cpu(), expected)
