"""Steps with adapters in miniature: whoever freezes the base and trains the adapters, it is the same model."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lq_plugin.formats import FORMATS
from lq_plugin.layers import Linear4bit
from lq_plugin.recipes.benchmarks import training_steps_case
from lq_plugin.recipes.benchmarks.training_steps_case import make_model, make_optimizer, measure, training_step
from lq_plugin.recipes.benchmarks.training_steps_cases import SHAPES, SMALL, Case, Shape, cases
from lq_plugin.recipes.benchmarks.training_steps_lora import RANK, TARGETS, adapted_llama, frozen_format
from lq_plugin.recipes.benchmarks.training_steps_model import fill, llama

pytest.importorskip("transformers")
pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
]

CPU, META = torch.device("cpu"), torch.device("meta")
SHAPE = SMALL["E3"]
OURS = Case("E3", "ours", SHAPE, "ours", linear="nf4_dq", lora="ours")
PEERS = Case("E3", "theirs", SHAPE, "bitsandbytes", linear="nf4_dq", lora="peft")
ONE_LAYER = replace(SHAPE, layers=1)


def eager(name: str, rows: int) -> list[Case]:
    return [case for case in cases(SMALL) if case.name == name and not case.compiled and case.shape.batch == rows]


def computes_in_8_bits() -> bool:
    try:
        frozen_format(replace(OURS, compute="fp8"))
    except ValueError:
        return False
    return True


@pytest.mark.integration
@pytest.mark.parametrize(("name", "rows"), [("E3", 2), ("E3", 1), ("E4", 1)])
def test_every_case_starts_near_the_loss_of_its_model_in_16_bits_and_lowers_it(name: str, rows: int) -> None:
    listed = eager(name, rows)
    torch.manual_seed(0)
    plain = measure(replace(PEERS, shape=listed[0].shape, linear=None), steps=1).losses[0]
    for case in listed:
        if case.compute is None or computes_in_8_bits():
            result = measure(case, steps=2)
            first, last = result.losses
            assert first == pytest.approx(plain, rel=1e-3 if case.compute is None else 1e-2), case.what
            assert last < first - 5e-3, case.what
            assert result.trained == rank_sum(case.shape), case.what
            assert result.parameters == case.shape.parameters


def rank_sum(shape: Shape) -> int:
    """Parameters of the adapters: rank * (in + out) of each of the seven linears."""
    values = shape.key_value_heads * shape.hidden // shape.heads
    attention = [(shape.hidden, shape.hidden)] * 2 + [(shape.hidden, values)] * 2
    return shape.layers * RANK * sum(map(sum, [*attention, *[(shape.hidden, shape.intermediate)] * 3]))


@pytest.mark.integration
@pytest.mark.parametrize("base", ["nf4", "nf4_dq", "llm_int8"])
def test_ours_and_bitsandbytes_freeze_the_same_weights(base: str) -> None:
    models = []
    for case in (OURS, PEERS):
        torch.manual_seed(0)
        models.append(adapted_llama(replace(case, linear=base), CPU))
    ours, theirs = models[0], models[1].get_base_model()
    assert torch.equal(ours.model.embed_tokens.weight, theirs.model.embed_tokens.weight)
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    x = torch.randn(3, SHAPE.hidden, dtype=torch.bfloat16)
    for name in TARGETS[:-1]:
        place = f"model.layers.1.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"
        mine, other = (model.get_submodule(place).base_layer for model in (ours, theirs))
        assert type(other).__module__.startswith("bitsandbytes")
        assert type(theirs.get_submodule(place)).__module__ == "peft.tuners.lora.bnb"  # not that of any nn.Linear
        with torch.no_grad():
            assert torch.allclose(mine(x), other(x), rtol=0, atol=2.0**-7 * float(mine(x).abs().max())), place
    if base != "llm_int8":
        down = theirs.model.layers[0].mlp.down_proj.base_layer.weight
        weight = bitsandbytes.functional.dequantize_4bit(down.data, down.quant_state)
        assert torch.equal(weight, ours.model.layers[0].mlp.down_proj.base_layer.dequantize())
        assert down.quant_state.nested == (base == "nf4_dq")


@pytest.mark.parametrize("case", [OURS, PEERS, replace(PEERS, linear="llm_int8")], ids=["ours", "4 bits", "8 bits"])
def test_a_16_bit_weight_is_gone_before_the_next_one_is_made(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal M2: the peak is the quantised model and one layer."""
    made: list[weakref.ref[Tensor]] = []
    most = 0
    empty_like = torch.empty_like

    def watched(x: Tensor, **options: Any) -> Tensor:
        nonlocal most
        value = empty_like(x, **options)
        if value.shape == (case.shape.intermediate, case.shape.hidden):
            made.append(weakref.ref(value.untyped_storage()))
            most = max(most, sum(storage() is not None for storage in made))
        return value

    gc.disable()  # what only a collection frees would be there for as long on a GPU
    try:
        monkeypatch.setattr(torch, "empty_like", watched)
        adapted_llama(case, CPU)
    finally:
        gc.enable()
    assert len(made) >= 2 * case.shape.layers
    assert most == 1


def test_a_model_that_is_filled_has_nothing_on_the_meta_device_and_is_the_same_for_all() -> None:
    def filled(freeze: Any) -> nn.Module:
        torch.manual_seed(3)
        model = llama(SHAPE, META)
        fill(model, CPU, freeze)
        return model

    plain = filled(lambda name, linear: linear)
    frozen = filled(lambda name, linear: FORMATS["nf4"].freeze(linear) if name.endswith(TARGETS) else linear)
    built = llama(SHAPE, CPU)
    assert torch.equal(plain.model.rotary_emb.inv_freq, built.model.rotary_emb.inv_freq)
    assert {key: (x.shape, x.dtype) for key, x in plain.state_dict().items()} == {
        key: (x.shape, x.dtype) for key, x in built.state_dict().items()
    }
    assert torch.equal(plain.lm_head.weight, frozen.lm_head.weight)
    assert plain.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert bool((plain.model.norm.weight == 1).all())
    assert sum(isinstance(module, Linear4bit) for module in frozen.modules()) == 7 * SHAPE.layers
    assert not any(x.is_meta for x in (*frozen.parameters(), *frozen.buffers()))


@pytest.mark.parametrize(
    ("way", "adapters", "rest"),
    [
        ("peft", torch.bfloat16, torch.bfloat16),
        ("peft_autocast", torch.float32, torch.bfloat16),
        ("peft_prepared", torch.float32, torch.float32),
    ],
)
def test_the_ways_of_peft_differ_in_what_is_float32(way: str, adapters: torch.dtype, rest: torch.dtype) -> None:
    model = make_model(replace(PEERS, lora=way), CPU)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point()}
    assert (trained, frozen) == ({adapters}, {rest})
    assert type(model.get_base_model().model.layers[0].mlp.up_proj.base_layer) is bitsandbytes.nn.Linear4bit


@pytest.mark.parametrize(("who", "inside"), [("ours", False), ("peft", False), ("peft_autocast", True)])
def test_float32_adapters_of_peft_train_inside_autocast(who: str, inside: bool) -> None:
    case = replace(OURS if who == "ours" else PEERS, lora=who, shape=ONE_LAYER)
    model = make_model(case, CPU)
    seen: list[bool] = []
    head = next(module for name, module in model.named_modules() if name.endswith("lm_head"))
    head.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    training_step(model, case, CPU)()
    assert seen == [inside]


def test_only_adapters_reach_the_optimizer_and_their_learning_rate_is_that_of_qlora() -> None:
    for case in (OURS, PEERS, replace(PEERS, linear=None)):
        model = make_model(case, CPU)
        groups = make_optimizer(model, case).param_groups
        assert sum(p.numel() for group in groups for p in group["params"]) == rank_sum(SHAPE)
        assert {group["lr"] for group in groups} == {2e-4}


def test_a_base_multiplies_in_what_the_case_says() -> None:
    case = replace(OURS, linear="nf4", compute="bfloat16")
    model = make_model(replace(case, shape=ONE_LAYER), CPU)
    layer = model.model.layers[0].mlp.gate_proj.base_layer
    assert (layer.format.name, layer.format.compute) == ("nf4", torch.bfloat16)
    assert frozen_format(OURS) == FORMATS["nf4_dq"]
    with pytest.raises(ValueError, match="needs a frozen base, got linear='int8_rowwise'"):
        frozen_format(replace(OURS, linear="int8_rowwise"))
    with pytest.raises(ValueError, match="llm_int8 multiplies in int8 always, got compute='fp8'"):
        frozen_format(replace(OURS, linear="llm_int8", compute="fp8"))


@pytest.mark.integration
@pytest.mark.parametrize("case", [replace(OURS, loss="chunked"), PEERS], ids=["chunked", "PEFT"])
def test_a_compiled_case_is_one_graph(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(training_steps_case, "COMPILER", count)
    torch._dynamo.reset()
    small = replace(case, shape=ONE_LAYER)
    compiled = measure(replace(small, compiled=True), steps=1).losses
    assert len(graphs) == 1
    assert compiled == pytest.approx(measure(small, steps=1).losses, rel=1e-3)


def test_a_gpu_has_statistics_before_they_are_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to reset those of a GPU that nothing has used yet."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "init", lambda: calls.append("init"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: calls.append("reset"))
    training_steps_case._reset_peak(torch.device("cuda"))
    assert calls == ["init", "reset"]


def test_the_cases_are_the_goals_beside_their_peers() -> None:
    listed = [case for case in cases(SHAPES) if case.lora is not None]
    assert {(case.shape.batch, case.shape.length) for case in listed if case.name == "E3"} == {(4, 2048), (1, 2048)}
    for rows in (4, 1):
        for compiled in (False, True):
            same = [case for case in listed if case.compiled == compiled and case.shape.batch == rows]
            bases = {(case.lora, case.linear, case.compute, case.loss) for case in same if case.name == "E3"}
            assert {("peft", base, None, "transformers") for base in ("nf4", "nf4_dq", "llm_int8", None)} <= bases
            for base, compute in (("nf4", None), ("nf4_dq", None), ("nf4", "fp8"), ("nf4", "int8"), ("llm_int8", None)):
                assert {("ours", base, compute, loss) for loss in ("transformers", "chunked")} <= bases
    assert {case.optimizer for case in listed if case.lora == "ours"} == {"ours"}
    assert {case.optimizer for case in listed if case.lora != "ours"} == {"bitsandbytes"}
    assert {case.shape for case in listed if case.name == "E4"} == {SHAPES["E4"]}
