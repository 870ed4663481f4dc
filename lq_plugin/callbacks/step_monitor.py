"""What the monitors share: one measurement every few optimizer steps, to all loggers and to the progress bar."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer


class StepMonitor(Callback, ABC):
    """every_n_steps: optimizer steps between two measurements; None takes the Trainer's log_every_n_steps."""

    # name of a metric -> its name in the progress bar
    progress_bar: ClassVar[Mapping[str, str]] = {}

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, or None for the Trainer's, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._measured_at = 0

    @abstractmethod
    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """The metrics since the last call, on every rank; empty when there is nothing to tell yet."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measured_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]  # a connector sets it
        step = trainer.global_step
        if every == 0 or step % every != 0 or step == self._measured_at:  # the last: still accumulating gradients
            return
        self._measured_at = step
        metrics = self.measure(trainer, pl_module)
        for logger in trainer.loggers:
            # The step axis of self.log and of Lightning's own monitors.
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        shown = {label: metrics[name] for name, label in self.progress_bar.items() if name in metrics}
        pl_module.log_dict(shown, prog_bar=True, logger=False, on_step=True, on_epoch=False)
