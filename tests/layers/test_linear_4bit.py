"""Linear4bit against float64 and bitsandbytes: products, dtypes, casts, and what its state_dict takes and refuses."""

import copy
import io
import json
import pickle
from collections.abc import Callable

import pytest
import torch
from frozen_reference import four_bit_weight
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lq_plugin.formats import FORMATS, FP4, NF4
from lq_plugin.layers import FrozenLinear, Linear4bit, LinearFP4, LinearNF4

NAMES = ["nf4", "nf4_dq", "fp4", "fp4_dq"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def frozen(name: str, in_features: int = 128, out_features: int = 24, **kwargs: object) -> Linear4bit:
    layer = FORMATS[name].freeze(nn.Linear(in_features, out_features, **kwargs))
    assert isinstance(layer, Linear4bit)
    return layer


def codes(layer: nn.Module) -> dict[str, Tensor]:
    assert isinstance(layer, FrozenLinear)
    return {name: tensor.clone() for name, tensor in layer.code_tensors().items()}


def same_codes(layer: nn.Module, expected: dict[str, Tensor]) -> bool:
    found = codes(layer)
    return all(found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in expected.items())


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("tokens", "in_features", "out_features"), [(13, 128, 24), (1, 37, 5), (7, 1000, 1)])
def test_output_and_gradients_are_those_of_the_weight_in_its_state_dict(
    name: str, tokens: int, in_features: int, out_features: int
) -> None:
    layer = frozen(name, in_features, out_features)
    weight = four_bit_weight(layer.state_dict())[:, :in_features]
    x, grad = torch.randn(tokens, in_features, requires_grad=True), torch.randn(tokens, out_features)
    output = layer(x)
    output.backward(grad)
    assert layer.bias is not None
    # float32 sums of up to 1000 products: 6e-8 * sqrt(1000) is 2e-6, and scales read back in float32 add 1e-7.
    assert relative_error(output, x.detach().double() @ weight.t() + layer.bias.detach().double()) < 4e-6
    assert relative_error(x.grad, grad.double() @ weight) < 4e-6
    assert relative_error(layer.bias.grad, grad.double().sum(0)) < 1e-6
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.dequantize().double(), weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["nf4", "fp4_dq"])
def test_leading_dimensions_and_empty_inputs_are_those_of_linear(name: str) -> None:
    layer = frozen(name)
    x = torch.randn(2, 3, 128, requires_grad=True)
    layer(x).sum().backward()
    assert layer.bias.grad.shape == (24,)
    torch.testing.assert_close(layer.bias.grad, torch.full((24,), 6.0))
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(2, 3, 128))
    assert layer(torch.randn(0, 128)).shape == (0, 24)
    torch.testing.assert_close(layer(x.transpose(0, 1)), layer(x).transpose(0, 1))  # not contiguous


# randn blocks: mean and standard deviation of the absolute and relative error, as bitsandbytes' tests have them.
ERRORS = {
    ("nf4", 64): (0.072798, 0.000074, 0.203339, 0.000340),
    ("fp4", 64): (0.096543, 0.000111, 0.260125, 0.000379),
    ("nf4", 32): (0.067746, 0.000069, 0.189726, 0.000304),
    ("fp4", 128): (0.102969, 0.000134, 0.275817, 0.000433),
    ("nf4", 256): (0.080337, 0.000102, 0.226105, 0.000398),
    ("fp4", 1024): (0.119333, 0.000320, 0.315000, 0.000757),
    ("nf4", 4096): (0.092547, 0.000360, 0.262473, 0.000999),
}


@pytest.mark.parametrize(
    ("quant_type", "block_size"),
    [p if i < 2 else pytest.param(*p, marks=pytest.mark.thorough) for i, p in enumerate(ERRORS)],
)
def test_the_error_of_a_weight_is_within_the_published_table(quant_type: str, block_size: int) -> None:
    mean, std, relative_mean, relative_std = ERRORS[quant_type, block_size]
    linear = nn.Linear(1024, 1024, bias=False)
    nn.init.normal_(linear.weight)
    format = (NF4 if quant_type == "nf4" else FP4)(block_size)
    error = (format.freeze(linear).dequantize() - linear.weight.detach()).abs()
    # A row of 1024 that is one block of 4096 has three quarters of padding, so its maximum is that of 1024 values.
    assert error.mean() < mean + 7 * std
    assert (error / (linear.weight.detach().abs() + 1e-8)).mean() < relative_mean + 7 * relative_std


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_product_is_computed_in_the_dtype_of_each_input(dtype: torch.dtype) -> None:
    layer = frozen("nf4")
    first = layer(torch.randn(3, 128))
    x = torch.randn(5, 128).to(dtype)
    output = layer(x)
    assert (first.dtype, output.dtype) == (torch.float32, dtype)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float32
    expected = nn.functional.linear(x, layer.dequantize(dtype), layer.bias.to(dtype))
    torch.testing.assert_close(output, expected, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-2)


@pytest.mark.parametrize("compute", [None, torch.bfloat16, torch.float32])
def test_inside_autocast_the_output_is_what_linear_returns(compute: torch.dtype | None) -> None:
    layer, plain = NF4(compute=compute).freeze(nn.Linear(128, 24)), nn.Linear(128, 24)
    x = torch.randn(7, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
        assert output.dtype == plain(x).dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert x.grad.dtype == torch.float32
    assert layer(x).dtype == torch.float32
    if compute is torch.float32:
        assert torch.equal(output, layer(x).bfloat16())  # rounded once, at the end


def test_a_compute_dtype_is_what_the_product_runs_in() -> None:
    layer = Linear4bit(128, 24, compute_dtype=torch.bfloat16, quant_type="nf4")
    x = torch.randn(7, 128)
    inside = nn.functional.linear(x.bfloat16(), layer.dequantize(torch.bfloat16), layer.bias.bfloat16())
    assert layer(x).dtype == torch.float32
    torch.testing.assert_close(layer(x), inside.float(), rtol=1e-2, atol=1e-2)
    assert (layer(x) - layer(x).bfloat16().float()).abs().max() == 0  # nothing finer than bfloat16
    assert NF4(compute="float16").compute_dtype == torch.float16


@pytest.mark.parametrize("few_bits", ["int8", "fp8"])
def test_a_product_in_8_bits_is_near_that_in_16(few_bits: str) -> None:
    layer, exact = (NF4(compute=compute).freeze(nn.Linear(128, 64)) for compute in (few_bits, None))
    exact.load_state_dict(layer.state_dict())
    gradients = []
    x = torch.randn(37, 128, requires_grad=True)
    for module in (layer, exact):
        output = module(x)
        gradients.append((output, *torch.autograd.grad(output.square().sum(), x)))
    for rounded, right in zip(*gradients, strict=True):
        error = (rounded - right).norm() / right.norm()
        assert 0 < error < {"int8": 0.02, "fp8": 0.06}[few_bits]
    assert NF4(compute=few_bits).compute_dtype is None


def test_heavy_tailed_rows_stay_within_the_error_of_the_weight() -> None:
    layer, linear = frozen("nf4"), nn.Linear(128, 24)
    layer.load_state_dict(linear.state_dict())
    x = torch.randn(64, 128) * torch.exp(3 * torch.randn(64, 1))
    error = (layer(x) - linear(x)).norm(dim=1) / (linear(x) - linear.bias).norm(dim=1)
    # A uniform weight in blocks of 64 loses about 9 %; its rows count alike whatever the scale of a token.
    assert error.max() < 0.2


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to dtype": lambda m: m.to(torch.float16),
    "to device": lambda m: m.to("cpu"),
    "type": lambda m: m.type(torch.float16),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "share": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cast", CASTS)
def test_casts_copies_and_moves_leave_codes_and_scales_exact(name: str, cast: str) -> None:
    layer = frozen(name)
    before, weight = codes(layer), layer.dequantize()
    after = CASTS[cast](nn.Sequential(layer))[0]
    assert same_codes(after, before)
    assert torch.equal(after.dequantize(torch.float32), weight)
    assert after.bias.dtype == {"deepcopy": torch.float32}.get(cast, after.bias.dtype)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_on_meta_has_the_entries_of_a_real_one_and_loads_them(name: str) -> None:
    layer = frozen(name)
    state = layer.state_dict()
    empty = copy.deepcopy(layer).to("meta")
    assert {k: (v.shape[:-1] or v.dtype, v.device.type) for k, v in empty.state_dict().items()} == {
        k: (v.shape[:-1] or v.dtype, "meta") for k, v in state.items()
    }
    filled = copy.deepcopy(empty).to_empty(device="cpu")
    filled.load_state_dict(state)
    empty.load_state_dict(state, assign=True)
    x = torch.randn(3, 128)
    assert torch.equal(filled(x), layer(x))
    assert torch.equal(empty(x), layer(x))


def test_assigning_takes_the_tensors_of_the_file_and_copying_does_not() -> None:
    state = {name: tensor.clone() for name, tensor in frozen("nf4").state_dict().items()}
    for assign in (True, False):
        layer = frozen("nf4")
        layer.load_state_dict(state, assign=assign)
        assert (layer.weight.data_ptr() == state["weight"].data_ptr()) == assign


def test_loading_into_a_layer_on_meta_without_assign_is_an_error() -> None:
    layer = frozen("nf4", bias=False)
    with pytest.raises(RuntimeError, match="on the meta device: load with assign=True, or call to_empty first"):
        copy.deepcopy(layer).to("meta").load_state_dict(layer.state_dict())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("in_features", [128, 37])
def test_a_saved_layer_loads_strictly_and_computes_the_same(name: str, in_features: int) -> None:
    layer, other = frozen(name, in_features), frozen(name, in_features)
    file = io.BytesIO()
    torch.save(nn.Sequential(layer).state_dict(), file)
    file.seek(0)
    nn.Sequential(other).load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(3, in_features)
    assert torch.equal(layer(x), other(x))
    assert same_codes(other, codes(layer))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_the_storage_of_files_can_be_any_dtype(storage: torch.dtype) -> None:
    layer = Linear4bit(128, 24, quant_type="nf4", quant_storage=storage)
    state = layer.state_dict()
    assert state["weight"].dtype == storage
    assert state["weight"].shape == (128 * 24 // 2 // storage.itemsize, 1)
    plain = LinearNF4(128, 24)
    plain.load_state_dict(state)
    assert same_codes(plain, codes(layer))


def test_a_float_weight_is_quantised_as_it_is_loaded() -> None:
    linear = nn.Linear(128, 24)
    layer = LinearNF4(128, 24, compress_statistics=False)
    layer.load_state_dict(linear.state_dict())
    assert same_codes(layer, codes(NF4().freeze(linear)))
    assert torch.equal(layer.bias, linear.bias)


def tampered(state: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    changed = {**state, **{f"weight.{k}" if k != "weight" else k: v for k, v in changes.items()}}
    return {k: v for k, v in changed.items() if v is not None}


STATE = "quant_state.bitsandbytes__nf4"


def with_nested_block_size(state: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    (key,) = [k for k in state if k.startswith("weight.quant_state.")]
    facts = {**json.loads(bytes(state[key].tolist())), "nested_blocksize": size}
    scales = state["weight.nested_absmax"].repeat(256 // size)[: -(-len(state["weight.absmax"]) // size)]
    packed = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    return {**state, key: packed, "weight.nested_absmax": scales}


def test_scales_in_blocks_of_another_size_are_refused() -> None:
    layer = frozen("nf4_dq", 512, 64)
    with pytest.raises(RuntimeError, match="nested_blocksize 128, expected 256"):
        layer.load_state_dict(with_nested_block_size(layer.state_dict(), 128))


BROKEN = {
    "truncated codes": (lambda s: tampered(s, weight=s["weight"][:-1]), "number of bytes 1535, the layer 1536"),
    "truncated scales": (lambda s: tampered(s, absmax=s["weight.absmax"][:-1]), "absmax must be torch.float32"),
    "other map": (lambda s: tampered(s, quant_map=s["weight.quant_map"].flip(0)), "not the map of 'nf4'"),
    "no map": (lambda s: tampered(s, quant_map=None), "without weight.quant_map"),
    "no state": (lambda s: tampered(s, **{STATE: None}), f"without weight.{STATE}"),
    "broken state": (lambda s: tampered(s, **{STATE: s[f"weight.{STATE}"][:-1]}), "does not hold a JSON object"),
    "fp4": (lambda s: frozen("fp4").state_dict(), "the layer reads quant_state.bitsandbytes__nf4, the file has"),
    "double": (lambda s: frozen("nf4_dq").state_dict(), "the file has double quantisation True, the layer False"),
    "block size": (
        lambda s: NF4(32).freeze(nn.Linear(128, 24)).state_dict(),
        "the file has blocksize 32, the layer 64",
    ),
    "shape": (lambda s: {**frozen("nf4", 24 * 8, 16).state_dict(), "bias": s["bias"]}, r"shape \(16, 192\), the layer"),
    "float shape": (lambda s: {**s, **nn.Linear(64, 24).state_dict()}, "codes|weight"),
    "stray": (lambda s: {**s, "weight.SCB": torch.ones(24)}, r"Unexpected key\(s\) in state_dict: \"weight.SCB\""),
    "own buffer": (lambda s: {**s, "scale": torch.ones(24)}, r"Unexpected key\(s\) in state_dict: \"scale\""),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_is_named_and_changes_nothing(case: str) -> None:
    layer = frozen("nf4")
    before, (breaking, message) = codes(layer), BROKEN[case]
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(breaking(frozen("nf4").state_dict()))
    assert same_codes(layer, before) or case == "own buffer"


def test_missing_and_unexpected_keys_are_told_as_they_are() -> None:
    layer, state = frozen("nf4_dq"), frozen("nf4_dq").state_dict()
    result = layer.load_state_dict({"bias": state["bias"], "other": state["bias"]}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["weight"], ["other"])
    with pytest.raises(RuntimeError, match=r"Missing key.*weight.nested_absmax"):
        layer.load_state_dict({k: v for k, v in state.items() if k != "weight.nested_absmax"})
    with pytest.raises(RuntimeError, match="no weight of Linear4bit: it stays as it was"):
        layer.load_state_dict({k: v for k, v in state.items() if k != "weight.absmax"}, strict=False)
    with pytest.raises(RuntimeError, match=r'Missing key.*"bias"'):
        layer.load_state_dict({k: v for k, v in state.items() if k != "bias"})


def test_rows_that_are_no_whole_blocks_are_padded_and_cannot_be_exported() -> None:
    layer = frozen("nf4", 96)
    assert layer.weight.shape == (24, 64)
    assert "weight.quant_state.lq_plugin__nf4" in layer.state_dict()
    with pytest.raises(ValueError, match=r"rows of 96 are no whole blocks of 64.*block sizes that fit: 32. Quantise"):
        layer.rows.check_exportable()
    with pytest.raises(RuntimeError, match="block sizes that fit: 32"):
        layer.load_state_dict({**NF4(32).freeze(nn.Linear(96, 24)).state_dict()})
    NF4(32).freeze(nn.Linear(96, 24)).rows.check_exportable()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes", "ignore::FutureWarning:bitsandbytes")
def test_states_go_to_bitsandbytes_and_back(quant_type: str, double: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = Linear4bit(128, 24, compress_statistics=double, quant_type=quant_type)
    state = layer.state_dict()
    stats = {k: v for k, v in state.items() if k.startswith("weight.")}
    theirs = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, requires_grad=False, device="cpu")
    values = bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state)
    assert torch.equal(values, layer.dequantize())

    built = bnb.nn.Linear4bit(128, 24, compress_statistics=double, quant_type=quant_type).to("cpu")
    ours = Linear4bit(128, 24, compress_statistics=double, quant_type=quant_type)
    ours.load_state_dict(built.state_dict())
    expected = bnb.functional.dequantize_4bit(built.weight.data, built.weight.quant_state)
    torch.testing.assert_close(ours.dequantize(), expected, rtol=1e-6, atol=0)
    assert set(ours.state_dict()) == set(built.state_dict())


class Conv1D(nn.Module):
    """Stands in for transformers' class, which is told by its name."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.randn(out_features))


def test_a_conv1d_is_frozen_as_the_linear_that_it_is_and_loads_its_float_weight() -> None:
    conv = Conv1D(64, 64)
    layer = NF4().freeze(conv)
    x = torch.randn(5, 64)
    expected = NF4().freeze(nn.Linear(64, 64))
    expected.requantize(conv.weight.detach().t())
    torch.testing.assert_close(layer(x), expected(x) - expected.bias + conv.bias)
    before = codes(layer)
    layer.requantize(torch.randn(64, 64))
    layer.load_state_dict(conv.state_dict())
    assert same_codes(layer, before)


def test_constructors_have_the_arguments_of_bitsandbytes() -> None:
    layer = Linear4bit(128, 24)
    assert layer.format == FP4(double_quantization=True)
    assert LinearNF4(128, 24, False, torch.bfloat16, False).format == NF4(compute=torch.bfloat16)
    assert LinearFP4(128, 24, block_size=32).format == FP4(32, double_quantization=True)
    assert isinstance(layer, nn.Linear)
    assert Linear4bit(128, 24, device="meta").weight.is_meta
    assert not layer.weight.requires_grad
    # Uniform within 1 / sqrt(128), as nn.Linear draws it.
    assert layer.dequantize().abs().max() <= 128**-0.5 * 1.01
    assert layer.dequantize().std() == pytest.approx(128**-0.5 / 3**0.5, rel=0.05)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NF4(48), "block_size=48"),
        (lambda: NF4(compute=torch.int8), "compute=torch.int8, expected one of float32, bfloat16, float16"),
        (lambda: Linear4bit(8, 8, quant_type="int4"), "quant_type must be one of nf4, fp4, got 'int4'"),
        (lambda: LinearNF4(8, 8)(torch.randn(2, 9)), r"takes \(\.\.\., 8\), got \(2, 9\)"),
        (lambda: LinearNF4(8, 8).requantize(torch.randn(8, 9)), r"takes a float weight \(8, 8\), got torch.float32"),
        (lambda: NF4().freeze(LinearNF4(8, 8)), "is quantised already"),
    ],
)
def test_wrong_arguments_are_refused_by_name(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_frozen_weights_keep_the_hooks_and_the_mode_of_the_linear() -> None:
    linear, calls = nn.Linear(8, 8).eval(), []
    linear.register_forward_hook(lambda *_: calls.append("after"))
    layer = NF4().freeze(linear)
    layer(torch.randn(1, 8))
    assert calls == ["after"]
    assert not layer.training
    assert layer.bias is linear.bias


@pytest.mark.integration
@pytest.mark.parametrize("name", ["nf4", "nf4_dq"])
def test_compiled_and_recomputed_layers_give_what_they_gave(name: str) -> None:
    layer = frozen(name)
    x = torch.randn(5, 128, requires_grad=True)
    expected = layer(x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for function in (compiled, lambda y: checkpoint(layer, y, use_reentrant=False)):
        output = function(x)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(torch.autograd.grad(output.sum(), x)[0], gradient)


def test_requantising_what_was_read_back_changes_nothing() -> None:
    for name in NAMES:
        layer = frozen(name)
        before = layer.dequantize()
        layer.requantize(before)
        # Double quantisation rounds the scales once more, by at most 0.7 % of a block's largest value.
        tolerance = 0.0 if not layer.format.double_quantization else 0.01
        assert (layer.dequantize() - before).abs().max() <= tolerance * before.abs().max()


@pytest.mark.parametrize("name", ["nf4_dq", "llm_int8"])
def test_codes_that_are_asked_to_train_say_what_trains_instead(name: str) -> None:
    layer = FORMATS[name].freeze(nn.Linear(64, 8))
    with pytest.raises(
        RuntimeError, match=rf"weight of a \w+ is kept as {name} codes and cannot train: train an adapter"
    ):
        layer.requires_grad_()
    layer.requires_grad_(False)
    assert not any(p.requires_grad for p in layer.parameters())


def test_an_input_that_was_cast_to_the_dtype_of_the_codes_is_explained() -> None:
    layer = frozen("nf4")
    with pytest.raises(TypeError, match=r"Linear4bit takes floats, got torch.uint8.*casts its input to the dtype of a"):
        layer(torch.randn(2, 128).to(layer.weight.dtype))
