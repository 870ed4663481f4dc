"""Checkpoints every few steps, and last.ckpt at the very end."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lq_plugin.recipes.reports.rehearsal import is_rehearsal


class StepCheckpoint(ModelCheckpoint):
    """ModelCheckpoint(save_last=True) that writes last.ckpt also when training ends between two checkpoints.

    A step is logged before its checkpoint is written: Lightning does it after, and a run that was killed in between
    would go on without the metrics of that step.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._every_n_train_steps and trainer.global_step % self._every_n_train_steps == 0:
            trainer._logger_connector.update_train_step_metrics()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_rehearsal(trainer):  # in which ModelCheckpoint saves nothing but here
            return
        super().on_train_end(trainer, pl_module)
        if self.last_model_path and self._last_global_step_saved != trainer.global_step:
            trainer.save_checkpoint(self.last_model_path)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A resumed run has an output folder of its own, in which it finds none of the earlier files."""
        if state_dict["dirpath"] == self.dirpath:
            super().load_state_dict(state_dict)
