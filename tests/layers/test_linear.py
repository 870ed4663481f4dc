"""The layers against float64: the quantised arithmetic simulated, and the exact products."""

import copy
import pickle

import pytest
import torch
from float64_formats import ARITHMETIC
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lq_plugin.formats import TRAINABLE_FORMATS, Fp8Rowwise, Fp8Tensorwise
from lq_plugin.formats.gemm import HighPrecision
from lq_plugin.layers.linear import QuantLinear, linear

OPTIONS = [Fp8Tensorwise(power_of_two=True), Fp8Rowwise(power_of_two=True)]
FORMATS = TRAINABLE_FORMATS | {formats.name: formats for formats in OPTIONS}
NAMES = list(FORMATS)
SIMULATED = [name for name in NAMES if name.startswith("sim_")]
TENSORWISE_INPUT = [name for name in NAMES if name.startswith(("fp8_tensorwise", "sim_fp8_global"))]

# The largest relative errors of grad_input and grad_weight against the exact ones, for operands that have a normal
# distribution times a scale for each row. Rounding to 1/127 of a maximum of 3 to 4 standard deviations adds noise of
# 3.5/127/sqrt(12) = 0.8 % for an operand with a scale for each row, and 1/127/sqrt(12) * sqrt(3) = 0.4 % for the
# uniform weight. Rounding to a mantissa of 3 bits adds 2.6 %, of 2 bits 5.2 %: the mean of (2^-4 / m)^2 / 3 over 1 < m
# < 2; bitsandbytes' floats are as fine. With one scale for a column over all tokens int8 rounds to 1/127 of the largest
# token, at most sqrt(512) = 23 times the root mean square: 5 % for each of two operands.
BOUNDS = {
    "int8_switchback": (0.015, 0.012),
    "int8_rowwise": (0.015, 0.1),
    "fp8_tensorwise": (0.07, 0.07),
    "fp8_rowwise": (0.045, 0.045),
    "sim_fp8_mixed": (0.07, 1e-5),
    "sim_fp8_global": (0.07, 0.07),
}


def bounds(name: str) -> tuple[float, float]:
    """Of the format, or of the one that it is a variant of."""
    of_input, of_weight = next(BOUNDS[key] for key in sorted(BOUNDS, key=len, reverse=True) if name.startswith(key))
    return (of_input, 1e-5) if name.endswith("gw_hp") else (of_input, of_weight)


def heavy_tailed(rows: int, columns: int) -> Tensor:
    """Rows whose scales spread over five orders of magnitude, and one row of zeros."""
    values = torch.randn(rows, columns) * torch.exp(2 * torch.randn(rows, 1))
    values[rows // 2] = 0
    return values


def quantized_linear(name: str, in_features: int, out_features: int, **kwargs: object) -> QuantLinear:
    layer = QuantLinear(in_features, out_features, **kwargs)
    layer.formats = FORMATS[name]
    return layer


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("tokens", "in_features", "out_features"), [(13, 83, 332), (37, 332, 83), (1, 1, 5), (64, 128, 64)]
)
def test_output_and_gradients_are_those_of_the_float64_simulation(
    name: str, tokens: int, in_features: int, out_features: int
) -> None:
    torch.manual_seed(tokens)
    layer = quantized_linear(name, in_features, out_features)
    x, grad = heavy_tailed(tokens, in_features).requires_grad_(), heavy_tailed(tokens, out_features)
    if tokens == 1:
        x, grad = torch.randn(1, in_features, requires_grad=True), torch.randn(1, out_features)
    output = layer(x)
    output.backward(grad)
    assert layer.bias is not None
    expected = ARITHMETIC[name](x.detach(), layer.weight.detach(), layer.bias.detach(), grad)
    for got, want in zip((output, x.grad, layer.weight.grad, layer.bias.grad), expected, strict=True):
        # Scales, bias and grad_weight are float32: 332 roundings of 6e-8 are 2e-5 at the very worst.
        assert relative_error(got, want) < 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_heavy_tailed_gradient_stays_close_to_the_exact_one(name: str) -> None:
    torch.manual_seed(1)
    layer = quantized_linear(name, 256, 192)
    x, grad = heavy_tailed(512, 256).requires_grad_(), heavy_tailed(512, 192)
    layer(x).backward(grad)
    of_input, of_weight = bounds(name)
    assert relative_error(x.grad, grad @ layer.weight.detach()) < of_input
    assert relative_error(layer.weight.grad, grad.t() @ x.detach()) < of_weight


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_has_the_dtype_and_shape_of_linear(name: str, dtype: torch.dtype) -> None:
    layer, plain = quantized_linear(name, 24, 40, dtype=dtype), nn.Linear(24, 40, dtype=dtype)
    x = torch.randn(2, 3, 24, dtype=dtype, requires_grad=True)
    output = layer(x)
    assert output.dtype == plain(x).dtype
    assert output.shape == plain(x).shape
    output.float().sum().backward()
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == x.grad.dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_inside_autocast_the_output_has_the_autocast_dtype(name: str) -> None:
    layer = quantized_linear(name, 24, 40)
    x = torch.randn(7, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32
    assert relative_error(output, nn.functional.linear(x, layer.weight, layer.bias)) < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_inside_autocast_gradients_of_float32_parameters_are_not_rounded_to_bfloat16(name: str) -> None:
    layer = quantized_linear(name, 24, 40)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(torch.randn(301, 24))
    output.backward(torch.ones_like(output))
    assert torch.equal(layer.bias.grad, torch.full((40,), 301.0))  # bfloat16 has 300 and 302
    if not isinstance(layer.formats.grad_weight, HighPrecision):
        assert not torch.equal(layer.weight.grad, layer.weight.grad.bfloat16().float())


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens_and_no_bias_work(name: str) -> None:
    layer = quantized_linear(name, 8, 4, bias=False)
    x = torch.randn(0, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, 8)
    assert torch.equal(layer.weight.grad, torch.zeros(4, 8))


@pytest.mark.parametrize("name", NAMES)
def test_frozen_weight_and_constant_input_get_no_gradient(name: str) -> None:
    layer = quantized_linear(name, 8, 4)
    layer.weight.requires_grad_(False)
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.weight.grad is None
    assert torch.equal(layer.bias.grad, torch.full((4,), 3.0))


@pytest.mark.parametrize("name", NAMES)
def test_compiled_equals_eager_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()  # each format is another graph, and they are more than it keeps
    layer = quantized_linear(name, 24, 40)
    x = torch.randn(7, 24)
    results = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        output = function(leaf)
        output.square().sum().backward()
        results.append((output.detach(), leaf.grad, layer.weight.grad.clone(), layer.bias.grad.clone()))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing_changes_nothing(name: str) -> None:
    layer = quantized_linear(name, 24, 40)
    gradients = []
    for checkpointed in (False, True):
        layer.zero_grad()
        x = torch.linspace(-1, 1, 72).view(3, 24).requires_grad_()
        output = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        output.square().sum().backward()
        gradients.append((x.grad, layer.weight.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])


T, I, O = 48, 64, 32  # noqa: E741 - the names of sizes
VALUES, CODES = 4 * T * I, T * I
# What lies between forward and backward in bytes: of the input, and of the weight beside itself, which lives anyway.
SAVED = {
    "int8_switchback": (VALUES, 4),  # and the amax of the weight
    "int8_switchback_vectorwise": (VALUES, 4 * I),
    "int8_switchback_mem_efficient": (CODES + 4 * T, 4),
    "int8_rowwise": (VALUES + 4 * I, 4 * I),
    "fp8_tensorwise": (CODES + 4, 4),
    "fp8_rowwise": (VALUES + 4 * I, 4 * I),
    "fp8_rowwise_with_gw_hp": (VALUES, 4 * I),
    "sim_fp8_mixed": (VALUES, 0),
    "sim_fp8_global": (VALUES, 0),
}


def saved_by(layer: QuantLinear, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the tensors that wait for backward, without those that are the weight."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        output = layer(x)
    return output, [t for t in saved if t.data_ptr() != layer.weight.data_ptr()]


@pytest.mark.parametrize("name", SAVED)
def test_so_many_bytes_are_saved_for_the_gradients_that_are_needed(name: str) -> None:
    of_input, of_weight = SAVED[name]
    for trains_x, trains_weight in ((True, True), (False, True), (True, False)):
        layer = quantized_linear(name, I, O)
        layer.weight.requires_grad_(trains_weight)
        output, saved = saved_by(layer, torch.randn(T, I, requires_grad=trains_x))
        assert sum(t.nbytes for t in saved) == trains_weight * of_input + trains_x * of_weight
        output.sum().backward()


class Ops(TorchDispatchMode):
    """The names of ours that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lq":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_nothing_is_made_for_backward_and_the_output_is_the_same(name: str) -> None:
    layer, x = quantized_linear(name, I, O), torch.randn(T, I)
    with torch.no_grad(), Ops() as ops:
        output = layer(x)
    assert len(ops.names) == (2 if name in SIMULATED else 3)
    assert not [op for op in ops.names if op.endswith("amax")]
    assert not output.requires_grad
    assert torch.equal(output, layer(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_computes_the_same(name: str, duplicate: object) -> None:
    layer = quantized_linear(name, 24, 40)
    x = torch.randn(3, 24)
    assert torch.equal(duplicate(layer)(x), layer(x))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_two_batches_add_up(name: str) -> None:
    layer, batches = quantized_linear(name, 24, 40), [torch.randn(7, 24), torch.randn(5, 24)]
    single = []
    for batch in batches:
        layer.zero_grad()
        layer(batch).square().sum().backward()
        single.append((layer.weight.grad.clone(), layer.bias.grad.clone()))
    layer.zero_grad()
    for batch in batches:
        layer(batch).square().sum().backward()
    for got, first, second in zip((layer.weight.grad, layer.bias.grad), *single, strict=True):
        assert torch.equal(got, first + second)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shared", ["module", "weight"])
def test_a_module_used_twice_and_a_tied_weight_get_the_sum_of_their_gradients(name: str, shared: str) -> None:
    first, second = (quantized_linear(name, 24, 24, bias=False) for _ in range(2))
    second.load_state_dict(first.state_dict())
    tied = first if shared == "module" else quantized_linear(name, 24, 24, bias=False)
    x = torch.randn(5, 24)
    second(first(x)).square().sum().backward()
    expected = second.weight.grad + first.weight.grad
    first.zero_grad()
    tied.weight = first.weight
    tied(first(x)).square().sum().backward()
    assert torch.equal(first.weight.grad, expected)


@pytest.mark.parametrize("name", NAMES)
def test_an_update_of_the_weight_is_seen_by_the_next_forward(name: str) -> None:
    layer, x = quantized_linear(name, 24, 40), torch.randn(3, 24)
    for training in (True, False):
        layer.train(training)
        before = layer(x)
        with torch.no_grad():
            layer.weight.mul_(2)
        assert not torch.equal(layer(x), before)


def test_a_weight_that_changes_before_backward_is_an_error_as_in_linear() -> None:
    layer = quantized_linear("fp8_rowwise", 24, 40)
    output = layer(torch.randn(3, 24, requires_grad=True))
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_a_transposed_weight_and_an_expanded_gradient_work(name: str) -> None:
    """Conv1D stores (I, O); sum() sends back one value that is expanded."""
    stored = torch.randn(24, 40, requires_grad=True)
    x = torch.randn(5, 24, requires_grad=True)
    linear(x, stored.t(), None, FORMATS[name]).sum().backward()
    grad = torch.ones(5, 40)
    expected = ARITHMETIC[name](x.detach(), stored.detach().t(), torch.zeros(40), grad)
    assert relative_error(x.grad, expected[1]) < 2e-5
    assert relative_error(stored.grad, expected[2].t()) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", ["int8_switchback", "fp8_rowwise", "sim_fp8_mixed"])
def test_inputs_that_are_no_training_floats_are_refused(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"input of {dtype}, expected float32, float16 or bfloat16; cast it first"):
        linear(torch.ones(2, 8, dtype=dtype), torch.randn(8, 8), None, FORMATS[name])


def test_an_input_of_another_dtype_than_the_weight_is_refused_as_linear_does() -> None:
    with pytest.raises(TypeError, match=r"input of torch\.float16 and a weight of torch\.float32: cast one, or"):
        quantized_linear("int8_switchback", 8, 8)(torch.randn(2, 8, dtype=torch.float16))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")  # torch.nn.init
@pytest.mark.parametrize("name", NAMES)
def test_without_features_the_output_is_the_bias(name: str) -> None:
    layer = quantized_linear(name, 0, 5)
    with torch.no_grad():
        layer.bias.copy_(torch.arange(5.0))
    x = torch.randn(3, 0, requires_grad=True)
    output = layer(x)
    output.sum().backward()
    assert torch.equal(output, layer.bias.expand(3, 5))
    assert x.grad.shape == (3, 0)
    assert layer.weight.grad.shape == (5, 0)
    assert torch.equal(layer.bias.grad, torch.full((5,), 3.0))


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_in_one_token_reaches_the_output_and_the_loss_sees_it(name: str) -> None:
    x = torch.randn(5, 24)
    x[2, 7] = float("nan")
    output = quantized_linear(name, 24, 40)(x)
    assert output[2].isnan().all()
    others = output[[0, 1, 3, 4]]
    # One scale for all tokens is NaN for all; with a scale for each the others do not notice.
    assert others.isnan().all() if name in TENSORWISE_INPUT else others.isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SIMULATED])
def test_products_past_float32_are_infinite_and_subnormal_operands_are_zero(name: str) -> None:
    layer = quantized_linear(name, 24, 40, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1e30)
    assert torch.equal(layer(torch.full((3, 24), 1e30)), torch.full((3, 40), float("inf")))
    assert torch.equal(layer(torch.full((3, 24), 1e-40)), torch.zeros(3, 40))


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_penalty_is_refused_instead_of_being_dropped(name: str) -> None:
    x = torch.randn(5, 24, requires_grad=True)
    loss = quantized_linear(name, 24, 40)(x).sum()
    with pytest.raises(RuntimeError, match=f"{name} has no gradient of its gradient, and create_graph=True asks for"):
        torch.autograd.grad(loss, x, create_graph=True)
