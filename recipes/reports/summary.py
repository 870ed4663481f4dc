"""The last lines of a run: where each thing is that it made, and how to go on."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lq_plugin.recipes.launch.processes import hydra_options
from lq_plugin.recipes.reports.adapter import AdapterFolder
from lq_plugin.recipes.reports.checkpoints import StepCheckpoint
from lq_plugin.recipes.reports.figure import TrainingFigure
from lq_plugin.recipes.reports.rehearsal import is_rehearsal
from lq_plugin.recipes.reports.sample import TextSample

# what is logged -> how it is written
RESULTS = {
    "val/bits_per_byte": "{:.3f} bits per byte on the validation files",
    "val/loss": "loss {:.3f} on the validation samples",
    "val/accuracy": "{:.1%} of them right",
}


@contextmanager
def summary_of(trainer: Trainer) -> Iterator[None]:
    """Prints the summary, also after an error; ends the W&B run, so that the next job gets its own."""
    try:
        yield
    finally:
        folder = _finish_wandb(trainer)
        if trainer.is_global_zero:
            print("\n".join(summary_lines(trainer, folder)), flush=True)


def summary_lines(trainer: Trainer, wandb_folder: Path | None) -> list[str]:
    if is_rehearsal(trainer):
        return ["fast_dev_run: one batch of training and of validation went through; nothing was written"]
    made = {name: path for name, path in artefacts(trainer).items() if path.exists()}
    lines = [f"{_result(trainer)}; it left in {_shown(Path(HydraConfig.get().runtime.output_dir))}:"]
    lines += [f"  {name:<11} {_shown(path)}" for name, path in made.items()]
    if wandb_folder is not None:
        lines.append(f"  {'W&B':<11} {_shown(wandb_folder)}")
        if "offline-run" in wandb_folder.name:
            lines.append(f"upload to W&B: wandb sync {shlex.quote(_shown(wandb_folder))}")
    if "checkpoint" in made:
        lines.append(f"resume: {resume_command(trainer, made['checkpoint'])}")
    return lines


def artefacts(trainer: Trainer) -> dict[str, Path]:
    """What the loggers and callbacks of the recipe write, whether or not it is there yet."""
    paths = {}
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # a connector sets it
    for part in (*callbacks, *trainer.loggers):
        if isinstance(part, StepCheckpoint) and part.last_model_path:
            paths["checkpoint"] = Path(part.last_model_path)
        elif isinstance(part, CSVLogger):
            paths["metrics"] = Path(part.log_dir) / "metrics.csv"
        elif isinstance(part, TrainingFigure):
            paths["figure"] = part.path
        elif isinstance(part, TextSample):
            paths["sample"] = part.path
        elif isinstance(part, AdapterFolder):
            paths["adapter"] = part.path
    config = HydraConfig.get()
    if config.output_subdir is not None:
        paths["config"] = Path(config.runtime.output_dir) / config.output_subdir / "config.yaml"
    return paths


def resume_command(trainer: Trainer, checkpoint: Path) -> str:
    """This run's command line with the checkpoint, and twice the steps if all of them were done."""
    changed = {"resume": _shown(checkpoint)}
    if trainer.global_step >= trainer.max_steps:
        changed["trainer.max_steps"] = str(2 * trainer.max_steps)
    kept = [word for word in HydraConfig.get().overrides.task if word.split("=")[0].lstrip("+") not in changed]
    spec = sys.modules["__main__"].__spec__
    program = ["python", "-m", spec.name] if spec else [Path(sys.argv[0]).name]
    overrides = [*kept, *(f"{key}={value}" for key, value in changed.items())]
    return shlex.join([*program, *hydra_options(sys.argv[1:]), *overrides])


def _result(trainer: Trainer) -> str:
    texts = [
        text.format(trainer.callback_metrics[name])
        for name, text in RESULTS.items()
        if name in trainer.callback_metrics
    ]
    measured = "".join(f", {text}" for text in texts)
    done = "finished" if trainer.global_step >= trainer.max_steps else "stopped early"
    return f"{done} after {trainer.global_step} steps{measured}"


def _finish_wandb(trainer: Trainer) -> Path | None:
    """The folder of the W&B run, if there was one."""
    if not any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
        return None
    import wandb  # the recipe also runs where it is not installed

    if wandb.run is None:
        return None
    folder = Path(wandb.run.dir).parent
    wandb.finish()
    return folder if folder.exists() else None


def _shown(path: Path) -> str:
    """As seen from the working directory, if the path is below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
