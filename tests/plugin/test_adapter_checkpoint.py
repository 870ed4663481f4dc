"""Checkpoints of LoRA runs hold what trains and a fingerprint of the base, and a run goes on from them to the bit."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin import QuantPlugin
from lq_plugin.adapter_checkpoint import ENTRY, check_base, fingerprint, from_tensor, keep_trained
from lq_plugin.adapters import add_lora, lora_layers
from lq_plugin.callbacks.early_swap import EarlySwap
from lq_plugin.formats import FORMATS
from lq_plugin.lora_config import LoRAConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]

WIDTH = 64
CONFIG = LoRAConfig(r=4, lora_dropout=0.1, target_modules=["0", "3"], modules_to_save=["norm"])


class Net(LightningModule):
    """A base that is the same in every run, and beside it dropout, a norm that trains, and statistics in buffers."""

    def __init__(self, seed: int = 7) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            wide = 2 * WIDTH
            self.net = nn.Sequential(nn.Linear(WIDTH, wide), nn.Dropout(0.1), nn.GELU(), nn.Linear(wide, WIDTH))
            self.norm = nn.BatchNorm1d(WIDTH)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.mse_loss(self.norm(self.net(batch[0])), batch[0].flip(1))

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("loss", self.training_step(batch, index))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def loader() -> DataLoader[Any]:
    data = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(data), 8, shuffle=True)


def held_out() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(2))), 8)


def trainer(folder: Path, *callbacks: Any, epochs: int = 3, **plugin: Any) -> Trainer:
    options = {"linear": "nf4", "lora": CONFIG} | plugin
    return Trainer(
        accelerator="cpu",
        plugins=[QuantPlugin(**options)],
        callbacks=[*callbacks, EarlySwap()],  # where the entry point puts it
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )


def fit(folder: Path, *callbacks: Any, ckpt_path: Path | None = None, seed: int = 7, **plugin: Any) -> Net:
    seed_everything(3, verbose=False)
    net = Net(seed)
    keep = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=1)
    trainer(folder, keep, *callbacks, **plugin).fit(net, loader(), held_out(), ckpt_path=ckpt_path)
    return net


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, Path]:
    folder = tmp_path_factory.mktemp("run")
    return fit(folder), folder


def saved(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.integration
def test_a_checkpoint_holds_what_trains_the_buffers_and_the_fingerprint(finished: tuple[Net, Path]) -> None:
    net, folder = finished
    held = saved(folder / "epoch=2.ckpt")
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert held.keys() == trained | statistics | {ENTRY}
    assert len(trained) == 4 + 2
    whole = net.state_dict()
    assert all(torch.equal(held[key], whole[key]) for key in held.keys() - {ENTRY})


OPTIONS: list[dict[str, Any]] = [
    {},
    {"linear": "llm_int8"},
    {"checkpoint": "full"},
    {"precision": "bf16-true"},
    {"precision": "bf16-mixed"},
]


@pytest.mark.integration
@pytest.mark.parametrize("plugin", OPTIONS, ids=str)
def test_resuming_changes_nothing(plugin: dict[str, Any], finished: tuple[Net, Path], tmp_path: Path) -> None:
    net, folder = finished if not plugin else (fit(tmp_path, **plugin), tmp_path)
    resumed = fit(tmp_path / "again", ckpt_path=folder / "epoch=0.ckpt", **plugin)
    before, after = net.state_dict(), resumed.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.integration
def test_full_checkpoints_hold_everything(tmp_path: Path) -> None:
    net = fit(tmp_path, checkpoint="full")
    assert saved(tmp_path / "epoch=2.ckpt").keys() == net.state_dict().keys()


@pytest.mark.integration
def test_the_best_checkpoints_are_kept_and_tested(tmp_path: Path) -> None:
    seed_everything(3, verbose=False)
    keep = ModelCheckpoint(tmp_path, "{epoch}", monitor="loss", save_top_k=2)
    run, net = trainer(tmp_path, keep, epochs=4), Net()
    run.fit(net, loader(), held_out())
    assert len(keep.best_k_models) == 2
    best = run.validate(net, held_out(), ckpt_path="best", verbose=False)
    fresh = trainer(tmp_path).validate(Net(), held_out(), ckpt_path=keep.best_model_path, verbose=False)
    assert best[0]["loss"] == pytest.approx(fresh[0]["loss"], rel=1e-6)
    assert best[0]["loss"] == pytest.approx(float(keep.best_model_score), rel=1e-6)


@pytest.mark.integration
def test_another_base_is_refused_before_anything_is_loaded(finished: tuple[Net, Path], tmp_path: Path) -> None:
    _, folder = finished
    for change, message in (
        ({"seed": 8}, "'net.0.bias' has the same shape and other values"),
        ({"linear": "fp4"}, "another base: that had 'net.0.weight.quant_state.bitsandbytes__nf4'"),
        ({"linear": "llm_int8"}, "another base"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(tmp_path, ckpt_path=folder / "epoch=0.ckpt", **change)


@pytest.mark.integration
def test_a_model_without_adapters_refuses_the_checkpoint(finished: tuple[Net, Path], tmp_path: Path) -> None:
    _, folder = finished
    with pytest.raises(RuntimeError, match="Missing key"):
        trainer(tmp_path, linear=None, lora=None).fit(Net(), loader(), held_out(), ckpt_path=folder / "epoch=0.ckpt")


@pytest.mark.integration
def test_averaged_weights_resume_too(tmp_path: Path) -> None:
    class Average(EMAWeightAveraging):
        def __init__(self) -> None:
            super().__init__(decay=0.9)

    net = fit(tmp_path, Average())
    resumed = fit(tmp_path / "again", Average(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert all(torch.equal(resumed.state_dict()[key], value) for key, value in net.state_dict().items())


def test_the_plugin_knows_two_kinds_of_checkpoint() -> None:
    with pytest.raises(ValueError, match="adapter, full, got 'all'"):
        QuantPlugin("nf4", lora=CONFIG, checkpoint="all")


# --- without Lightning


def adapted(frozen: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
    if frozen:
        model[2] = FORMATS["nf4"].freeze(model[2])
    add_lora(model, LoRAConfig(r=2))
    return model


def trained_state(model: nn.Module) -> dict[str, Any]:
    state = dict(model.state_dict())
    keep_trained(state, model)
    return state


def test_loading_is_strict_but_for_the_base() -> None:
    model = adapted()
    state = trained_state(model)
    assert set(state) == {"0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B", ENTRY}
    changed = {k: v if k == ENTRY else v + 1 for k, v in state.items()}
    model.load_state_dict(changed)
    assert torch.equal(model[0].lora_A, changed["0.lora_A"])
    for broken, message in (
        ({k: v for k, v in state.items() if k != "2.lora_B"}, 'Missing key.*"2.lora_B"'),
        ({k: v for k, v in state.items() if k != ENTRY}, r"Missing key.*0.base_layer.weight"),
        (state | {"3.lora_A": torch.zeros(1)}, 'Unexpected key.*"3.lora_A"'),
        (state | {"1.weight": torch.ones(WIDTH)}, r"Missing key.*0.base_layer.weight"),
    ):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(broken)
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=ENTRY):
        nn.Sequential(nn.Linear(WIDTH, WIDTH)).load_state_dict({ENTRY: state[ENTRY]}, strict=True)


def test_inside_another_module_only_its_own_base_may_be_missing() -> None:
    outer = nn.ModuleDict({"model": adapted(), "head": nn.Linear(2, 2)})
    state = dict(outer.state_dict())
    keep_trained(state, outer)
    assert "head.weight" in state
    assert f"model.{ENTRY}" in state
    assert "model.1.weight" not in state
    outer.load_state_dict(state)
    state.pop("head.bias")
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "head.bias"\. *$'):
        outer.load_state_dict(state)


def test_the_fingerprint_tells_bases_apart() -> None:
    model = adapted()
    state = trained_state(model)
    for place, change, message in (
        ("1", lambda m: m.weight.data.__setitem__(0, 5.0), "'1.weight' has the same shape"),
        ("0.base_layer", lambda m: m.weight.data.__setitem__((-1, -1), 5.0), "'0.weight'"),
        ("2.base_layer", lambda m: m.weight.data.__setitem__((0, 0), m.weight[0, 0] ^ 1), "'2.weight'"),
        ("2.base_layer", lambda m: m.scale.data.__setitem__((0, 0), 0), "'2.weight.absmax'"),
    ):
        other = copy.deepcopy(model)
        change(other.get_submodule(place))
        before = other[0].lora_A.clone()
        with pytest.raises(ValueError, match=message):
            other.load_state_dict({k: v if k == ENTRY else v + 1 for k, v in state.items()})
        assert torch.equal(other[0].lora_A, before)
    with pytest.raises(ValueError, match=r"'2.weight.*' .*|that had '2"):
        adapted(frozen=False).load_state_dict(state)


def test_the_fingerprint_is_that_of_the_model_without_adapters_in_any_float_dtype() -> None:
    model = adapted()
    before = fingerprint(model)
    assert before == fingerprint(copy.deepcopy(model))
    check_base(before, adapted())
    plain = adapted()
    for name in ("0", "2"):
        plain.set_submodule(name, lora_layers(plain)[name].base_layer)
    check_base(before, plain)
    check_base(before, copy.deepcopy(model).bfloat16())
    assert len(str(before)) < 2000


def test_a_damaged_fingerprint_says_so() -> None:
    model = adapted()
    state = trained_state(model)
    for entry in (state[ENTRY][:-3], torch.zeros(4), torch.frombuffer(bytearray(b"[1, 2]"), dtype=torch.uint8)):
        with pytest.raises(ValueError, match="damaged"):
            model.load_state_dict(state | {ENTRY: entry})
    expected = fingerprint(model)
    assert {name: value for name, value in from_tensor(state[ENTRY]).items() if name in expected} == expected


def test_odd_tensors_have_fingerprints() -> None:
    model = nn.Module()
    model.empty = nn.Parameter(torch.empty(0, 3), requires_grad=False)
    model.scalar = nn.Parameter(torch.tensor(1.0), requires_grad=False)
    model.transposed = nn.Parameter(torch.randn(2000, 3).t(), requires_grad=False)
    model.whole = nn.Parameter(torch.arange(10), requires_grad=False)
    assert fingerprint(model).keys() == {"empty", "scalar", "transposed", "whole"}
    before = fingerprint(model)
    model.transposed.data = model.transposed.data.contiguous()
    assert fingerprint(model) == before
    assert not lora_layers(model)


def test_a_compiled_model_reads_what_it_keeps() -> None:
    def compiled(seed: int) -> Any:
        model: Any = torch.compile(Net().net, backend="aot_eager")
        torch.manual_seed(seed)
        add_lora(model, LoRAConfig(r=2, init_lora_weights=False))
        return model

    one, other = compiled(1), compiled(2)
    other.load_state_dict(one.state_dict())
    kept = dict(one.state_dict())
    keep_trained(kept, one)
    assert len(kept) == 5  # two layers' A and B, and the fingerprint
    third = compiled(3)
    third.load_state_dict(kept)
    for model in (other, third):
        assert torch.equal(model.get_parameter("_orig_mod.0.lora_B"), one.get_parameter("_orig_mod.0.lora_B"))


@pytest.mark.parametrize("options", [{"lora_alpha": 64}, {"use_rslora": True}, {"r": 8, "lora_alpha": 16}])
def test_factors_are_not_read_under_another_scale(options: dict[str, Any]) -> None:
    def adapted(**options: Any) -> nn.Module:
        model = Net().net
        add_lora(model, LoRAConfig(**{"r": 4} | options))
        return model

    model = adapted()
    state = dict(model.state_dict())
    keep_trained(state, model)
    with pytest.raises(ValueError, match=r"adapter of '[03]' has r=4, scale=2.0, this model's has .*: give LoRAConfig"):
        adapted(**options).load_state_dict(state)
    adapted().load_state_dict(state)
