"""Linear8bitLt against float64: frozen and trained, with outliers and heavy tails, and what its files hold."""

import copy
import io
import pickle

import pytest
import torch
from frozen_reference import int8_weight
from torch import Tensor, nn

from lq_plugin.formats import FORMATS, LLMInt8
from lq_plugin.layers import Linear8bitLt


def quantized(x: Tensor, dim: int) -> Tensor:
    """x after a round trip through int8 with a scale along dim; codes from float32, values in float64."""
    amax = x.float().abs().amax(dim, keepdim=True)
    factor = torch.full_like(amax, 127) / amax
    return torch.where(amax > 0, torch.round(x.float() * factor), 0.0).double() * (amax.double() / 127)


def with_outliers(x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """(the int8 part of x, its outlier columns): inliers set the scale, whole columns leave the codes."""
    outlier = x.abs() >= threshold
    column = outlier.any(dim=0)
    amax = x.masked_fill(outlier, 0.0).abs().amax(1, keepdim=True)
    factor = torch.full_like(amax, 127) / amax
    codes = torch.where(amax > 0, torch.round(x.masked_fill(column, 0.0) * factor), 0.0)
    return codes.double() * (amax.double() / 127), x.double().masked_fill(~column, 0.0)


def heavy_tailed(rows: int, columns: int) -> Tensor:
    """Tokens whose scales spread over five orders of magnitude, and one of zeros."""
    values = torch.randn(rows, columns) * torch.exp(2 * torch.randn(rows, 1))
    values[rows // 2] = 0
    return values


def relative_error(got: Tensor, expected: Tensor) -> float:
    expected = expected.detach()
    return float((got.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("threshold", [0.0, 3.0])
@pytest.mark.parametrize(("tokens", "in_features", "out_features"), [(13, 83, 37), (3, 1000, 5), (64, 128, 64)])
def test_the_frozen_layer_is_its_float64_simulation(
    threshold: float, tokens: int, in_features: int, out_features: int
) -> None:
    layer = LLMInt8(threshold).freeze(nn.Linear(in_features, out_features))
    weight = int8_weight(layer.state_dict())
    x, grad = heavy_tailed(tokens, in_features).requires_grad_(), heavy_tailed(tokens, out_features)
    output = layer(x)
    output.backward(grad)
    inliers, outliers = with_outliers(x.detach(), threshold) if threshold else (quantized(x.detach(), 1), 0.0)
    expected = (inliers + outliers) @ weight.t() + layer.bias.detach().double()
    # Scales and bias are float32, and so are the sums over outlier columns.
    assert relative_error(output, expected) < 2e-6
    assert relative_error(x.grad, grad.double() @ weight) < 2e-6
    assert relative_error(layer.bias.grad, grad.double().sum(0)) < 2e-6
    assert layer.weight.grad is None


@pytest.mark.parametrize("train", [True, False])
def test_the_trained_layer_has_the_gradient_of_column_scales(train: bool) -> None:
    layer = Linear8bitLt(96, 40).train(train)
    x, grad = heavy_tailed(200, 96).requires_grad_(), heavy_tailed(200, 40)
    output = layer(x)
    output.backward(grad)
    weight = quantized(layer.weight.detach(), 1)
    assert relative_error(output, quantized(x.detach(), 1) @ weight.t() + layer.bias.detach().double()) < 2e-6
    assert relative_error(x.grad, grad.double() @ weight) < 2e-6
    assert relative_error(layer.weight.grad, quantized(grad, 0).t() @ quantized(x.detach(), 0)) < 2e-5


def test_column_scales_serve_tokens_of_any_scale_where_row_codes_with_them_do_not() -> None:
    layer = Linear8bitLt(96, 40)
    x, grad = torch.randn(400, 96), torch.randn(400, 40) * torch.exp(torch.randn(400, 1))
    layer(x).backward(grad)
    exact = grad.double().t() @ x.double()
    # Noise of 1/127 of a column's largest value, which is 10 to 20 times its typical one here.
    assert relative_error(layer.weight.grad, exact) < 0.06
    # As bitsandbytes has computed it since 0.45: the codes of rows, scaled back by the maxima of columns.
    row_codes = torch.round(grad * 127 / grad.abs().amax(1, keepdim=True)).double()
    wrong = (row_codes * grad.abs().amax(0) / 127).t() @ quantized(x, 0)
    assert relative_error(wrong, exact) > 20 * relative_error(layer.weight.grad, exact)


def test_with_a_threshold_the_weight_gradient_is_that_of_the_floats() -> None:
    layer = Linear8bitLt(96, 40, threshold=3.0)
    x, grad = heavy_tailed(50, 96), heavy_tailed(50, 40)
    layer(x).backward(grad)
    assert relative_error(layer.weight.grad, grad.double().t() @ x.double()) < 2e-6


def test_a_trained_layer_never_uses_the_codes_of_an_older_weight() -> None:
    layer = Linear8bitLt(32, 8, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    x = torch.randn(5, 32)
    for mode in (True, False):
        layer.train(mode)
        layer(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # the gradient is there, and zero
        expected = quantized(x, 1) @ quantized(layer.weight.detach(), 1).t()
        assert relative_error(layer(x), expected) < 2e-6


def test_errors_are_within_bitsandbytes_table() -> None:
    plain = nn.Linear(32, 64)
    layer, trained = LLMInt8(0.0).freeze(plain), Linear8bitLt(32, 64)
    trained.load_state_dict(plain.state_dict())
    x = torch.randn(16, 8, 32)
    for ours in (layer, trained):
        error = (ours(x) - plain(x)).abs()
        assert (error > 0.02).double().mean() <= 2.5e-4
        assert error.max() < 0.03
    assert torch.equal(layer(x), trained(x))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_of_any_float_dtype_and_autocast_give_what_linear_gives(
    frozen: bool, threshold: float, dtype: torch.dtype
) -> None:
    layer = Linear8bitLt(64, 16, has_fp16_weights=not frozen, threshold=threshold)
    x = torch.randn(2, 7, 64)
    output = layer(x.to(dtype))
    assert output.dtype == dtype
    assert (layer.bias.dtype, layer.weight.dtype) == (torch.float32, torch.int8 if frozen else torch.float32)
    assert relative_error(output, nn.functional.linear(x, layer.dequantize(), layer.bias).double()) < 0.02
    if dtype == torch.float32:
        return
    with torch.autocast("cpu", dtype):
        inside = layer(x)
    assert torch.equal(inside, output)
    inside.float().sum().backward()
    assert layer.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_empty_inputs_give_empty_outputs(threshold: float) -> None:
    for frozen in (True, False):
        assert Linear8bitLt(8, 4, has_fp16_weights=frozen, threshold=threshold)(torch.randn(3, 0, 8)).shape == (3, 0, 4)


def test_files_are_those_of_bitsandbytes_and_half_the_size() -> None:
    linear = nn.Linear(256, 128)
    layer, other = FORMATS["llm_int8"].freeze(linear), FORMATS["llm_int8"].freeze(nn.Linear(256, 128))
    state = layer.state_dict()
    assert {k: (v.dtype, tuple(v.shape)) for k, v in state.items()} == {
        "weight": (torch.int8, (128, 256)),
        "SCB": (torch.float32, (128,)),
        "weight_format": (torch.uint8, ()),
        "bias": (torch.float32, (128,)),
    }
    torch.testing.assert_close(state["SCB"], linear.weight.detach().abs().amax(1), rtol=1e-6, atol=0)
    files = [io.BytesIO(), io.BytesIO()]
    torch.save(state, files[0])
    torch.save(copy.deepcopy(linear).half().state_dict(), files[1])
    assert files[0].tell() < 0.6 * files[1].tell()
    files[0].seek(0)
    other.load_state_dict(torch.load(files[0], weights_only=True))
    x = torch.randn(3, 256)
    assert torch.equal(other(x), layer(x))
    other.load_state_dict({k: v for k, v in state.items() if k != "weight_format"})
    assert set(Linear8bitLt(256, 128).state_dict()) == {"weight", "bias"}


def test_casts_and_copies_leave_codes_and_maxima_exact() -> None:
    layer = FORMATS["llm_int8"].freeze(nn.Linear(64, 16))
    before = {name: tensor.clone() for name, tensor in layer.code_tensors().items()}
    for after in (
        copy.deepcopy(layer).half(),
        copy.deepcopy(layer).to(torch.bfloat16).float(),
        copy.deepcopy(layer).type(torch.float16),
        pickle.loads(pickle.dumps(layer)),
    ):
        assert all(torch.equal(after.code_tensors()[name], tensor) for name, tensor in before.items())
    assert copy.deepcopy(Linear8bitLt(8, 8)).half().weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_format": torch.tensor(1, dtype=torch.uint8)}, "weight_format 1, the layout col32 of older GPUs"),
        ({"weight_format": torch.tensor(2, dtype=torch.uint8)}, "the layout col_turing"),
        ({"weight_format": torch.tensor(3, dtype=torch.uint8)}, "the layout col_ampere"),
        ({"weight_format": torch.tensor(9, dtype=torch.uint8)}, "weight_format 9, expected 0"),
        ({"SCB": torch.ones(15)}, r"SCB must be torch.float32 \(16,\), the file has torch.float32 \(15,\)"),
        ({"weight": torch.ones(16, 63, dtype=torch.int8)}, r"weight must be torch.int8 \(16, 64\)"),
        ({"weight": torch.ones(16, 64, dtype=torch.uint8)}, "weight must be torch.int8"),
        ({"SCB": None}, r'Missing key\(s\) in state_dict: "SCB"'),
        ({"weight": None}, r'Missing key\(s\) in state_dict: "weight"'),
        ({"weight.absmax": torch.ones(4)}, r'Unexpected key\(s\) in state_dict: "weight.absmax"'),
    ],
)
def test_what_cannot_be_read_is_named_and_changes_nothing(changes: dict[str, Tensor | None], message: str) -> None:
    layer = FORMATS["llm_int8"].freeze(nn.Linear(64, 16))
    before = layer.dequantize()
    state = FORMATS["llm_int8"].freeze(nn.Linear(64, 16)).state_dict() | changes
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict({k: v for k, v in state.items() if v is not None})
    assert torch.equal(layer.dequantize(), before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes", "ignore::FutureWarning:bitsandbytes")
def test_states_of_bitsandbytes_load_and_ours_are_theirs() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    theirs = bnb.nn.Linear8bitLt(64, 16, has_fp16_weights=False).to("cpu")
    ours = Linear8bitLt(64, 16, has_fp16_weights=False)
    state = theirs.state_dict()
    ours.load_state_dict(state)
    torch.testing.assert_close(ours.dequantize(torch.float32).double(), int8_weight(state), rtol=1e-6, atol=0)
    again = ours.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) and again[key].dtype == state[key].dtype for key in state)


def test_int8_of_a_layer_does_not_load_into_one_that_trains() -> None:
    with pytest.raises(RuntimeError, match="Unexpected key"):
        Linear8bitLt(64, 16).load_state_dict(FORMATS["llm_int8"].freeze(nn.Linear(64, 16)).state_dict())


def test_a_float_weight_is_quantised_as_it_is_loaded() -> None:
    linear, layer = nn.Linear(64, 16), Linear8bitLt(64, 16, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.dequantize(), FORMATS["llm_int8"].freeze(linear).dequantize())
    with pytest.raises(ValueError, match="threshold=-1"):
        LLMInt8(-1)


@pytest.mark.integration
@pytest.mark.parametrize("frozen", [True, False])
def test_a_compiled_layer_gives_what_it_gave(frozen: bool) -> None:
    layer = Linear8bitLt(64, 16, has_fp16_weights=not frozen, threshold=2.0)
    x = torch.randn(5, 64, requires_grad=True)
    expected = layer(x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    output = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), x)[0], gradient)
