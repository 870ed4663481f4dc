"""The layers against float64: the quantised arithmetic simulated, and the exact products."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lq_plugin.formats import FORMATS
from lq_plugin.layers import SwitchBackLinear, SwitchBackLinearGlobalMemEfficient, SwitchBackLinearVectorwise
from lq_plugin.layers.linear import QuantLinear, linear

NAMES = list(FORMATS)


def simulated_int8(x: Tensor, dim: int | None) -> Tensor:
    """x after a round trip through int8; one scale along dim, or for the whole tensor. The products are float64's."""
    amax = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    factor = torch.full_like(amax, 127) / amax  # float32, as the definition of the codes has it
    return torch.where(amax > 0, torch.round(x * factor), 0.0).double() * (amax.double() / 127)


def simulation(name: str, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """output, grad_input, grad_weight, grad_bias of one SwitchBack layer in float64 (spec: the paper, section 2)."""
    vectorwise = name.endswith("vectorwise")
    output = simulated_int8(x, 1) @ simulated_int8(weight, 1 if vectorwise else None).t() + bias.double()
    grad_input = simulated_int8(grad, 1) @ simulated_int8(weight, 0 if vectorwise else None)
    kept = simulated_int8(x, 1) if name.endswith("mem_efficient") else x.double()
    return output, grad_input, grad.double().t() @ kept, grad.double().sum(0)


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
    expected = simulation(name, x.detach(), layer.weight.detach(), layer.bias.detach(), grad)
    for got, want in zip((output, x.grad, layer.weight.grad, layer.bias.grad), expected, strict=True):
        # Scales, bias and grad_weight are float32: 332 roundings of 6e-8 are 2e-5 at the very worst.
        assert relative_error(got, want) < 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_heavy_tailed_gradient_stays_close_to_the_exact_one(name: str) -> None:
    torch.manual_seed(1)
    layer = quantized_linear(name, 256, 192)
    x, grad = heavy_tailed(512, 256).requires_grad_(), heavy_tailed(512, 192)
    layer(x).backward(grad)
    # Rounding to 1/127 of the maximum (3 to 4 standard deviations here) adds noise of 3.5/127/sqrt(12) = 0.8 %
    # for each operand that is quantised by row, and 1/127/sqrt(12) * sqrt(3) = 0.4 % for the uniform weight.
    assert relative_error(x.grad, grad @ layer.weight.detach()) < 0.015
    assert relative_error(layer.weight.grad, grad.t() @ x.detach()) < 0.012


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
    assert relative_error(output, nn.functional.linear(x, layer.weight, layer.bias)) < 0.02


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


def test_the_memory_efficient_variant_saves_int8_instead_of_the_input() -> None:
    layer = SwitchBackLinearGlobalMemEfficient(64, 32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        layer(torch.randn(16, 64, requires_grad=True))
    activations = [t for t in saved if t.data_ptr() != layer.weight.data_ptr()]
    assert {t.dtype: tuple(t.shape) for t in activations} == {torch.int8: (16, 64), torch.float32: (16, 1)}
    assert sum(t.numel() * t.element_size() for t in activations) == 16 * 64 + 16 * 4


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_computes_the_same(duplicate: object) -> None:
    layer = SwitchBackLinearVectorwise(24, 40)
    x = torch.randn(3, 24)
    assert torch.equal(duplicate(layer)(x), layer(x))


def test_state_dict_is_that_of_a_linear_layer() -> None:
    layer, plain = SwitchBackLinear(24, 40), nn.Linear(24, 40)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(plain.weight, layer.weight)


def test_an_update_of_the_weight_is_seen_by_the_next_forward() -> None:
    layer = SwitchBackLinear(24, 40)
    x = torch.randn(3, 24)
    for training in (True, False):
        layer.train(training)
        before = layer(x)
        with torch.no_grad():
            layer.weight.mul_(2)
        assert not torch.equal(layer(x), before)


def test_vectorwise_and_memory_efficient_together_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"vectorwise variant cannot be memory-efficient; take int8_switchback_vectorwise or"
    ):
        SwitchBackLinear(8, 8, vector_wise_quantization=True, mem_efficient=True)


def test_an_input_of_another_dtype_is_refused_as_linear_does() -> None:
    with pytest.raises(TypeError, match=r"input of torch\.float16 and a weight of torch\.float32: cast one, or"):
        SwitchBackLinear(8, 8)(torch.randn(2, 8, dtype=torch.float16))
    with pytest.raises(TypeError, match=r"input of torch\.float64, expected float32, float16 or bfloat16"):
        linear(torch.randn(2, 8).double(), torch.randn(8, 8).double(), None, FORMATS["int8_switchback"])


def test_a_nan_in_one_token_reaches_the_output_of_that_token_alone() -> None:
    x = torch.randn(5, 24)
    x[2, 7] = float("nan")
    output = SwitchBackLinear(24, 40)(x)
    assert output[2].isnan().all()
    assert output[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_penalty_is_refused_instead_of_being_dropped(name: str) -> None:
    x = torch.randn(5, 24, requires_grad=True)
    loss = quantized_linear(name, 24, 40)(x).sum()
    with pytest.raises(RuntimeError, match=f"{name} has no gradient of its gradient, and create_graph=True asks for"):
        torch.autograd.grad(loss, x, create_graph=True)
