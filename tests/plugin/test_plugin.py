"""QuantPlugin in Lightning's Trainer, on a CPU."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin import QuantPlugin
from lq_plugin.layers import QuantLinear
from lq_plugin.optim import AdamW8bit, Options

STEPS = 6


class Regression(LightningModule):
    """A small MLP that learns a fixed linear map."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW, **kwargs: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 32))
        self.optimizer, self.kwargs = optimizer, {"lr": 1e-2} | kwargs
        self.losses: list[float] = []
        self.rates: list[float] = []

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def configure_optimizers(self) -> Any:
        self.user_optimizer = self.optimizer(self.parameters(), **self.kwargs)
        schedule = torch.optim.lr_scheduler.LambdaLR(self.user_optimizer, lambda step: 0.98**step)
        return {"optimizer": self.user_optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Validated(Regression):
    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val", self.loss(batch))


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * 16, 32, generator=generator)
    return DataLoader(TensorDataset(x, x @ torch.randn(32, 32, generator=generator)), batch_size=16)


def trainer(plugin: QuantPlugin | None, tmp_path: Path, **kwargs: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    arguments |= {"accelerator": "cpu", "default_root_dir": tmp_path, "plugins": [plugin] if plugin else None}
    return Trainer(**(arguments | {"enable_checkpointing": False} | kwargs))


def fit(plugin: QuantPlugin | None, tmp_path: Path, model: Regression | None = None, **kwargs: Any) -> Regression:
    model = model or Regression()
    trainer(plugin, tmp_path, **kwargs).fit(model, loader())
    return model


def test_linears_and_optimizer_are_swapped_in_place_and_train(tmp_path: Path) -> None:
    model = fit(QuantPlugin(), tmp_path, max_epochs=10)
    assert isinstance(model.net[0], QuantLinear)
    assert type(model.user_optimizer) is AdamW8bit
    assert model.user_optimizer is model.trainer.optimizers[0]
    assert model.losses[-1] < 0.5 * model.losses[0]


def test_the_trained_loss_is_close_to_that_without_the_plugin(tmp_path: Path) -> None:
    ours = fit(QuantPlugin(percentile_clipping=None), tmp_path, max_epochs=5)
    plain = fit(None, tmp_path, max_epochs=5)
    assert ours.losses[-1] == pytest.approx(plain.losses[-1], rel=0.05)


def test_the_scheduler_drives_the_swapped_optimizer(tmp_path: Path) -> None:
    assert fit(QuantPlugin(), tmp_path).rates == pytest.approx([1e-2 * 0.98**step for step in range(STEPS)])


def test_it_prints_the_table_and_what_auto_became_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, runner = Validated(), trainer(QuantPlugin(), tmp_path)
    runner.fit(model, loader(), loader())
    runner.validate(model, loader(), verbose=False)
    text = capsys.readouterr().out
    assert text.count("quantised (") == 1
    assert "precision: 32-true" in text
    assert "optimizer: AdamW -> AdamW8bit (8bit state, percentile clipping 5 (auto))" in text
    row = next(line for line in text.splitlines() if line.startswith("net.*") and "256×32" in line)
    # 256 x 32 elements in two fp32 states, or in two codes and, for rows of 32, two fp32 scales a row; the bias of
    # 256 keeps two fp32 states.
    before, after = 2 * 4 * (256 * 32 + 256), 2 * (256 * 32 + 4 * 256) + 2 * 4 * 256
    assert row.split()[-4:] == [f"{before / 1024:.1f}", "KiB", f"{after / 1024:.1f}", "KiB"]


def test_gradient_clip_val_turns_automatic_percentile_clipping_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(QuantPlugin(), tmp_path, gradient_clip_val=1.0)
    assert "percentile clipping off: the Trainer clips at gradient_clip_val=1.0" in capsys.readouterr().out


def test_resuming_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    whole = fit(QuantPlugin(), tmp_path, max_epochs=2)
    half, first = Regression(), trainer(QuantPlugin(), tmp_path)
    first.fit(half, loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Regression()
    trainer(QuantPlugin(), tmp_path, max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert half.losses + resumed.losses == whole.losses
    for got, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(got, expected)


def test_a_checkpoint_loads_without_the_plugin(tmp_path: Path) -> None:
    model, runner = Regression(), trainer(QuantPlugin(), tmp_path)
    runner.fit(model, loader())
    runner.save_checkpoint(tmp_path / "last.ckpt")
    plain = Regression()
    plain.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(plain.net[2].weight, model.net[2].weight)


def test_validation_runs_quantised(tmp_path: Path) -> None:
    model = Validated()
    runner = trainer(QuantPlugin(), tmp_path)
    got = runner.validate(model, loader(), verbose=False)[0]["val"]
    with torch.no_grad():
        expected = sum(model.loss(batch) for batch in loader()) / STEPS
    assert isinstance(model.net[0], QuantLinear)
    assert got == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("precision", "parameter", "output"),
    [
        (None, torch.float32, torch.float32),
        ("32", torch.float32, torch.float32),
        ("bf16", torch.float32, torch.bfloat16),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("16-true", torch.float16, torch.float16),
        ("16-mixed", torch.float32, torch.float16),
    ],
)
def test_precision_governs_what_is_not_quantised(
    precision: str | None, parameter: torch.dtype, output: torch.dtype, tmp_path: Path
) -> None:
    seen = []
    model = Regression()
    model.net.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    fit(QuantPlugin(precision=precision), tmp_path, model)
    assert model.net[0].weight.dtype == parameter
    assert set(seen) == {output}
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_norm_clipping_of_the_trainer_works(precision: str, tmp_path: Path) -> None:
    model = Regression(torch.optim.SGD, lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    fit(QuantPlugin(precision=precision), tmp_path, model, gradient_clip_val=1e-3, max_steps=1)
    moved = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), before, strict=True)]).norm()
    assert float(moved.detach()) == pytest.approx(1e-3, rel=1e-2)


def test_an_optimizer_without_a_twin_is_left_alone_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = fit(QuantPlugin(), tmp_path, Regression(torch.optim.NAdam))
    assert type(model.user_optimizer) is torch.optim.NAdam
    told = "optimizer: NAdam, left alone: no 8-bit twin (those that have: AdamW8bit, Adam8bit, "
    assert told in capsys.readouterr().out
    with pytest.raises(ValueError, match="NAdam cannot have 8bit state: no 8-bit twin"):
        fit(QuantPlugin(optimizer="8bit"), tmp_path, Regression(torch.optim.NAdam))


def test_an_optimizer_of_ours_keeps_the_options_it_was_built_with(tmp_path: Path) -> None:
    model = fit(QuantPlugin(), tmp_path, Regression(AdamW8bit, percentile_clipping=20, min_8bit_size=64))
    assert model.user_optimizer.param_groups[0]["percentile_clipping"] == 20


@pytest.mark.parametrize("optimizer", ["32bit", Options(state="32bit"), None])
def test_the_optimizer_argument_chooses_the_state(optimizer: Any, tmp_path: Path) -> None:
    model = fit(QuantPlugin(optimizer=optimizer), tmp_path)
    states = [t for state in model.user_optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    assert torch.uint8 not in {t.dtype for t in states}
    assert (type(model.user_optimizer) is torch.optim.AdamW) == (optimizer is None)


def test_the_fused_flag_of_a_swapped_optimizer_is_dropped_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(QuantPlugin(), tmp_path, Regression(fused=True))
    assert "fused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"linear": "int7"}, "unknown format 'int7'; formats: int8_switchback"),
        ({"optimizer": "4bit"}, r"optimizer='4bit' is not known; expected 'auto', '8bit', 'fp8', '32bit'"),
        ({"precision": "bf8"}, "precision='bf8' is not known; expected one of "),
        ({"precision": 64}, "precision=64 is not known"),
        ({"percentile_clipping": "always"}, "expected a percentile from 1 to 99, 'auto' or None"),
        ({"percentile_clipping": 0}, "percentile_clipping is an int from 1 to 99"),
        ({"percentile_clipping": 5.0}, "percentile_clipping is an int from 1 to 99"),
        ({"percentile_clipping": [5]}, "percentile_clipping is an int from 1 to 99"),
        ({"percentile_clipping": 5, "optimizer": None}, "optimizer=None leaves it alone"),
        ({"lora": object()}, "lora needs a frozen base format"),
    ],
)
def test_bad_arguments_are_refused_when_the_plugin_is_built(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantPlugin(**arguments)


def test_lightning_refuses_precision_beside_the_plugin() -> None:
    with pytest.raises(ValueError, match="Received both"):
        Trainer(plugins=[QuantPlugin()], precision="bf16-mixed")


def test_a_parameter_that_is_not_in_the_model_is_refused(tmp_path: Path) -> None:
    class Stale(Regression):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([*self.parameters(), nn.Parameter(torch.zeros(3))])

    with pytest.raises(ValueError, match="AdamW holds 1 parameters in group 0 that are not in the model"):
        fit(QuantPlugin(), tmp_path, Stale())


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "XLAStrategy"])
def test_strategies_with_an_engine_of_their_own_are_refused(name: str, tmp_path: Path) -> None:
    strategy = type(name, (SingleDeviceStrategy,), {})(device=torch.device("cpu"))
    with pytest.raises(ValueError, match=f"QuantPlugin got {name}.*strategy='ddp'"):
        fit(QuantPlugin(), tmp_path, strategy=strategy)


def test_fabric_is_refused_by_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fabric = Fabric(accelerator="cpu", plugins=[QuantPlugin()])
    with pytest.raises(TypeError, match=r"In Lightning Fabric or a plain loop call lq_plugin.convert"):
        fabric.setup_module(nn.Linear(4, 4))


def test_a_refused_fit_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = Regression()
    with pytest.raises(ValueError, match="pattern 'q_proj' matches no linear layer"):
        fit(QuantPlugin(skip="q_proj"), tmp_path, model)
    assert type(model.net[0]) is nn.Linear


@pytest.mark.parametrize("where", ["one tensor's gradient", "the loss"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_gradient_that_is_not_finite_is_skipped_with_a_warning(where: str, precision: str, tmp_path: Path) -> None:
    class Poisoned(Regression):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            loss = super().training_step(batch, index)
            return loss * float("nan") if where == "the loss" and index == 2 else loss

        def on_after_backward(self) -> None:
            if where != "the loss" and self.trainer.global_step == 2:
                self.net.get_parameter("0.weight").grad[3, 4] = float("inf")

    model = Poisoned()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(QuantPlugin(precision=precision), tmp_path, model)
    messages = [str(warning.message) for warning in caught]
    assert sum("NaN or infinite were skipped" in text and "'net.0.weight' (1x)" in text for text in messages) == 1
    assert all(p.isfinite().all() for p in model.parameters())
    steps = {name: int(model.user_optimizer.state[p]["step"]) for name, p in model.named_parameters()}
    assert steps["net.0.weight"] == STEPS - 1
    assert steps["net.2.weight"] == (STEPS - 1 if where == "the loss" else STEPS)


def test_without_clipping_nan_reaches_the_loss(tmp_path: Path) -> None:
    class Poisoned(Regression):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 2:
                self.net.get_parameter("0.weight").grad[3, 4] = float("nan")

    losses = torch.tensor(fit(QuantPlugin(percentile_clipping=None), tmp_path, Poisoned()).losses)
    assert losses[:3].isfinite().all()
    assert losses[3:].isnan().all()


def test_in_16_mixed_the_scaler_skips_the_whole_step(tmp_path: Path) -> None:
    class Poisoned(Regression):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 2:
                self.net.get_parameter("0.weight").grad[3, 4] = float("inf")

    model = fit(QuantPlugin(precision="16-mixed"), tmp_path, Poisoned())
    assert all(p.isfinite().all() for p in model.parameters())
    assert {int(state["step"]) for state in model.user_optimizer.state.values()} == {STEPS - 1}


def test_one_trainer_validates_another_model_than_it_fitted(tmp_path: Path) -> None:
    runner = trainer(QuantPlugin(), tmp_path)
    runner.fit(Validated(), loader(), loader())
    runner.validate(Validated(), loader(), verbose=False)


@pytest.mark.parametrize(
    ("arguments", "percentile"),
    [
        ({}, 5),
        ({"percentile_clipping": 20}, 20),
        ({"percentile_clipping": None}, None),
        ({"optimizer": Options(percentile_clipping=7)}, 7),
        ({"optimizer": Options(percentile_clipping=7), "percentile_clipping": None}, None),
        ({"optimizer": Options(percentile_clipping=100)}, None),
        ({"optimizer": Options(min_8bit_size=64)}, 5),
    ],
)
def test_the_percentile_that_was_asked_for_is_used(
    arguments: dict[str, Any], percentile: int | None, tmp_path: Path
) -> None:
    model = fit(QuantPlugin(**arguments), tmp_path, max_steps=1)
    assert model.user_optimizer.param_groups[0]["percentile_clipping"] == percentile


def test_clipping_that_was_asked_for_and_cannot_be_done_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="percentile_clipping=10 was asked for, and NAdam is left alone"):
        fit(QuantPlugin(percentile_clipping=10), tmp_path, Regression(torch.optim.NAdam))


def test_an_optimizer_that_its_twin_cannot_replace_is_left_alone_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = fit(QuantPlugin(), tmp_path, Regression(amsgrad=True))
    assert type(model.user_optimizer) is torch.optim.AdamW
    assert "optimizer: AdamW, left alone: its twin has no amsgrad" in capsys.readouterr().out


def test_with_optimizer_none_parameters_may_live_outside_the_model(tmp_path: Path) -> None:
    class Outside(Regression):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([*self.parameters(), nn.Parameter(torch.zeros(3))])

    fit(QuantPlugin(optimizer=None), tmp_path, Outside())


def test_a_fit_after_validate_says_what_became_of_the_optimizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, runner = Validated(), trainer(QuantPlugin(), tmp_path)
    runner.validate(model, loader(), verbose=False)
    assert "AdamW8bit" not in capsys.readouterr().out
    runner.fit(model, loader(), loader())
    assert "AdamW -> AdamW8bit" in capsys.readouterr().out
