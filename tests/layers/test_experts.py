"""Frozen experts give what their class gives with the weights that they read back, gradients included."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lq_plugin.formats import FORMATS, NF4
from lq_plugin.layers.experts import FrozenExperts, FrozenExpertWeight, Routing, expert_weights, projections


class Experts(nn.Module):
    """Four experts of 48 -> 32 -> 48, fused and flagged as transformers does it, one token after another."""

    num_experts = 4

    def __init__(self, hidden: int = 48, has_gate: bool = True, has_bias: bool = False, is_transposed: bool = False):
        super().__init__()
        self.has_gate, self.has_bias, self.is_transposed = has_gate, has_bias, is_transposed
        self.act_fn = nn.SiLU()
        for name, shape in {self.up_name: (64 if has_gate else 32, hidden), "down_proj": (hidden, 32)}.items():
            weight = torch.randn(4, *(shape[::-1] if is_transposed else shape)) / 6
            setattr(self, name, nn.Parameter(weight))
            if has_bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(4, shape[0])))

    @property
    def up_name(self) -> str:
        return "gate_up_proj" if self.has_gate else "up_proj"

    def _apply_gate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def one(self, name: str, x: Tensor, expert: int) -> Tensor:
        weight = getattr(self, name)[expert]
        out = x @ (weight if self.is_transposed else weight.t())
        return out + getattr(self, f"{name}_bias")[expert] if self.has_bias else out

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rows = []
        for x, experts, scales in zip(hidden, index.tolist(), weights, strict=True):
            parts = []
            for expert, scale in zip(experts, scales, strict=True):
                up = self.one(self.up_name, x, expert)
                inner = self._apply_gate(up) if self.has_gate else self.act_fn(up)
                parts.append(self.one("down_proj", inner, expert) * scale)
            rows.append(torch.stack(parts).sum(0))
        return torch.stack(rows)


def routed(tokens: int, hidden: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    """Two different experts for each token; expert 3 gets none."""
    index = torch.rand(tokens, 3).argsort(dim=1)[:, :2]
    return torch.randn(tokens, hidden, requires_grad=True), index, torch.rand(tokens, 2, requires_grad=True)


def same_weights(experts: Experts, frozen: FrozenExperts) -> Experts:
    """The experts with the weights that `frozen` reads back."""
    plain = copy.deepcopy(experts)
    for name, weight in expert_weights(frozen).items():
        values = weight.dequantize()
        getattr(plain, name).data.copy_(values.transpose(1, 2) if experts.is_transposed else values)
    return plain


@pytest.mark.parametrize("name", ["nf4", "fp4_dq", "llm_int8"])
@pytest.mark.parametrize("flags", ["", "has_bias", "is_transposed", "has_bias is_transposed", "no_gate"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_output_and_gradients_are_those_of_the_weights_read_back(name: str, flags: str, tokens: int) -> None:
    experts = Experts(has_gate=flags != "no_gate", **{flag: True for flag in flags.split() if flag != "no_gate"})
    frozen = FORMATS[name].freeze(experts)
    assert isinstance(frozen, FrozenExperts)
    plain = same_weights(experts, frozen)
    x, index, weights = routed(tokens)
    results = []
    for module in (frozen, plain):
        output = module(x, index, weights)
        results.append((output, *torch.autograd.grad(output.square().sum(), (x, weights))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_sizes_that_grouped_products_do_not_take_are_multiplied_one_by_one() -> None:
    experts = Experts(hidden=37)
    frozen = NF4(32).freeze(experts)
    x, index, weights = routed(9, 37)
    torch.testing.assert_close(frozen(x, index, weights), same_weights(experts, frozen)(x, index, weights))
    frozen(x, index, weights).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("count", [1, 40])
def test_a_product_of_experts_has_the_gradient_of_float64(count: int) -> None:
    weight = FrozenExpertWeight(4, 64, 48, NF4())
    weight.requantize(torch.randn(4, 48, 64))
    expert = torch.randint(4, (count,)).sort().values
    ends = torch.bincount(expert, minlength=4).cumsum(0).to(torch.int32)
    x, grad = torch.randn(count, 64, requires_grad=True), torch.randn(count, 48)
    output = weight(x, Routing(expert, ends))
    output.backward(grad)
    chosen = weight.dequantize(torch.float32).double()[expert]
    torch.testing.assert_close(
        output.double(), torch.einsum("soi,si->so", chosen, x.detach().double()), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(x.grad.double(), torch.einsum("soi,so->si", chosen, grad.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_compute_in_the_dtype_of_the_input_and_of_autocast(dtype: torch.dtype) -> None:
    frozen = NF4().freeze(Experts(has_bias=True))
    x, index, weights = routed(9)
    expected = frozen(x, index, weights)
    assert frozen(x.to(dtype), index, weights.to(dtype)).dtype == dtype
    with torch.autocast("cpu", dtype):
        inside = frozen(x, index, weights)
        up = frozen.gate_up_proj(x, Routing(torch.tensor([0] * 9), torch.tensor([9] * 4, dtype=torch.int32)))
    assert (inside.dtype, up.dtype) == (torch.float32, dtype)
    assert (inside - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("name", ["nf4", "nf4_dq", "llm_int8"])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_experts_are_saved_loaded_copied_and_cast(name: str, is_transposed: bool) -> None:
    experts = Experts(is_transposed=is_transposed)
    frozen, other = FORMATS[name].freeze(experts), FORMATS[name].freeze(Experts(is_transposed=is_transposed))
    arguments = routed(9)
    expected = frozen(*arguments)
    other.load_state_dict(frozen.state_dict())
    again = FORMATS[name].freeze(Experts(is_transposed=is_transposed))
    again.load_state_dict(experts.state_dict())  # floats, by the names that they had
    meta = FORMATS[name].freeze(copy.deepcopy(experts).to("meta"))
    meta.load_state_dict(frozen.state_dict(), assign=True)
    for module in (other, again, meta, pickle.loads(pickle.dumps(frozen)), copy.deepcopy(frozen).half()):
        torch.testing.assert_close(module(*arguments), expected)
    with pytest.raises(RuntimeError, match=r"Missing key.*down_proj.weight"):
        other.load_state_dict({k: v for k, v in frozen.state_dict().items() if "down" not in k})


def test_experts_are_told_by_their_flags_and_shapes() -> None:
    assert projections(Experts()) == ("gate_up_proj", "down_proj")
    assert projections(Experts(has_gate=False)) == ("up_proj", "down_proj")
    assert projections(nn.Linear(3, 3)) == ()
    without = Experts()
    del without.is_transposed
    assert projections(without) == ()
    assert projections(NF4().freeze(Experts())) == ()


def test_experts_split_over_processes_are_refused() -> None:
    experts = Experts()
    experts._is_expert_parallel = True  # type: ignore[assignment]
    with pytest.raises(ValueError, match="split over processes"):
        NF4().freeze(experts)


def architectures() -> dict[str, Callable[[], nn.Module]]:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    mixtral = transformers.MixtralConfig(**sizes, intermediate_size=64, num_key_value_heads=2, num_local_experts=4)
    qwen = transformers.Qwen3MoeConfig(**sizes, moe_intermediate_size=32, num_key_value_heads=2, num_experts=8)
    oss = transformers.GptOssConfig(
        **sizes, intermediate_size=64, num_key_value_heads=2, num_local_experts=4, head_dim=32
    )
    build = transformers.AutoModelForCausalLM.from_config
    return {"mixtral": lambda: build(mixtral), "qwen3_moe": lambda: build(qwen), "gpt_oss": lambda: build(oss)}


@pytest.mark.integration
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_models_of_transformers_give_what_they_give_with_the_weights_read_back(
    architecture: str, implementation: str
) -> None:
    model = architectures()[architecture]()
    model.config._experts_implementation = implementation
    plain = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if projections(module):
            model.set_submodule(name, NF4().freeze(module))
            for weight_name, weight in expert_weights(model.get_submodule(name)).items():
                values, held = weight.dequantize(), plain.get_submodule(name)
                getattr(held, weight_name).data.copy_(values.transpose(1, 2) if held.is_transposed else values)
    assert any(isinstance(module, FrozenExperts) for module in model.modules())
    results = []
    for network in (model, plain):
        embedded = model.get_input_embeddings()(torch.arange(9).view(1, 9)).detach().requires_grad_()
        logits = network(inputs_embeds=embedded).logits
        results.append((logits, *torch.autograd.grad(logits.square().sum(), embedded)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
