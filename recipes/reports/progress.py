"""Progress of a run: a bar where the console can draw one, else a few lines. Both say the same in the same words."""

from time import monotonic
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

BAR_WIDTH = 12  # leaves room for the metrics in 80 columns
# what is logged -> how it is written
SHOWN = {
    "train/bits_per_byte": "loss {:.2f}",
    "val/bits_per_byte": "val {:.3f}",
    "train/loss": "loss {:.3f}",
    "val/loss": "val {:.3f}",
    "val/accuracy": "accuracy {:.1%}",
    "tokens/s": "{:,.0f} tokens/s",
    "peak MB": "peak {:,.0f} MB",
}


def progress_bar(lines: int = 20) -> ProgressBar:
    """A moving bar where the console can draw one, else about `lines` lines over the whole run."""
    console = get_console()
    return TrainingBar() if console.is_terminal or console.is_jupyter else TrainingLines(lines)


def metrics_text(trainer: Trainer) -> str:
    """Loss and validation loss, speed and memory, as far as they are known."""
    metrics = trainer.progress_bar_metrics
    return "  ".join(text.format(metrics[name]) for name, text in SHOWN.items() if name in metrics)


class TrainingBar(ProgressBar):
    """One bar over all steps; metrics change every log_every_n_steps, since reading them waits for the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Progress | None = None

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._bar is not None:
            return
        # Not in on_train_start: what is logged there would land in the line of the bar.
        columns = (BarColumn(BAR_WIDTH), MofNCompleteColumn(), TextColumn("{task.description}"))
        times = (TimeRemainingColumn(compact=True), TextColumn("left"))
        self._bar = Progress(*columns, *times, disable=not self._enabled)
        self._bar.add_task("", total=int(trainer.estimated_stepping_batches), completed=trainer.global_step)
        self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._bar is not None, "on_train_batch_start makes it"
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # a connector sets it
        if every and trainer.global_step % every == 0:
            self._describe(trainer)
        self._bar.update(self._bar.task_ids[0], completed=trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._describe(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._describe(trainer)
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _describe(self, trainer: Trainer) -> None:
        if self._bar is not None and self._enabled:
            self._bar.update(self._bar.task_ids[0], description=metrics_text(trainer))

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class TrainingLines(ProgressBar):
    """A line at every twentieth (`lines`) of the run."""

    def __init__(self, lines: int) -> None:
        super().__init__()
        if lines < 1:
            raise ValueError(f"at least one line is needed, got {lines}")
        self._lines = lines
        self._enabled = True
        self._started = (0.0, 0)  # time, step

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = (monotonic(), trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, steps = trainer.global_step, int(trainer.estimated_stepping_batches)
        if self._enabled and (step % max(1, steps // self._lines) == 0 or step == steps):
            print(
                f"step {step:{len(str(steps))}}/{steps}  {metrics_text(trainer)}  {self._times(step, steps)}",
                flush=True,
            )

    def _times(self, step: int, steps: int) -> str:
        began, first_step = self._started
        elapsed = monotonic() - began
        left = elapsed * (steps - step) / max(1, step - first_step)
        return f"{elapsed:.0f} s, {left:.0f} s left"
