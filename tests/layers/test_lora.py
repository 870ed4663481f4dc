"""LoRA beside every kind of linear against the formula in float64: outputs, gradients, merging, what is kept."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lq_plugin.formats import FORMATS, TRAINABLE_FORMATS
from lq_plugin.layers import FrozenEmbedding, FrozenLinear, QuantLinear, StableEmbedding
from lq_plugin.layers.lora import LoRAEmbedding, LoRALinear, linear_weight
from lq_plugin.layers.low_rank import down, up

RANK, IN, OUT = 5, 64, 48


def conv1d() -> nn.Module:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(OUT, IN)
    nn.init.normal_(layer.bias)
    return layer


BASES: dict[str, Callable[[], nn.Module]] = {
    "nn.Linear": lambda: nn.Linear(IN, OUT),
    "nn.Linear without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "Conv1D": conv1d,
    "nf4": lambda: FORMATS["nf4"].freeze(nn.Linear(IN, OUT)),
    "nf4_dq": lambda: FORMATS["nf4_dq"].freeze(nn.Linear(IN, OUT)),
    "Conv1D in fp4": lambda: FORMATS["fp4"].freeze(conv1d()),
}
QUANTIZED = {**BASES, "llm_int8": lambda: FORMATS["llm_int8"].freeze(nn.Linear(IN, OUT))}


def trained(base: nn.Module, **options: object) -> LoRALinear:
    """An adapter that has learned something: B is not zero, and lengths are not those of the weight."""
    layer = LoRALinear(base, RANK, 10, init_lora_weights=False, **options)
    if layer.lora_magnitude is not None:
        layer.lora_magnitude.data *= torch.rand(OUT) + 0.5
    return layer


def expected(layer: LoRALinear, x: Tensor) -> Tensor:
    """In float64, with autograd of plain torch."""
    weight = linear_weight(layer.base_layer).double()
    bias = None if layer.bias is None else layer.bias.double()
    weight = weight + layer.scale * layer.lora_B.double() @ layer.lora_A.double()
    if layer.lora_magnitude is not None:
        weight = weight * (layer.lora_magnitude.double() / weight.detach().norm(dim=1)).unsqueeze(1)
    return F.linear(x.double(), weight, bias)


def gradients(output: Tensor, layer: LoRALinear, x: Tensor) -> dict[str, Tensor]:
    wanted = {"x": x} | {n: p for n, p in layer.named_parameters() if p.requires_grad}
    grad = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return dict(zip(wanted, torch.autograd.grad(output, list(wanted.values()), grad), strict=True))


def assert_matches(layer: LoRALinear, x: Tensor, tolerance: float) -> None:
    """tolerance: of the norm of each tensor."""
    x = x.clone().requires_grad_()
    actual, reference = layer(x), expected(layer, x)
    assert actual.shape == reference.shape
    pairs = {"output": (actual, reference)}
    found, right = gradients(actual, layer, x), gradients(reference, layer, x)
    for name, (a, b) in (pairs | {name: (found[name], right[name]) for name in right}).items():
        assert (a.double() - b.double()).norm() <= tolerance * b.norm() + 1e-30, name


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_output_and_gradients_are_those_of_the_formula(base: str, dora: bool) -> None:
    layer = trained(BASES[base](), use_dora=dora)
    assert_matches(layer, torch.randn(37, IN), 1e-6)  # a few float32 roundings: eps is 6e-8


@pytest.mark.parametrize("shape", [(IN,), (1, IN), (0, IN), (3, 0, IN), (2, 7, IN), (1000, IN)])
def test_any_number_of_tokens(shape: tuple[int, ...]) -> None:
    assert_matches(trained(nn.Linear(IN, OUT)), torch.randn(shape), 1e-6)


def test_inputs_may_lie_anyhow() -> None:
    layer = trained(nn.Linear(IN, OUT))
    assert_matches(layer, torch.randn(IN, 37).t(), 1e-6)
    assert_matches(layer, torch.randn(7, 2, IN).transpose(0, 1), 1e-6)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3), (torch.float64, 1e-14)]
)
def test_products_run_in_the_dtype_of_the_input(dtype: torch.dtype, tolerance: float) -> None:
    """Roundings of bfloat16 are 2^-9, of float16 2^-12; a handful of them add up. The adapter stays float32."""
    layer = trained(nn.Linear(IN, OUT, dtype=dtype), dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    assert layer(torch.randn(3, IN, dtype=dtype)).dtype is dtype
    assert_matches(layer, torch.randn(37, IN, dtype=dtype), tolerance)


@pytest.mark.parametrize("base", ["nn.Linear", "nf4"])
def test_autocast_gives_its_dtype_and_gradients_that_of_the_parameters(base: str) -> None:
    layer, x = trained(BASES[base]()), torch.randn(37, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype is torch.bfloat16
    reference = expected(layer, x)
    assert (output.double() - reference).norm() < 1e-2 * reference.norm()
    found, right = gradients(output, layer, x), gradients(reference, layer, x)
    for name, grad in found.items():
        assert grad.dtype is torch.float32
        assert (grad.double() - right[name]).norm() < 2e-2 * right[name].norm(), name


def test_beside_a_linear_in_a_trainable_format() -> None:
    base = QuantLinear(IN, OUT)
    base.formats = TRAINABLE_FORMATS["int8_switchback"]
    layer, x = trained(base), torch.randn(37, IN, requires_grad=True)
    change = layer.scale * (x @ layer.lora_A.t()) @ layer.lora_B.t()
    torch.testing.assert_close(layer(x), base(x) + change)
    layer(x).sum().backward()
    assert base.weight.grad is None
    assert layer.lora_B.grad is not None


def test_gradients_of_gradients() -> None:
    base = nn.Linear(6, 4).double()
    a, b, x = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 6), (4, 3), (5, 6)))

    def output(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x, h = down(x, a)
        return up(base(x).sin() + 0, h, b, 0.5)

    assert torch.autograd.gradcheck(output, (x, a, b))
    assert torch.autograd.gradgradcheck(output, (x, a, b))


def saved_by(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """What autograd keeps for backward, without parameters."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x).sum()
    own = {p.data_ptr() for p in layer.parameters()}
    return [tensor for tensor in kept if tensor.data_ptr() not in own]


@pytest.mark.parametrize("base", ["nn.Linear", "nf4", "llm_int8"])
def test_backward_keeps_the_input_itself_and_the_thin_product_only(base: str) -> None:
    x = torch.randn(100, IN, requires_grad=True)
    kept = {tensor.data_ptr(): tensor for tensor in saved_by(trained(QUANTIZED[base]()), x)}
    kept.pop(x.data_ptr())
    wide = [tuple(tensor.shape) for tensor in kept.values() if tensor.numel() > 100 * RANK and tensor.shape[0] == 100]
    assert not wide
    assert any(tensor.shape == (100, RANK) for tensor in kept.values())


def test_under_autocast_layers_that_share_an_input_keep_it_once() -> None:
    layers = [trained(FORMATS["nf4"].freeze(nn.Linear(IN, OUT))) for _ in range(3)]
    x = torch.randn(100, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = {tensor.data_ptr(): tensor for layer in layers for tensor in saved_by(layer, x)}
    assert sum(tensor.numel() for tensor in kept.values() if tensor.shape == x.shape) == x.numel()


def test_dropout_keeps_one_byte_an_element_beside_the_input() -> None:
    x = torch.randn(100, IN, requires_grad=True)
    kept = {t.data_ptr(): t for t in saved_by(trained(nn.Linear(IN, OUT), lora_dropout=0.3), x)}
    kept.pop(x.data_ptr())
    assert sum(t.numel() * t.element_size() for t in kept.values() if t.shape == x.shape) == x.numel()


def test_the_output_of_the_base_is_not_copied() -> None:
    layer, places = trained(nn.Linear(IN, OUT)), []
    forward = layer.base_layer.forward
    layer.base_layer.forward = lambda x: places.append(y := forward(x)) or y
    assert layer(torch.randn(3, IN)).data_ptr() == places[0].data_ptr()


def test_what_a_hook_saw_of_the_base_stays() -> None:
    layer, seen = trained(nn.Linear(IN, OUT)), []
    layer.base_layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.randn(3, IN)
    layer(x)
    assert torch.equal(seen[0], layer.base_layer(x))


def test_an_input_without_gradient_asks_the_base_for_none() -> None:
    asked = []

    class Base(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            asked.append(input.requires_grad)
            return super().forward(input)

    layer = trained(Base(IN, OUT))
    layer(torch.randn(3, IN)).sum().backward()
    layer(torch.randn(3, IN, requires_grad=True)).sum().backward()
    assert asked == [False, True]


@pytest.mark.parametrize("base", ["nn.Linear", "nf4"])
@pytest.mark.parametrize("dora", [False, True])
def test_compiles_whole_and_computes_the_same(base: str, dora: bool) -> None:
    layer, x = trained(BASES[base](), use_dora=dora), torch.randn(7, IN, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    eager = gradients(layer(x), layer, x)
    for name, grad in gradients(compiled(x), layer, x).items():
        torch.testing.assert_close(grad, eager[name], msg=name)


def test_compiled_dropout_drops_what_goes_to_the_adapter_only() -> None:
    base = nn.Linear(IN, OUT)
    layer, x = trained(base, lora_dropout=0.5), torch.randn(3, IN)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    several = torch.stack([compiled(x) for _ in range(400)])
    change = expected(layer, x) - base(x)
    assert several.std(0).min() > 0
    assert (several.mean(0) - base(x) - change).norm() < 0.2 * change.norm()  # deviation of the mean: 1 / sqrt(400)
    assert torch.equal(torch.compile(layer.eval(), backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    layer, x = (
        trained(FORMATS["nf4"].freeze(nn.Linear(IN, OUT)), lora_dropout=0.3),
        torch.randn(7, IN, requires_grad=True),
    )
    torch.manual_seed(1)
    layer(x).square().sum().backward()
    plain = [layer.lora_A.grad.clone(), layer.lora_B.grad.clone(), x.grad.clone()]
    layer.zero_grad()
    x.grad = None
    torch.manual_seed(1)
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    for grad, before in zip([layer.lora_A.grad, layer.lora_B.grad, x.grad], plain, strict=True):
        assert torch.equal(grad, before)


def test_dropout_draws_what_nn_dropout_draws_and_reaches_all_gradients() -> None:
    layer, x = trained(nn.Linear(IN, OUT), lora_dropout=0.3), torch.randn(37, IN, requires_grad=True)
    torch.manual_seed(1)
    output = layer(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.3)
    reference = layer.base_layer(x) + layer.scale * (dropped @ layer.lora_A.t()) @ layer.lora_B.t()
    torch.testing.assert_close(output, reference)
    right = gradients(reference, layer, x)
    for name, grad in gradients(output, layer, x).items():
        torch.testing.assert_close(grad, right[name], msg=name)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_lengths_of_zero_rows_are_no_division_by_zero() -> None:
    base = nn.Linear(IN, OUT)
    base.weight.data[3] = 0
    layer = LoRALinear(base, RANK, use_dora=True)
    x = torch.randn(5, IN, requires_grad=True)
    torch.testing.assert_close(layer(x), base(x))
    assert all(torch.isfinite(grad).all() for grad in gradients(layer(x), layer, x).values())


def test_scales() -> None:
    assert LoRALinear(nn.Linear(4, 4), 4, 8).scale == 2
    assert LoRALinear(nn.Linear(4, 4), 4, 8, use_rslora=True).scale == 4


def test_how_adapters_begin() -> None:
    x, base = torch.randn(5, IN), nn.Linear(IN, OUT)
    for init in (True, "gaussian"):
        assert torch.equal(LoRALinear(base, RANK, init_lora_weights=init)(x), base(x))
    uniform, normal = (
        LoRALinear(nn.Linear(1000, 8), 20),
        LoRALinear(nn.Linear(1000, 8), 20, init_lora_weights="gaussian"),
    )
    bound = 1000**-0.5  # Kaiming's with a = sqrt(5)
    assert 0.99 * bound < uniform.lora_A.abs().max() <= bound
    assert abs(normal.lora_A.std().item() * 20 - 1) < 0.03  # deviation of the estimate: 1 / sqrt(2 * 20000)
    assert not torch.equal(LoRALinear(base, RANK, init_lora_weights=False)(x), base(x))
    dora = LoRALinear(base, RANK, use_dora=True)
    torch.testing.assert_close(dora.lora_magnitude, base.weight.norm(dim=1))


# --- merging


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", QUANTIZED)
def test_unmerging_gives_the_earlier_weight_to_the_bit(base: str, dora: bool) -> None:
    layer, x = trained(QUANTIZED[base](), use_dora=dora), torch.randn(5, IN)
    before, output = copy.deepcopy(layer.state_dict()), layer(x)
    layer.merge()
    assert layer.merged
    assert not torch.equal(linear_weight(layer.base_layer), linear_weight(copy.deepcopy(layer.base_layer)) * 0)
    changed = layer.base_layer.state_dict()
    assert any(not torch.equal(changed[k], before[f"base_layer.{k}"]) for k in changed)
    layer.unmerge()
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) and after[key].dtype == before[key].dtype for key in after)
    assert torch.equal(layer(x), output)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", ["nn.Linear", "Conv1D"])
def test_a_merged_float_layer_computes_the_same(base: str, dora: bool) -> None:
    layer, x = trained(BASES[base](), use_dora=dora), torch.randn(5, IN)
    output = layer(x)
    layer.merge()
    torch.testing.assert_close(layer.eval()(x), output)


@pytest.mark.parametrize("name", ["nf4", "fp4", "nf4_dq", "llm_int8"])
def test_a_merged_quantised_layer_holds_the_sum_quantised_anew(name: str) -> None:
    layer = trained(FORMATS[name].freeze(nn.Linear(IN, OUT)))
    fresh = nn.Linear(IN, OUT)
    fresh.weight.data = linear_weight(layer.base_layer) + layer.scale * layer.lora_B.data @ layer.lora_A.data
    fresh.bias = layer.bias
    layer.merge()
    base, right = layer.base_layer, FORMATS[name].freeze(fresh)
    assert isinstance(base, FrozenLinear)
    torch.testing.assert_close(base.dequantize(), right.dequantize(), rtol=1e-3, atol=1e-4)
    assert base.weight_dtype is torch.float32


def test_a_merged_layer_neither_trains_nor_is_saved() -> None:
    layer, x = trained(nn.Linear(IN, OUT)), torch.randn(5, IN)
    layer.merge()
    with pytest.raises(RuntimeError, match="would not train"):
        layer(x)
    with pytest.raises(RuntimeError, match="twice"):
        layer.state_dict()
    with pytest.raises(ValueError, match="already"):
        layer.merge()
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    layer.unmerge()
    with pytest.raises(ValueError, match="not merged"):
        layer.unmerge()


def test_a_bias_that_changed_meanwhile_stays_changed() -> None:
    layer = trained(nn.Linear(IN, OUT))
    layer.merge()
    layer.bias.data += 1
    changed = layer.bias.clone()
    layer.unmerge()
    assert torch.equal(layer.bias, changed)


def test_what_was_not_kept_cannot_come_back() -> None:
    layer = trained(nn.Linear(IN, OUT))
    layer.merge(reversible=False)
    with pytest.raises(ValueError, match="reversible=False"):
        layer.unmerge()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_broken_adapter_changes_nothing(value: float) -> None:
    layer = trained(nn.Linear(IN, OUT, dtype=torch.float16))
    layer.lora_B.data[0, 0] = value
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="not finite"):
        layer.merge()
    assert torch.equal(layer.weight, before)
    assert not layer.merged


def test_copies_and_pickles_go_on_alike() -> None:
    layer, x = trained(FORMATS["nf4"].freeze(nn.Linear(IN, OUT)), use_dora=True), torch.randn(5, IN)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


def test_what_cannot_have_an_adapter_is_named() -> None:
    with pytest.raises(TypeError, match="Conv2d"):
        LoRALinear(nn.Conv2d(3, 3, 1))
    with pytest.raises(TypeError, match="Linear"):
        LoRAEmbedding(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="r must be"):
        LoRALinear(nn.Linear(3, 3), 0)
    with pytest.raises(ValueError, match="StableEmbedding changes its output"):
        LoRAEmbedding(StableEmbedding(3, 3))
    with pytest.raises(ValueError, match="max_norm"):
        LoRAEmbedding(nn.Embedding(3, 3, max_norm=1.0))


# --- embeddings


def test_an_embedding_with_an_adapter() -> None:
    base = nn.Embedding(20, 16, padding_idx=0)
    layer, ids = LoRAEmbedding(base, 4, 8), torch.tensor([[1, 5, 5], [0, 19, 2]])
    assert torch.equal(layer(ids), base(ids))  # A starts at zero
    nn.init.normal_(layer.lora_A)
    weight = base.weight.double() + layer.scale * (layer.lora_B.double() @ layer.lora_A.double()).t()
    torch.testing.assert_close(layer(ids).double(), weight[ids], rtol=1e-5, atol=1e-5)
    layer(ids).sum().backward()
    assert not layer.lora_A.grad[:, 0].any()  # padding learns nothing
    assert layer.lora_A.grad[:, 5].all()
    before, output = base.weight.clone(), layer(ids)
    layer.merge()
    torch.testing.assert_close(layer.eval()(ids), output)
    layer.unmerge()
    assert torch.equal(base.weight, before)


@pytest.mark.parametrize("name", ["nf4", "nf4_dq", "llm_int8"])
def test_a_frozen_embedding_with_an_adapter(name: str) -> None:
    base, ids = FrozenEmbedding.frozen_from(nn.Embedding(20, 64), FORMATS[name]), torch.tensor([[1, 5, 19]])
    layer = LoRAEmbedding(base, 4, init_lora_weights=False)
    weight = base.dequantize() + layer.scale * (layer.lora_B @ layer.lora_A).t()
    torch.testing.assert_close(layer(ids), weight[ids], rtol=1e-5, atol=1e-5)
    before, output = copy.deepcopy(layer.state_dict()), layer(ids)
    layer.merge()
    assert (base.dequantize() - weight).norm() < 0.2 * weight.norm()  # what four bits lose
    layer.unmerge()
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert torch.equal(layer(ids), output)


def test_an_embedding_that_scales_its_output_scales_the_adapter_too() -> None:
    class Scaled(nn.Embedding):
        embed_scale = torch.tensor(3.0)

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.embed_scale

    layer, ids = LoRAEmbedding(Scaled(20, 16), 4, 8, init_lora_weights=False), torch.arange(20)
    output = layer(ids)
    layer.merge()
    torch.testing.assert_close(layer.eval()(ids), output, rtol=1e-5, atol=1e-5)
