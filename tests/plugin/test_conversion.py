"""convert(): which layers change, that nothing else does, and what it says."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import lq_plugin
from lq_plugin.layers import QuantLinear, SwitchBackLinearVectorwise
from lq_plugin.layers.linear import QuantConv1D, linear


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Language(nn.Module):
    """Token ids -> logits, with an output embedding of its own or tied."""

    def __init__(self, tied: bool = False, head: str = "lm_head") -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(16)
        self.head_name = head
        setattr(self, head, nn.Linear(16, 32, bias=False))
        if tied:
            self.get_submodule(head).weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.get_submodule(self.head_name)(self.norm(x))


class Declares(Language):
    def get_output_embeddings(self) -> nn.Module:
        return self.get_submodule("out")


class Conv1D(nn.Module):
    """Stands in for the linear layer of GPT-2 in transformers: y = x @ weight + bias."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.nf = out_features
        self.weight = nn.Parameter(torch.randn(in_features, out_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


def left_alone(conversion: lq_plugin.Conversion) -> dict[str, str]:
    return {layer.name: layer.reason for layer in conversion.layers if layer.formats is None}


def converted(conversion: lq_plugin.Conversion) -> dict[str, str]:
    return {layer.name: layer.formats.name for layer in conversion.layers if layer.formats}


def test_block_linears_convert_and_embeddings_do_not() -> None:
    conversion = lq_plugin.convert(Language())
    assert set(converted(conversion)) == {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"}
    assert left_alone(conversion) == {"embed": "embedding", "lm_head": "output embedding"}
    assert conversion.share == 1.0


def test_parameters_hooks_and_names_stay_what_they_were() -> None:
    model = Language()
    before = dict(model.named_parameters())
    calls: list[str] = []
    model.blocks[0].up.register_forward_hook(lambda *_: calls.append("up"))
    lq_plugin.convert(model)
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    model(torch.arange(4).view(1, 4))
    assert calls == ["up"]
    assert isinstance(model.blocks[0].up, QuantLinear)


@pytest.mark.parametrize(
    ("build", "name", "reason"),
    [
        (lambda: Language(tied=True), "lm_head", "tied to embed"),
        (lambda: Declares(head="out"), "out", "output embedding"),
    ],
)
def test_the_output_embedding_is_found_by_structure(build: Callable[[], nn.Module], name: str, reason: str) -> None:
    assert left_alone(lq_plugin.convert(build()))[name] == reason


def test_a_full_name_overrides_what_is_always_left_alone_but_not_a_tie() -> None:
    formats = {"lm_head": "int8_switchback", "*": "int8_switchback"}
    assert "lm_head" in converted(lq_plugin.convert(Language(), formats))
    assert "lm_head" not in converted(lq_plugin.convert(Language(tied=True), formats))


def test_a_router_beside_its_experts_is_left_alone() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(16, 4)
            self.experts = nn.ModuleList(Block() for _ in range(4))

    assert left_alone(lq_plugin.convert(Mixture())) == {"gate": "router"}


@pytest.fixture
def quantised_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The weight shape of each quantised forward; a hook would not do, since a hook switches fused paths off itself."""
    calls: list[tuple[int, ...]] = []

    def forward(layer: QuantLinear, x: Tensor) -> Tensor:
        calls.append(tuple(layer.weight.shape))
        return linear(x, layer.weight, layer.bias, layer.formats)

    monkeypatch.setattr(QuantLinear, "forward", forward)
    return calls


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_encoder_layers_in_eval_run_the_quantised_forward(
    context: Callable[[], Any], quantised_calls: list[tuple[int, ...]]
) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True).eval()
    conversion = lq_plugin.convert(nn.ModuleDict({"body": layer}))
    assert left_alone(conversion) == {"body.self_attn.out_proj": "MultiheadAttention reads its weight directly"}
    with context():
        layer(torch.randn(2, 3, 16))
    assert quantised_calls == [(64, 16), (16, 64)]


def test_a_padded_encoder_in_eval_runs_the_quantised_forward(quantised_calls: list[tuple[int, ...]]) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 64, batch_first=True), 2).eval()
    lq_plugin.convert(encoder)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad():
        encoder(torch.randn(2, 3, 16), src_key_padding_mask=padding)
    assert quantised_calls == [(64, 16), (16, 64)] * 2


def test_conv1d_of_gpt2_converts() -> None:
    model = nn.Sequential(Conv1D(48, 16))
    exact = Conv1D.forward
    lq_plugin.convert(model)
    layer = model[0]
    assert isinstance(layer, QuantConv1D)
    x = torch.randn(2, 5, 16, requires_grad=True)
    output = model(x)
    output.sum().backward()
    want = exact(layer, x)
    assert (output - want).norm() / want.norm() < 0.02
    assert layer.weight.grad.shape == (16, 48)
    expected = x.detach().view(-1, 16).t() @ torch.ones(10, 48)
    torch.testing.assert_close(layer.weight.grad, expected)


def test_a_module_used_twice_is_one_layer() -> None:
    shared = nn.Linear(16, 16)
    conversion = lq_plugin.convert(nn.Sequential(shared, nn.ReLU(), shared))
    assert list(converted(conversion)) == ["0"]


def test_the_root_itself_can_be_the_linear_layer() -> None:
    layer = nn.Linear(16, 16)
    lq_plugin.convert(layer)
    assert isinstance(layer, QuantLinear)


def test_compiled_submodules_keep_the_names_the_user_knows() -> None:
    model = Language()
    model.blocks[0] = cast(nn.Module, torch.compile(model.blocks[0], backend="eager"))
    assert "blocks.0.up" in converted(lq_plugin.convert(model, skip="lm_head"))


def test_converting_again_changes_nothing_but_what_is_asked() -> None:
    model = Language()
    lq_plugin.convert(model)
    assert converted(lq_plugin.convert(model)) == converted(lq_plugin.convert(model))
    again = lq_plugin.convert(model, "int8_switchback_vectorwise")
    assert set(converted(again).values()) == {"int8_switchback_vectorwise"}


def test_a_layer_built_by_hand_keeps_its_class() -> None:
    model = nn.Sequential(SwitchBackLinearVectorwise(8, 8), nn.Linear(8, 8))
    conversion = lq_plugin.convert(model, {"1": "int8_switchback"})
    assert converted(conversion) == {"0": "int8_switchback_vectorwise", "1": "int8_switchback"}
    assert type(model[0]) is SwitchBackLinearVectorwise


def state(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"linear": "int7"}, "unknown format 'int7'"),
        ({"skip": "q_proj"}, r"pattern 'q_proj' matches no linear layer; their names end in: down, lm_head, up"),
        ({"linear": {"up": "int8_switchback", "gate": None}}, "pattern 'gate' matches no linear layer"),
        ({"skip": ["up", "down"]}, r"no linear layer to convert \(left alone: .*skip='up': blocks.0.up, blocks.1.up"),
        ({"linear": {"blocks.0.up": "int8_switchback"}}, r"only 25.0% of the weights .* pass partial=True"),
        ({"lora": object()}, "lora needs a frozen base format"),
    ],
)
def test_a_refused_conversion_changes_nothing(arguments: dict[str, object], message: str) -> None:
    model = Language()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        lq_plugin.convert(model, **arguments)
    assert state(model) == before


def test_a_model_without_linears_says_so() -> None:
    with pytest.raises(ValueError, match=r"the model has no nn.Linear.*pass linear=None"):
        lq_plugin.convert(nn.Conv2d(3, 3, 3))
    assert lq_plugin.convert(nn.Conv2d(3, 3, 3), None).converted == []


def test_partial_accepts_a_small_share() -> None:
    assert lq_plugin.convert(Language(), {"blocks.0.up": "int8_switchback"}, partial=True).share == 0.25


def test_the_table_names_layers_bytes_reasons_and_the_share() -> None:
    lines = str(lq_plugin.convert(Language())).splitlines()
    row = next(line for line in lines if line.startswith("blocks.*.up"))
    assert row.split() == ["blocks.*.up", "(2×)", "64×16", "int8_switchback", "8.5", "KiB", "8.5", "KiB"]
    assert any(line.split()[:4] == ["lm_head", "32×16", "output", "embedding"] for line in lines)
    assert any(line.startswith("everything else") and "128 B" in line for line in lines)
    assert lines[-1] == "int8_switchback: 100.0% of the weights outside the embeddings are quantised (4,096 of 4,096)"


def test_a_plain_loop_trains_with_converted_layers_and_an_8bit_optimizer() -> None:
    torch.manual_seed(0)
    model = Language()
    lq_plugin.convert(model)
    optimizer = lq_plugin.optim.AdamW8bit(model.parameters(), lr=1e-2, percentile_clipping=5, min_8bit_size=256)
    ids = torch.randint(32, (8, 16))
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_converted_layer_goes_back_where_it_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Conv1D(8, 8), nn.Linear(8, 8))
    before = state(model)
    lq_plugin.convert(model)
    assert list(converted(lq_plugin.convert(model, skip="0"))) == ["1", "2"]
    assert type(model[0]) is nn.Linear
    assert converted(lq_plugin.convert(model, None)) == {}
    assert state(model) == before


def test_a_list_of_layers_that_are_no_experts_makes_no_router() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = nn.ModuleList(Block() for _ in range(4)), nn.Linear(16, 4)

    assert "head" in converted(lq_plugin.convert(Net()))


def test_an_embedding_bag_is_an_embedding() -> None:
    conversion = lq_plugin.convert(nn.Sequential(nn.EmbeddingBag(1000, 64), nn.Linear(64, 64)))
    assert conversion.share == 1.0
    assert left_alone(conversion) == {"0": "embedding"}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_lazy_layer_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"layer '1' has no shape yet: run one batch"):
        lq_plugin.convert(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)))
