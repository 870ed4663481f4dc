"""Adapters on whole models: where they go, what trains, merging, removing, and whether they learn."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lq_plugin.adapters import (
    add_lora,
    lora_layers,
    lora_plus_groups,
    merge_lora,
    remove_lora,
    unmerge_lora,
    without_lora,
)
from lq_plugin.formats import FORMATS
from lq_plugin.lora_config import LoRAConfig

WIDTH = 32


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        mixed = sum(e(x) * weights[..., i : i + 1] for i, e in enumerate(self.experts))
        return x + self.v_proj(self.q_proj(x).tanh()) + mixed


class Net(nn.Module):
    """Two layers with experts and a router, an embedding, a norm and a head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(20, WIDTH)
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, 20, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


IDS = torch.arange(20).view(2, 10)
LINEARS = ["q_proj", "v_proj", *(f"experts.{i}" for i in range(4))]


def names_of(*ends: str, layers: tuple[int, ...] = (0, 1)) -> set[str]:
    return {f"layers.{i}.{end}" for i in layers for end in ends}


def shaken(model: nn.Module) -> nn.Module:
    """What trains, moved at random."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


PLACES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "all linears but head and router": ({}, names_of(*LINEARS)),
    "PEFT's spelling of it": ({"target_modules": "All-Linear"}, names_of(*LINEARS)),
    "suffix": ({"target_modules": ["q_proj"]}, names_of("q_proj")),
    "one name as a string": ({"target_modules": "q_proj"}, names_of("q_proj")),
    "glob": ({"target_modules": ["layers.1.*_proj"]}, names_of("q_proj", "v_proj", layers=(1,))),
    "glob as a string": ({"target_modules": "*.experts.?"}, names_of(*LINEARS[2:])),
    "expression": ({"target_modules": r".*\.(q|v)_proj"}, names_of("q_proj", "v_proj")),
    "exclude a suffix": ({"exclude_modules": ["v_proj"]}, names_of(*(n for n in LINEARS if n != "v_proj"))),
    "exclude an expression": ({"exclude_modules": r".*experts.*"}, names_of("q_proj", "v_proj")),
    "one layer": ({"target_modules": ["q_proj"], "layers_to_transform": 1}, names_of("q_proj", layers=(1,))),
    "first number counts": (
        {"target_modules": ["3", "q_proj"], "layers_to_transform": [0]},
        names_of("experts.3", "q_proj", layers=(0,)),
    ),
    "number after a name": (
        {"target_modules": ["3", "2"], "layers_to_transform": [3], "layers_pattern": "experts"},
        set(),
    ),
    "embedding": ({"target_modules": ["embed_tokens", "v_proj"]}, {"embed_tokens", *names_of("v_proj")}),
    "head by name": ({"target_modules": ["lm_head"]}, {"lm_head"}),
    "router by name": ({"target_modules": ["gate"]}, names_of("gate")),
    "what is saved whole has none": ({"modules_to_save": ["layers.1"]}, names_of(*LINEARS, layers=(0,))),
}


@pytest.mark.parametrize("case", [case for case in PLACES if case != "number after a name"])
def test_adapters_go_where_the_patterns_say(case: str) -> None:
    options, expected = PLACES[case]
    model = Net()
    before = model(IDS)
    assert set(add_lora(model, LoRAConfig(**options))) == expected == set(lora_layers(model))
    torch.testing.assert_close(model(IDS), before)


OURS = ("all linears but head and router", "PEFT's spelling of it", "glob", "glob as a string", "one name as a string")


@pytest.mark.integration
@pytest.mark.parametrize("case", [case for case in PLACES if case not in OURS])
def test_peft_chooses_the_same_layers(case: str) -> None:
    """Globs and a bare name as a string are ours, and PEFT's "all-linear" takes routers and unknown heads too."""
    peft, tuners = pytest.importorskip("peft"), pytest.importorskip("peft.tuners.tuners_utils")
    options, _ = PLACES[case]
    config = peft.LoraConfig(**{"target_modules": list(LINEARS), **options})
    names = [f"model.{name}" for name, module in Net().named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    theirs = {name for name in names if tuners.check_target_module_exists(config, name)}
    assert {name for name in names if LoRAConfig.of(config).targets(name)} == theirs


def test_the_layer_is_the_first_number_of_a_name() -> None:
    for index, expected in ((0, True), (3, False)):
        config = LoRAConfig(target_modules=["w"], layers_to_transform=index)
        assert config.targets("model.layers.0.experts.3.w") is expected
    config = LoRAConfig(target_modules=["w"], layers_to_transform=3, layers_pattern=["blocks", "experts"])
    assert config.targets("model.layers.0.experts.3.w")
    assert not config.targets("model.layers.3.others.0.w")


def test_ranks_alphas_and_scales_by_pattern() -> None:
    config = LoRAConfig(
        r=4, lora_alpha=8, rank_pattern={"q_proj": 2, r"layers\.1\..*": 3}, alpha_pattern={"^layers.0.v_proj": 1}
    )
    model = Net()
    add_lora(model, config)
    layers = lora_layers(model)
    assert [layers[f"layers.{i}.{n}"].r for i in (0, 1) for n in ("q_proj", "v_proj")] == [2, 4, 2, 3]
    assert layers["layers.0.v_proj"].scale == 1 / 4
    assert layers["layers.1.v_proj"].scale == 8 / 3


TRAINED = {
    "none": set(),
    "all": {"layers.0.q_proj.base_layer.bias", "layers.0.gate.bias", "layers.0.experts.2.bias", "norm.bias"},
    "lora_only": {"layers.0.q_proj.base_layer.bias"},
}


@pytest.mark.parametrize("bias", TRAINED)
def test_adapters_and_the_chosen_biases_train_and_nothing_else(bias: str) -> None:
    model = Net()
    add_lora(model, LoRAConfig(target_modules=["q_proj", "v_proj"], bias=bias))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    others = {name for name in trained if not name.endswith(("lora_A", "lora_B"))}
    assert TRAINED[bias] <= others
    assert all(name.endswith("bias") for name in others)
    assert len(trained - others) == 2 * 4
    assert ("norm.bias" in others) == (bias == "all")


def test_modules_to_save_train_whole_in_place() -> None:
    model = Net(tied=True)
    add_lora(model, LoRAConfig(modules_to_save=["lm_head", "embed_tokens", "norm"]))
    assert model.lm_head.weight is model.embed_tokens.weight
    assert all(p.requires_grad for m in (model.lm_head, model.embed_tokens, model.norm) for p in m.parameters())
    assert not model.layers[0].gate.weight.requires_grad


def test_a_layer_that_stands_in_two_places_has_one_adapter() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["c"] = model["a"]
    assert add_lora(model, LoRAConfig(r=2, target_modules=["b", "c"])) == ["b", "c"]
    assert model["a"] is model["c"]
    assert model["a"] is not model["b"]


def test_adding_again_changes_nothing_and_adding_others_is_an_error() -> None:
    model, config = Net(), LoRAConfig(r=2)
    names = add_lora(model, config)
    factors = [layer.lora_A for layer in lora_layers(model).values()]
    assert add_lora(model, LoRAConfig(r=2)) == names
    assert all(a is layer.lora_A for a, layer in zip(factors, lora_layers(model).values(), strict=True))
    with pytest.raises(ValueError, match="remove_lora"):
        add_lora(model, LoRAConfig(r=3))


class WithAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.proj = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a target that is nowhere": ({"target_modules": ["q_proj", "k_proj"]}, "'k_proj' matches no module.*q_proj"),
    "part of a name": ({"target_modules": ["proj"]}, "'proj' matches no module"),
    "nothing left": ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "no layer that could"),
    "an exclusion that is nowhere": ({"exclude_modules": ["o_proj"]}, "exclude_modules: 'o_proj'"),
    "a rank for nothing": ({"rank_pattern": {"o_proj": 3}}, "rank_pattern: 'o_proj' matches none"),
    "an alpha for nothing": ({"alpha_pattern": {"lm_head": 3}}, "alpha_pattern: 'lm_head'"),
    "a layer that is not there": ({"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}, "index 2"),
    "nothing saved": ({"modules_to_save": ["score"]}, "modules_to_save: 'score'"),
    "no linear": ({"target_modules": ["norm"]}, "'norm' is in target_modules, but a LayerNorm"),
    "a container": ({"target_modules": ["experts"]}, "a ModuleList cannot"),
    "tied and half trained": ({"modules_to_save": ["lm_head"]}, "'lm_head' is tied to 'embed_tokens'"),
    "lengths of an embedding": ({"target_modules": ["embed_tokens"], "use_dora": True}, "use_dora beside"),
    "parameters of experts that are not frozen": (
        {"target_modules": None, "target_parameters": ["q_proj.weight"]},
        "target_parameters: 'q_proj.weight' matches|could have an adapter",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named_and_changes_nothing(case: str) -> None:
    options, message = BAD[case]
    model = Net(tied=True)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        add_lora(model, LoRAConfig(**options))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


def test_models_that_cannot_have_adapters() -> None:
    with pytest.raises(ValueError, match="the model itself"):
        add_lora(nn.Linear(4, 4), LoRAConfig(target_modules=".*"))
    with pytest.raises(ValueError, match="no layer"):
        add_lora(nn.Sequential(nn.ReLU()), LoRAConfig())
    with pytest.raises(ValueError, match="MultiheadAttention reads"):
        add_lora(WithAttention(), LoRAConfig(target_modules=["out_proj"]))
    assert add_lora(WithAttention(), LoRAConfig()) == ["proj"]
    quantised = Net()
    quantised.layers[0].q_proj = FORMATS["nf4"].freeze(quantised.layers[0].q_proj)
    with pytest.raises(ValueError, match=r"'layers\.0\.q_proj' is quantised"):
        add_lora(quantised, LoRAConfig(target_modules=["v_proj"], modules_to_save=["q_proj"]))


VALUES: dict[str, Any] = {
    "r": (0, -1, 2.5, True),
    "lora_alpha": (0, -1, float("nan"), float("inf")),
    "lora_dropout": (-0.1, 1.0, 2),
    "bias": ("some",),
    "init_lora_weights": ("pissa", "olora", "loftq", "eva", "nonsense"),
    "rank_pattern": ({"q": 0}, {"(": 3}),
    "target_modules": (None, [], [""]),
    "layers_to_transform": (1,),
    "layers_pattern": ("layers",),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in VALUES.items() for value in values])
def test_options_out_of_range_are_errors(field: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=field.split("_")[0]):
        LoRAConfig(**{field: value})


@pytest.mark.integration
def test_peft_configs_mean_the_same_and_what_is_not_supported_is_named() -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["b", "a"], use_rslora=True, task_type="CAUSAL_LM", rank_pattern={"a": 2}
    )
    ours = LoRAConfig(
        r=3, lora_alpha=5, target_modules=["a", "b"], use_rslora=True, task_type="CAUSAL_LM", rank_pattern={"a": 2}
    )
    assert LoRAConfig.of(theirs) == LoRAConfig.of(theirs.to_dict()) == LoRAConfig.of(ours) == ours
    for option in ({"lora_bias": True}, {"trainable_token_indices": [1]}, {"layer_replication": [(0, 1)]}):
        with pytest.raises(ValueError, match=next(iter(option))):
            LoRAConfig.of(peft.LoraConfig(target_modules=["a"], **option))
    with pytest.raises(ValueError, match="another method"):
        LoRAConfig.of(peft.IA3Config(target_modules=["a"], feedforward_modules=[]))
    with pytest.raises(TypeError, match="expected LoRAConfig"):
        LoRAConfig.of("all-linear")


def test_merging_a_model_and_back() -> None:
    model = Net()
    add_lora(model, LoRAConfig(r=4, use_dora=True))
    shaken(model).eval()
    before, output = copy.deepcopy(model.state_dict()), model(IDS)
    assert len(merge_lora(model)) == 12
    torch.testing.assert_close(model(IDS), output, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="merged already"):
        merge_lora(model)
    unmerge_lora(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(IDS), output)
    with pytest.raises(ValueError, match="not merged"):
        unmerge_lora(model)


def test_one_broken_adapter_keeps_all_from_merging() -> None:
    model = Net()
    add_lora(model, LoRAConfig(r=4))
    shaken(model)
    lora_layers(model)["layers.1.experts.3"].lora_A.data[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    for change in (merge_lora, remove_lora):
        with pytest.raises(ValueError, match=r"'layers.1.experts.3': .*not finite"):
            change(model)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items() if "lora_A" not in key)


def test_a_shared_weight_is_not_merged() -> None:
    model = Net(tied=True)
    add_lora(model, LoRAConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="'lm_head' shares its weight with embed_tokens"):
        merge_lora(model)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("merged_before", [True, False])
def test_removing_adapters(merge: bool, merged_before: bool) -> None:
    model = Net().eval()
    weights, plain = copy.deepcopy(model.state_dict()), model(IDS)
    add_lora(model, LoRAConfig(r=4))
    output = shaken(model)(IDS)
    if merged_before:
        merge_lora(model)
    remove_lora(model, merge=merge)
    assert model.state_dict().keys() == weights.keys()
    torch.testing.assert_close(model(IDS), output if merge else plain, rtol=1e-4, atol=1e-5)
    assert merge or all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    for change in (merge_lora, unmerge_lora, remove_lora, lambda m: lora_plus_groups(m, 1.0)):
        with pytest.raises(ValueError, match="no LoRA layers"):
            change(model)
    assert add_lora(model, LoRAConfig(r=2))


def test_the_base_alone() -> None:
    model = Net()
    plain = model(IDS)
    add_lora(model, LoRAConfig(r=4))
    adapted = shaken(model)(IDS)
    alone = without_lora(model)
    with alone:
        assert torch.equal(model(IDS), plain)
    assert torch.equal(model(IDS), adapted)


def test_b_learns_faster_than_a() -> None:
    model = Net()
    add_lora(model, LoRAConfig(r=2, target_modules=["q_proj", "embed_tokens"], bias="lora_only"))
    groups = lora_plus_groups(model, 1e-3, 8, weight_decay=0.1, embedding_lr=1e-5)
    found = {group["name"]: (group["lr"], group["weight_decay"], len(group["params"])) for group in groups}
    assert found == {
        "lora_A": (1e-3, 0.1, 2),
        "lora_B": (8e-3, 0.1, 2),
        "lora_embedding": (1e-5, 0.1, 2),
        "others_no_decay": (1e-3, 0.0, 2),
    }
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    torch.optim.AdamW(groups)


@pytest.mark.integration
@pytest.mark.parametrize("base", ["float32", "nf4", "llm_int8"])
def test_a_planted_change_is_found(base: str) -> None:
    """Trained towards W + B A of rank 2 on random inputs, the adapter ends at B A: there is one optimum."""
    torch.manual_seed(3)
    linear = nn.Linear(WIDTH, WIDTH)
    model = nn.Sequential(linear if base == "float32" else FORMATS[base].freeze(linear))
    planted = torch.randn(WIDTH, 2) @ torch.randn(2, WIDTH) / WIDTH
    teacher = copy.deepcopy(model[0])
    add_lora(model, LoRAConfig(r=2, target_modules=["0"]))
    optimizer = torch.optim.Adam(lora_plus_groups(model, 2e-2, 2))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        x = torch.randn(64, WIDTH)
        with torch.no_grad():
            y = teacher(x) + x @ planted.t()
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    layer = lora_layers(model)["0"]
    found = layer.scale * layer.lora_B @ layer.lora_A
    assert (found - planted).norm() / planted.norm() < 1e-3
