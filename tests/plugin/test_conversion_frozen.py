"""convert() to frozen formats: what changes, what stays, what is refused, and what it says."""

import copy
import gc
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, cast

import pytest
import torch
from torch import Tensor, nn

import lq_plugin
from lq_plugin.conversion import frozen_plan, report_of
from lq_plugin.formats import FORMATS, NF4, LLMInt8
from lq_plugin.layers import FrozenExperts, FrozenLinear, Linear4bit, Linear8bitLt, QuantLinear
from lq_plugin.lora_config import LoRAConfig

FROZEN = ["nf4", "nf4_dq", "fp4", "fp4_dq", "llm_int8"]


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Language(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(64, 32, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


class Experts(nn.Module):
    """With the flags of transformers' fused experts."""

    has_gate, has_bias, is_transposed, num_experts = True, False, False, 4

    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 64, 64) / 8)
        self.down_proj = nn.Parameter(torch.randn(4, 64, 32) / 6)

    def _apply_gate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return self.act_fn(gate) * up


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.gate, self.experts = nn.Linear(64, 64), nn.Linear(64, 4), Experts()

    def forward(self, x: Tensor) -> Tensor:
        x = self.q_proj(x)
        weights, index = self.gate(x).softmax(-1).topk(2)
        return self.experts(x, index, weights)


class Conv1D(nn.Module):
    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.nf = out_features
        self.weight = nn.Parameter(torch.randn(in_features, out_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def converted(conversion: lq_plugin.Conversion) -> dict[str, str]:
    return {layer.name: layer.formats.name for layer in conversion.layers if layer.formats}


def left_alone(conversion: lq_plugin.Conversion) -> dict[str, str]:
    return {layer.name: layer.reason for layer in conversion.layers if layer.formats is None}


def shape_of(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("name", FROZEN)
def test_linears_are_frozen_in_place_and_the_rest_stays(name: str) -> None:
    model = Language()
    up, embed, calls = model.blocks[0].up, model.embed.weight, []
    handle = up.register_forward_hook(lambda *_: calls.append("up"))
    ids = torch.arange(8).view(1, 8)
    before = model(ids)
    conversion = lq_plugin.convert(model, name)
    assert set(converted(conversion)) == {f"blocks.{i}.{part}" for i in (0, 1) for part in ("up", "down")}
    assert left_alone(conversion) == {"embed": "embedding", "lm_head": "output embedding"}
    assert model.blocks[0].up is up
    assert isinstance(up, FrozenLinear)
    assert model.embed.weight is embed
    assert (model(ids) - before).norm() < 0.2 * before.norm()
    handle.remove()
    model(ids)
    assert calls == ["up", "up"]
    model(ids).sum().backward()
    assert model.embed.weight.grad is not None
    assert up.bias.grad is not None
    assert up.weight.grad is None


@dataclass(frozen=True)
class Watching(NF4):
    """Notes how many of the float weights that it was given before are still there."""

    given: ClassVar[list[weakref.ref]] = []
    alive: ClassVar[list[int]] = []

    def freeze(self, linear: nn.Module, device: torch.device | str | None = None) -> nn.Module:
        gc.collect()
        self.alive.append(sum(reference() is not None for reference in self.given))
        self.given.append(weakref.ref(linear.weight))
        return super().freeze(linear, device)


def test_each_float_weight_is_freed_before_the_next_layer_is_frozen() -> None:
    lq_plugin.convert(Language(), Watching())
    assert Watching.alive == [0, 0, 0, 0]


def test_weights_are_frozen_on_the_device_that_is_asked_for() -> None:
    model = Language().to("cpu")
    conversion = lq_plugin.convert(model, "nf4", device="meta")
    assert {p.device.type for layer in conversion.converted for p in layer.parameters} == {"meta"}
    assert model.embed.weight.device.type == "cpu"


@pytest.mark.parametrize("name", ["nf4_dq", "llm_int8"])
def test_the_root_itself_can_be_the_layer(name: str) -> None:
    layer = nn.Linear(64, 32)
    lq_plugin.convert(layer, name)
    assert type(layer) is FORMATS[name].layer
    assert layer(torch.randn(2, 64)).shape == (2, 32)


def test_formats_that_train_and_that_do_not_mix_in_one_dict() -> None:
    model = Language()
    conversion = lq_plugin.convert(model, {"blocks.0.*": "nf4", "down": None, "*": "int8_switchback"}, partial=True)
    assert converted(conversion) == {"blocks.0.up": "nf4", "blocks.0.down": "nf4", "blocks.1.up": "int8_switchback"}
    assert isinstance(model.blocks[1].up, QuantLinear)
    assert left_alone(conversion)["blocks.1.down"] == "'down' is none"
    model(torch.arange(4).view(1, 4)).sum().backward()
    assert model.blocks[1].up.weight.grad is not None


def test_a_layer_that_trained_in_low_bits_can_be_frozen() -> None:
    model = Language()
    lq_plugin.convert(model)
    lq_plugin.convert(model, "nf4")
    assert type(model.blocks[0].up) is Linear4bit
    assert not hasattr(model.blocks[0].up, "converted_from")


@pytest.mark.parametrize("name", FROZEN)
def test_converting_again_changes_nothing(name: str) -> None:
    model = Language()
    first = lq_plugin.convert(model, name)
    state = copy.deepcopy(model.state_dict())
    for again in (lq_plugin.convert(model, name), lq_plugin.convert(model, None), report_of(model)):
        assert converted(again) == converted(first)
        assert again.share == first.share == 1.0
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_module_used_twice_is_frozen_once() -> None:
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    conversion = lq_plugin.convert(model, "nf4")
    assert model[0] is model[2]
    assert converted(conversion) == {"0": "nf4"}
    assert conversion.quantized_weights == 64 * 64


def test_ties_routers_and_attention_are_left_alone() -> None:
    assert left_alone(lq_plugin.convert(Language(tied=True), "nf4"))["lm_head"] == "tied to embed"
    assert left_alone(lq_plugin.convert(Mixture(), "nf4")) == {"gate": "router"}
    layer = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True).eval()
    model = nn.TransformerEncoder(layer, 1).eval()
    conversion = lq_plugin.convert(model, "llm_int8", partial=True)
    assert "MultiheadAttention" in left_alone(conversion)["layers.0.self_attn.out_proj"]
    with torch.no_grad():
        padding = torch.tensor([[False, False, True], [False, False, False]])
        assert model(torch.randn(2, 3, 64), src_key_padding_mask=padding).isfinite().all()


def test_an_output_embedding_is_frozen_if_it_is_named_in_full() -> None:
    model = Language()
    conversion = lq_plugin.convert(model, {"lm_head": "llm_int8", "*": "nf4"})
    assert isinstance(model.lm_head, Linear8bitLt)
    assert converted(conversion)["lm_head"] == "llm_int8"
    assert conversion.share == 1.0


def test_conv1d_becomes_a_linear_and_counts() -> None:
    model = nn.Sequential(Conv1D(96, 64))
    conversion = lq_plugin.convert(model, "nf4")
    assert isinstance(model[0], Linear4bit)
    assert (model[0].out_features, model[0].in_features, model[0].nf) == (96, 64, 96)
    assert conversion.share == 1.0
    assert conversion.quantized_weights == 96 * 64


@pytest.mark.parametrize("name", ["nf4", "llm_int8"])
def test_fused_experts_are_frozen_by_projection_and_count(name: str) -> None:
    model = Mixture()
    conversion = lq_plugin.convert(model, name)
    assert converted(conversion) == dict.fromkeys(["q_proj", "experts.gate_up_proj", "experts.down_proj"], name)
    assert isinstance(model.experts, FrozenExperts)
    weights = 64 * 64 + 4 * 64 * 64 + 4 * 64 * 32
    assert (conversion.quantized_weights, conversion.weights) == (weights, weights + 4 * 64)
    assert conversion.share > 0.95
    model(torch.randn(5, 64)).sum().backward()
    assert converted(lq_plugin.convert(model, name)) == converted(conversion)


def test_experts_stay_where_the_format_trains_or_the_forward_is_unknown() -> None:
    model = Mixture()
    reasons = left_alone(lq_plugin.convert(model, partial=True))
    assert reasons["experts.down_proj"] == "fused experts: int8_switchback trains linear layers only"
    other = nn.Module()
    other.w1, other.w2 = nn.Parameter(torch.randn(4, 8, 8)), nn.Parameter(torch.randn(4, 8, 8))
    unknown = nn.ModuleDict({"experts": other, "q_proj": nn.Linear(64, 64)})
    conversion = lq_plugin.convert(unknown, "nf4")
    assert left_alone(conversion)["experts.w1"] == "fused experts whose forward is unknown"
    assert conversion.weights == 64 * 64 + 2 * 4 * 64


def test_one_module_of_experts_has_one_format() -> None:
    with pytest.raises(ValueError, match=r"experts of 'experts.gate_up_proj' are one module"):
        lq_plugin.convert(Mixture(), {"down_proj": "nf4", "*": "fp4"})


def foreign() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    return nn.Sequential(bnb.nn.Linear4bit(64, 64).to("cpu"), nn.Linear(64, 64))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes", "ignore::FutureWarning:bitsandbytes")
def test_weights_that_are_quantised_already_are_an_error() -> None:
    model = Language()
    lq_plugin.convert(model, "nf4")
    for other in ("fp4", NF4(32), "int8_switchback"):
        with pytest.raises(ValueError, match=r"layer 'blocks.0.up' is frozen in NF4.* and cannot become"):
            lq_plugin.convert(model, other)
    theirs = foreign()
    with pytest.raises(
        ValueError, match=r"layer '0' is quantised already .Linear4bit with torch.uint8.: load the model"
    ):
        lq_plugin.convert(theirs, "nf4")
    assert converted(lq_plugin.convert(theirs, "nf4", skip="0", partial=True)) == {"1": "nf4"}


def test_a_layer_whose_forward_was_replaced_is_an_error() -> None:
    model = Language()
    model.blocks[0].up.forward = lambda x: x
    with pytest.raises(ValueError, match=r"the forward of layer 'blocks.0.up' was replaced"):
        lq_plugin.convert(model, "nf4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"linear": "nf4", "skip": "q_proj"}, "pattern 'q_proj' matches no linear layer"),
        ({"linear": {"blocks.0.up": "nf4"}}, r"only 25.0% of the weights"),
        ({"linear": "nf4", "skip": ["up", "down"]}, "no linear layer to convert"),
        ({"linear": "int8_switchback", "lora": LoRAConfig()}, "lora needs a frozen base format"),
        ({"linear": "nf4", "lora": LoRAConfig(target_modules=["q_proj"])}, "q_proj"),
        ({"linear": "nf4", "lora": LoRAConfig(modules_to_save=["up"])}, "'up' would be quantised|would be quantised"),
    ],
)
def test_a_refused_conversion_changes_nothing(arguments: dict[str, object], message: str) -> None:
    model = Language()
    before, weights = shape_of(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        lq_plugin.convert(model, **arguments)
    assert shape_of(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_the_table_shows_bytes_before_and_after() -> None:
    model = Language().bfloat16()
    conversion = lq_plugin.convert(model, {"*.0.*": "nf4_dq", "*": LLMInt8(0.0)})
    lines = str(conversion).splitlines()
    row = next(line for line in lines if line.startswith("blocks.*.up") and "nf4_dq" in line)
    # 128 rows of 64: 4096 bytes of codes, 128 scales of one byte, one nested scale and the offset; 256 bytes of bias.
    assert row.split()[-4:] == ["16.2", "KiB", "4.4", "KiB"]
    assert conversion.converted[0].bytes_after == 4096 + 128 + 4 + 4 + 256
    assert conversion.converted[2].bytes_after == 128 * 64 + 128 * 4 + 256
    assert lines[-1].startswith("nf4_dq, llm_int8: 100.0% of the weights outside the embeddings are quantised")


def test_a_plan_reads_nothing_and_changes_nothing() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"body": Language(), "mixture": Mixture()})
    before = shape_of(model)
    plan = frozen_plan(model, {"mixture.*": "llm_int8", "*": "nf4"}, skip="down")
    assert {name: format.name for name, format in plan.items()} == {
        "body.blocks.0.up": "nf4",
        "body.blocks.1.up": "nf4",
        "mixture.q_proj": "llm_int8",
        "mixture.experts": "llm_int8",
    }
    assert shape_of(model) == before
    with pytest.raises(ValueError, match="int8_switchback trains the weights"):
        frozen_plan(model, "int8_switchback")
    assert frozen_plan(Mixture(), "nf4")["experts"] == NF4()


def test_lora_trains_beside_frozen_layers_and_nothing_else() -> None:
    model = Language()
    conversion = lq_plugin.convert(model, "nf4", lora=LoRAConfig(r=4, target_modules=["up", "down"]))
    assert conversion.adapted == tuple(f"blocks.{i}.{part}" for i in (0, 1) for part in ("up", "down"))
    assert tuple(converted(conversion)) == conversion.adapted  # the names that they had before
    assert all(("lora_" in name) == p.requires_grad for name, p in model.named_parameters())
    assert conversion.share == 1.0
    again = lq_plugin.convert(model, "nf4", lora=LoRAConfig(r=4, target_modules=["up", "down"]))
    assert (converted(again), again.share, again.adapted) == (converted(conversion), 1.0, conversion.adapted)
    row = next(line for line in str(again).splitlines() if line.startswith("adapters"))
    # 4 layers of rank 4 between 64 and 128 features, in float32: 12 KiB.
    assert row.split()[1:] == ["LoRA", "beside", "4", "layers", "0", "B", "12.0", "KiB"]
    losses = []
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(32, (4, 8))
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_adapters_of_peft_are_no_layers_to_convert() -> None:
    peft = pytest.importorskip("peft")
    model = Language()
    lq_plugin.convert(model, "nf4")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up"], r=2))
    reasons = left_alone(lq_plugin.convert(wrapped, {"*": "nf4"}))
    assert {r for name, r in reasons.items() if "lora_" in name} == {"part of an adapter"}


def test_compiled_parts_are_frozen_under_the_names_that_the_user_knows() -> None:
    model = Language()
    model.blocks[0] = cast(nn.Module, torch.compile(model.blocks[0], backend="eager"))
    assert "blocks.0.up" in converted(lq_plugin.convert(model, "nf4"))
    assert next(iter(frozen_plan(Language(), "nf4"))) == "blocks.0.up"


def test_other_adapters_than_those_that_are_there_are_refused() -> None:
    model = Language()
    lq_plugin.convert(model, "nf4", lora=LoRAConfig(r=4))
    lq_plugin.convert(model, "nf4", lora=LoRAConfig(r=4))
    with pytest.raises(ValueError, match=r"'blocks.0.up' has an adapter of r=4, .* and r=8, .* is asked for"):
        lq_plugin.convert(model, "nf4", lora=LoRAConfig(r=8))
    with pytest.raises(ValueError, match="use_dora=True is asked for"):
        lq_plugin.convert(model, "nf4", lora=LoRAConfig(r=4, use_dora=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_a_weight_in_a_dtype_that_cannot_be_quantised_is_refused_before_anything_changes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64).to(dtype))
    with pytest.raises(ValueError, match=rf"layer '1' has a weight of {dtype}, and nf4 is made from torch.float32"):
        lq_plugin.convert(model, "nf4")
    assert type(model[0]) is nn.Linear


def normed(linear: nn.Linear) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return torch.nn.utils.weight_norm(linear)


@pytest.mark.parametrize("wrap", [normed, torch.nn.utils.parametrizations.weight_norm])
@pytest.mark.parametrize("linear", ["nf4", "int8_switchback"])
def test_a_weight_that_is_computed_from_others_is_left_alone(wrap: Callable[..., nn.Module], linear: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), wrap(nn.Linear(64, 48)))
    table = str(lq_plugin.convert(model, linear, partial=True))
    assert re.search(r"\* +48×64 +its weight is computed from other parameters", table)
    model(torch.randn(2, 64)).sum().backward()
    assert all(p.grad is not None for p in model[1].parameters())


@pytest.mark.parametrize("linear", ["nf4_dq", "llm_int8"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_elements_are_left_alone(linear: str) -> None:
    model = nn.ModuleList([nn.Linear(64, 64), nn.Linear(0, 64), nn.Linear(64, 0)])
    conversion = lq_plugin.convert(model, linear)
    assert [layer.name for layer in conversion.converted] == ["0"]
    assert {layer.reason for layer in conversion.layers[1:]} == {"it has no elements"}
