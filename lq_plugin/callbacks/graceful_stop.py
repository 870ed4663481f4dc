"""GracefulStop: a signal ends the run after the step in flight, with a checkpoint of it."""

import os
import signal
import threading
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")  # pre-emption and kill, Ctrl-C, SLURM's notice before the time limit


class GracefulStop(Callback):
    """At the first of `signals` the step in flight is finished, last.ckpt is written into the folder of the Trainer's
    ModelCheckpoint (else into default_root_dir), and the process ends with the conventional code, 128 + the signal.

    A second signal ends the process at once. In validation the checkpoint comes after the next step. Under SLURM with
    Lightning's automatic requeueing, its handler runs after the checkpoint is written, not in the middle of a step.
    With several processes the signal may reach any of them; they agree on it after each step.
    """

    def __init__(self, signals: Iterable[str] = SIGNALS) -> None:
        self.signals = [signal.Signals[name] for name in signals if hasattr(signal, name)]
        self._received: signal.Signals | None = None
        self._leaving: signal.Signals | None = None  # once the checkpoint is written
        self._before: dict[signal.Signals, Any] = {}
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._received = self._leaving = None
        if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
            self._before = {number: signal.signal(number, self._receive) for number in self.signals}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._leave_if_saved()
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step or not self._agreed(trainer):
            return  # in the middle of gradient accumulation a checkpoint would lose gradients
        received = self._received or signal.SIGTERM
        path = _last_checkpoint(trainer)
        trainer.save_checkpoint(path)
        _say(f"{received.name}: saved step {trainer.global_step} to {path}; go on with ckpt_path={str(path)!r}")
        self._leaving = received  # not here: Lightning logs this step after the callbacks

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave_if_saved()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave_if_saved()
        self._restore_handlers()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _leave_if_saved(self) -> None:
        if self._leaving is None:
            return
        requeue = self._before.get(self._leaving)
        if self._leaving.name.startswith("SIGUSR") and callable(requeue):
            requeue(self._leaving, None)
        raise SystemExit(128 + self._leaving)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._received = signal.Signals(number)
        _say(f"{self._received.name}: finishing this step and saving a checkpoint; a second one stops at once")

    def _agreed(self, trainer: Trainer) -> bool:
        if trainer.world_size == 1:
            return self._received is not None
        return trainer.strategy.reduce_boolean_decision(self._received is not None, all=False)

    def _restore_handlers(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def _last_checkpoint(trainer: Trainer) -> Path:
    """Where last.ckpt goes; the ModelCheckpoint is told, as if it had written it."""
    checkpoint = trainer.checkpoint_callback
    if not isinstance(checkpoint, ModelCheckpoint) or checkpoint.dirpath is None:
        return Path(trainer.default_root_dir) / "last.ckpt"
    path = Path(checkpoint.dirpath) / "last.ckpt"
    checkpoint.last_model_path = str(path)
    return path


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)
