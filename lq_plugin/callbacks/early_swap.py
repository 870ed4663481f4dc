"""Freezes the layers of a run's model before Lightning restores a checkpoint into it and builds its optimizers.

A precision plugin is first asked when both are done. Lightning loads this callback through an entry point, see
`lq_plugin.entry_point`; it does nothing in a Trainer without QuantPlugin.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn

from lq_plugin.layers.frozen import FrozenWeight

_Averages = StochasticWeightAveraging | WeightAveraging


class EarlySwap(Callback):
    """Has QuantPlugin freeze layers in `setup`; a model that `configure_model` builds is frozen later, as it can be."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        freeze = getattr(trainer.precision_plugin, "freeze_early", None)
        if freeze is None or not freeze(pl_module):
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks[: callbacks.index(self)]:
            if isinstance(callback, _Averages):
                callback.setup(trainer, pl_module, stage)  # it has copied the model as it was before

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All callbacks have copied the model by now, in whatever order they stand, and none has averaged."""
        if not any(isinstance(module, FrozenWeight) for module in pl_module.modules()):
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, _Averages):
                keep_integers(callback)


def keep_integers(callback: StochasticWeightAveraging | WeightAveraging) -> None:
    """Has the averages of codes be the codes: a mean is a float, and the way back to an integer rounds it down."""
    if isinstance(callback, StochasticWeightAveraging):
        if not isinstance(callback._avg_fn, _ForFloats):
            callback._avg_fn = _ForFloats(callback._avg_fn)
    elif isinstance(callback._average_model, AveragedModel):
        model = callback._average_model
        if not isinstance(model.multi_avg_fn, _ForGroupsOfFloats):
            model.multi_avg_fn = _ForGroupsOfFloats(model.multi_avg_fn, _ForFloats(model.avg_fn or get_swa_avg_fn()))


@dataclass(frozen=True)
class _ForFloats:
    average: Callable[..., Any]

    def __call__(self, mean: Tensor, value: Tensor, count: Any) -> Any:
        return self.average(mean, value, count) if mean.is_floating_point() else value


@dataclass(frozen=True)
class _ForGroupsOfFloats:
    together: Callable[..., Any] | None
    one: _ForFloats

    def __call__(self, means: Sequence[Tensor], values: Sequence[Tensor], count: Any) -> None:
        if means and means[0].is_floating_point() and self.together is not None:
            self.together(means, values, count)
            return
        with torch.no_grad():
            for mean, value in zip(means, values, strict=True):
                mean.copy_(self.one(mean, value, count))
