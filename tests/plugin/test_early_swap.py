"""Runs with frozen layers: swapped before the restore, resumed exactly, and nothing seen by Trainers without them."""

import copy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from weakref import WeakSet

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from lq_plugin import QuantPlugin, convert, entry_point
from lq_plugin.callbacks.early_swap import EarlySwap
from lq_plugin.layers import FrozenLinear, Linear4bit
from lq_plugin.lora_config import LoRAConfig
from lq_plugin.plugin import _check_strategy
from lq_plugin.policy import Policy

ROOT = Path(__file__).parents[2]
GROUP = "lightning.pytorch.callbacks_factory"


@pytest.fixture(autouse=True)
def _entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry point of pyproject.toml, as an install has it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = tmp_path / "installed" / "lq_plugin-0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: lq-plugin\nVersion: 0\n")
    lines = [f"{name} = {target}" for name, target in project["entry-points"][GROUP].items()]
    (folder / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]))
    monkeypatch.syspath_prepend(folder.parent)


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(32, 64), nn.Linear(64, 128), nn.Linear(128, 64)
        self.lm_head = nn.Linear(64, 32)

    def training_step(self, ids: Tensor, _: int) -> Tensor:
        x = self.embed(ids)
        x = self.lm_head(x + self.down(torch.relu(self.up(x))))
        return nn.functional.cross_entropy(x.flatten(0, 1), ids.flatten())

    def validation_step(self, ids: Tensor, index: int) -> None:
        self.log("loss", self.training_step(ids, index))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader() -> torch.utils.data.DataLoader:
    ids = torch.randint(0, 32, (12, 8), generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(ids, batch_size=4)


def trainer(plugin: QuantPlugin | None, folder: Path, **kwargs: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "max_epochs": 2, "enable_checkpointing": False, "default_root_dir": folder}
    return pl.Trainer(plugins=[] if plugin is None else [plugin], **{**quiet, **options, **kwargs})


def lora_plugin(linear: str = "nf4", **kwargs: Any) -> QuantPlugin:
    return QuantPlugin(linear, lora=LoRAConfig(r=2, target_modules=["up", "down"]), **kwargs)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.integration
@pytest.mark.parametrize("checkpoint", ["adapter", "full"])
@pytest.mark.parametrize("linear", ["nf4_dq", "llm_int8"])
def test_a_resumed_run_goes_on_to_the_bit(linear: str, checkpoint: str, tmp_path: Path) -> None:
    whole = net()
    trainer(lora_plugin(linear, checkpoint=checkpoint), tmp_path, max_epochs=4).fit(whole, loader(), loader())
    first, second = net(), net()
    run = trainer(lora_plugin(linear, checkpoint=checkpoint), tmp_path)
    run.fit(first, loader(), loader())
    run.save_checkpoint(tmp_path / "half.ckpt")
    again = trainer(lora_plugin(linear, checkpoint=checkpoint), tmp_path, max_epochs=4)
    again.fit(second, loader(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert same(whole, second)
    assert not same(first, second)


@pytest.mark.integration
def test_a_checkpoint_is_validated_by_a_new_trainer(tmp_path: Path) -> None:
    model = net()
    run = trainer(lora_plugin(), tmp_path)
    run.fit(model, loader(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    expected = run.validate(model, loader(), verbose=False)
    found = trainer(lora_plugin(), tmp_path).validate(net(), loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert found == expected


@pytest.mark.integration
def test_layers_are_frozen_and_adapters_there_when_optimizers_are_built(tmp_path: Path) -> None:
    seen: list[str] = []

    class Watched(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
            seen.extend(name for name, _ in trained)
            return torch.optim.AdamW([p for _, p in trained], lr=1e-2)

    model = Watched()
    trainer(lora_plugin(), tmp_path).fit(model, loader(), loader())
    assert len(seen) == 4
    assert all("lora_" in name for name in seen)
    assert isinstance(model.up.base_layer, Linear4bit)


@pytest.mark.integration
def test_a_model_built_in_configure_model_is_frozen_after_it(tmp_path: Path) -> None:
    class Late(Net):
        def __init__(self) -> None:
            pl.LightningModule.__init__(self)

        def configure_model(self) -> None:
            if not hasattr(self, "up"):
                self.embed, self.up, self.down = nn.Embedding(32, 64), nn.Linear(64, 128), nn.Linear(128, 64)
                self.lm_head = nn.Linear(64, 32)

    model = Late()
    trainer(lora_plugin(), tmp_path).fit(model, loader(), loader())
    assert isinstance(model.up.base_layer, FrozenLinear)


@pytest.mark.integration
def test_frozen_and_trained_formats_train_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = net()
    plugin = QuantPlugin({"up": "nf4", "*": "int8_switchback", "lm_head": None}, partial=True)
    trainer(plugin, tmp_path).fit(model, loader(), loader())
    assert isinstance(model.up, Linear4bit)
    assert not torch.equal(model.down.weight, net().down.weight)
    printed = capsys.readouterr().out
    assert "nf4, int8_switchback: 100.0% of the weights outside the embeddings are quantised" in printed
    assert "AdamW -> AdamW8bit" in printed


def test_a_model_with_nothing_to_train_is_an_error_of_fit_alone(tmp_path: Path) -> None:
    class Bare(Net):
        def __init__(self) -> None:
            super().__init__()
            self.requires_grad_(False)

    with pytest.raises(ValueError, match=r"nothing to fit: pass lora=LoRAConfig\(\.\.\.\) to train adapters"):
        trainer(QuantPlugin("nf4"), tmp_path).fit(Bare(), loader(), loader())
    trainer(QuantPlugin("nf4"), tmp_path).validate(Bare(), loader(), verbose=False)


def test_an_optimizer_of_weights_from_before_the_freeze_is_an_error(tmp_path: Path) -> None:
    class Early(Net):
        def __init__(self) -> None:
            super().__init__()
            self.kept = list(self.parameters())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.kept, lr=1e-2)

    with pytest.raises(ValueError, match="holds 2 parameters in group 0 that are not in the model"):
        trainer(QuantPlugin("nf4"), tmp_path).fit(Early(), loader(), loader())


@pytest.mark.integration
@pytest.mark.parametrize("average", ["ema", "swa"])
def test_averages_of_weights_keep_the_codes(average: str, tmp_path: Path) -> None:
    callback: Any = EMAWeightAveraging(decay=0.9) if average == "ema" else StochasticWeightAveraging(1e-3, 1)
    model = net()
    reference = copy.deepcopy(model)
    trainer(lora_plugin("nf4"), tmp_path, callbacks=[callback], max_epochs=3).fit(model, loader(), loader())
    frozen = trainer(lora_plugin("nf4"), tmp_path)
    frozen.validate(reference, loader(), verbose=False)
    for layer, expected in ((model.up, reference.up), (model.down, reference.down)):
        assert torch.equal(layer.base_layer.weight, expected.base_layer.weight)
        assert torch.equal(layer.base_layer.scale, expected.base_layer.scale)
        assert not torch.equal(layer.lora_B, expected.lora_B)


@pytest.mark.integration
@pytest.mark.parametrize("place", ["before", "after", "converted by hand"])
def test_averages_keep_the_codes_wherever_the_callback_stands(place: str, tmp_path: Path) -> None:
    average, swap = EMAWeightAveraging(decay=0.9), EarlySwap()
    model = net()
    plugin = lora_plugin() if place != "converted by hand" else QuantPlugin(None)
    if place == "converted by hand":
        convert(model, {"up": "nf4", "down": "nf4"}, lora=LoRAConfig(r=2, target_modules=["up", "down"]))
    callbacks = [swap, average] if place == "before" else [average, swap]
    frozen = net()
    convert(frozen, {"up": "nf4", "down": "nf4"})
    trainer(plugin, tmp_path, callbacks=callbacks, max_epochs=6).fit(model, loader(), loader())
    for layer, expected in ((model.up, frozen.up), (model.down, frozen.down)):
        assert torch.equal(layer.base_layer.weight, expected.weight)
        assert torch.equal(layer.base_layer.scale, expected.scale)


TWO_TRAINERS = """
import sys
import lightning.pytorch as pl
without, installed = sys.argv[1:]
def callbacks():
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    return [type(callback).__name__ for callback in trainer.callbacks]
sys.path.insert(0, without)
before, modules = callbacks(), set(sys.modules)
sys.path[0] = installed
after = callbacks()
print(before == after, *sorted(set(sys.modules) - modules))
"""


@pytest.mark.integration
def test_a_trainer_without_the_plugin_has_the_callbacks_and_imports_that_it_had(tmp_path: Path) -> None:
    without = tmp_path / "without" / "lq_plugin-0.dist-info"
    without.mkdir(parents=True)
    (without / "METADATA").write_text("Metadata-Version: 2.1\nName: lq-plugin\nVersion: 0\n")
    command = [sys.executable, "-W", "ignore", "-c", TWO_TRAINERS, without.parent, tmp_path / "installed"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "lq_plugin", "lq_plugin.entry_point"]


def test_the_callback_does_nothing_in_a_trainer_without_the_plugin(tmp_path: Path) -> None:
    plugin = QuantPlugin("nf4")
    model = net()
    other = trainer(None, tmp_path)
    assert [type(c).__name__ for c in other.callbacks].count("EarlySwap") == 1  # type: ignore[attr-defined]
    other.validate(model, loader(), verbose=False)
    assert type(model.up) is nn.Linear
    assert plugin in QuantPlugin.alive


def test_without_a_living_plugin_there_is_no_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QuantPlugin, "alive", WeakSet())
    assert entry_point.callbacks() == []
    plugin = QuantPlugin("nf4")
    assert plugin in QuantPlugin.alive
    assert [type(callback).__name__ for callback in entry_point.callbacks()] == ["EarlySwap"]


def test_fsdp1_is_refused_beside_frozen_formats_and_not_beside_others() -> None:
    with pytest.raises(ValueError, match=r"FSDPStrategy and a frozen format.*use ModelParallelStrategy"):
        _check_strategy(FSDPStrategy(), None, Policy.of({"up": None, "*": "llm_int8"}, ()))
    _check_strategy(FSDPStrategy(), None, Policy.of("int8_switchback", ()))


def test_lora_without_a_frozen_format_is_refused_when_the_plugin_is_built() -> None:
    with pytest.raises(ValueError, match="lora needs a frozen base format"):
        QuantPlugin("int8_switchback", lora=LoRAConfig())
    with pytest.raises(TypeError, match=r"expected LoRAConfig, peft.LoraConfig or a dict"):
        QuantPlugin("nf4", lora=object())
