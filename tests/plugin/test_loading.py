"""A checkpoint loads as what it was, or not at all: with the plugin, without it, by each way Lightning loads one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin import QuantPlugin
from lq_plugin.checkpoint_io import AtomicCheckpointIO


class Net(LightningModule):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[0].flip(1))

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("loss", nn.functional.mse_loss(self(batch[0]), batch[0].flip(1)))

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader() -> DataLoader[Any]:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), batch_size=8)


def trainer(plugin: QuantPlugin | None, tmp_path: Path, epochs: int = 1) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        plugins=[AtomicCheckpointIO()] + ([plugin] if plugin else []),
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def trained(tmp_path: Path, plugin: QuantPlugin | None) -> tuple[Net, Path]:
    model, runner = Net(), trainer(plugin, tmp_path)
    runner.fit(model, loader(), loader())
    runner.save_checkpoint(tmp_path / "run.ckpt")
    return model, tmp_path / "run.ckpt"


@pytest.fixture
def quantised(tmp_path: Path) -> tuple[Net, Path]:
    return trained(tmp_path, QuantPlugin())


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The checkpoint with a change made to it, in a file of its own."""
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path.with_name("changed.ckpt"))
    return path.with_name("changed.ckpt")


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.eval()(batch[0]) for batch in loader()])


def test_predict_gives_the_outputs_of_the_model_that_was_saved(quantised: tuple[Net, Path], tmp_path: Path) -> None:
    model, path = quantised
    predicted = trainer(QuantPlugin(), tmp_path).predict(Net(), loader(), ckpt_path=path)
    assert torch.equal(torch.cat(predicted), output(model))


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_validate_and_test_give_the_loss_of_the_model_that_was_saved(
    stage: str, quantised: tuple[Net, Path], tmp_path: Path
) -> None:
    model, path = quantised
    run = getattr(trainer(QuantPlugin(), tmp_path), stage)
    loss = run(Net(), loader(), ckpt_path=path, verbose=False)[0]["loss"]
    with torch.no_grad():
        losses = [nn.functional.mse_loss(model(batch[0]), batch[0].flip(1)) for batch in loader()]
    assert loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-6)


def test_without_the_plugin_the_weights_load_and_run_in_16_bits(quantised: tuple[Net, Path], tmp_path: Path) -> None:
    model, path = quantised
    for plain in (Net.load_from_checkpoint(path), Net()):
        plain.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        assert type(plain.net[0]) is nn.Linear
        assert torch.equal(plain.net[0].weight, model.net[0].weight)
    predicted = torch.cat(trainer(None, tmp_path).predict(Net(), loader(), ckpt_path=path))
    assert 0 < (predicted - output(model)).norm() / output(model).norm() < 0.05


def test_a_run_of_ours_does_not_go_on_without_the_plugin(quantised: tuple[Net, Path], tmp_path: Path) -> None:
    _, path = quantised
    with pytest.raises(KeyError, match="exp_avg"):
        trainer(None, tmp_path, epochs=2).fit(Net(), loader(), loader(), ckpt_path=path)


def test_a_plain_adamw_run_goes_on_with_the_plugin_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, path = trained(tmp_path, None)
    resumed, runner = Net(), trainer(QuantPlugin(), tmp_path, epochs=2)
    with caplog.at_level("INFO"):
        runner.fit(resumed, loader(), loader(), ckpt_path=path)
    assert "written without QuantPlugin" in caplog.text
    assert "converted" in caplog.text
    state = runner.optimizers[0].state[resumed.net[0].weight]
    assert state["codes1"].dtype == torch.uint8
    assert int(state["step"]) == 8
    assert not torch.equal(resumed.net[0].weight, model.net[0].weight)


def other_version(checkpoint: dict[str, Any]) -> None:
    checkpoint["lq_plugin"]["version"] = 99


def other_format(checkpoint: dict[str, Any]) -> None:
    checkpoint["lq_plugin"]["linear"]["net.0"] = "int8_switchback_vectorwise"


def other_layers(checkpoint: dict[str, Any]) -> None:
    del checkpoint["lq_plugin"]["linear"]["net.2"]


def other_block_size(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"][0]["param_groups"][0]["block_size"] = 2048


def other_code(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"][0]["param_groups"][0]["code1"] = "dynamic"


def other_state_version(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"][0]["param_groups"][0]["format_version"] = 7


def missing_state(checkpoint: dict[str, Any]) -> None:
    del checkpoint["optimizer_states"][0]["state"][0]["scale1"]


def extra_state(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"][0]["state"][0]["codes7"] = torch.zeros(3)


def other_state_shape(checkpoint: dict[str, Any]) -> None:
    state = checkpoint["optimizer_states"][0]["state"][0]
    state["codes1"] = state["codes1"][:-1]


def missing_weight(checkpoint: dict[str, Any]) -> None:
    del checkpoint["state_dict"]["net.0.weight"]


def extra_weight(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["net.7.weight"] = torch.zeros(3)


def other_weight_shape(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["net.0.weight"] = torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_version, r"record of lq_plugin has version 99, this version of lq_plugin reads version 1"),
        (other_format, r"layer 'net.0' was trained in int8_switchback_vectorwise and is now in int8_switchback"),
        (other_layers, r"layer 'net.2' was trained in no format and is now in int8_switchback"),
        (other_block_size, r"block_size.*2048|2048.*block"),
        (other_code, r"code1.*dynamic"),
        (other_state_version, r"version.*7"),
        (missing_state, r"net.0.weight.*scale1|scale1.*net.0.weight"),
        (extra_state, r"net.0.weight.*codes7|codes7.*net.0.weight"),
        (other_state_shape, r"net.0.weight.*codes1|codes1.*net.0.weight"),
        (missing_weight, r"Missing key.*net.0.weight"),
        (extra_weight, r"Unexpected key.*net.7.weight"),
        (other_weight_shape, r"size mismatch for net.0.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    change: Callable[[dict[str, Any]], None], message: str, quantised: tuple[Net, Path], tmp_path: Path
) -> None:
    _, path = quantised
    with pytest.raises((ValueError, RuntimeError, KeyError), match=f"(?s){message}"):
        trainer(QuantPlugin(), tmp_path, epochs=2).fit(Net(), loader(), loader(), ckpt_path=changed(path, change))


def test_another_format_in_the_plugin_is_refused_by_name(quantised: tuple[Net, Path], tmp_path: Path) -> None:
    _, path = quantised
    message = r"layer 'net\.0' was trained in int8_switchback and is now in int8_switchback_vectorwise"
    other = trainer(QuantPlugin("int8_switchback_vectorwise"), tmp_path, epochs=2)
    with pytest.raises(ValueError, match=message):
        other.fit(Net(), loader(), loader(), ckpt_path=path)
    with pytest.raises(ValueError, match=message):
        other.validate(Net(), loader(), ckpt_path=path)


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ({"percentile_clipping": 40}, "has percentile_clipping=5, this run has 40"),
        ({"percentile_clipping": None}, "has percentile_clipping=5, this run has None"),
        ({"optimizer": "32bit"}, "has state='8bit', this run has '32bit'"),
    ],
)
def test_other_optimizer_options_are_refused_by_name(
    plugin: dict[str, Any], message: str, quantised: tuple[Net, Path], tmp_path: Path
) -> None:
    _, path = quantised
    with pytest.raises(ValueError, match=message):
        trainer(QuantPlugin(**plugin), tmp_path, epochs=2).fit(Net(), loader(), loader(), ckpt_path=path)
