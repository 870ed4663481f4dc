"""A real training process in a process group of its own, watched from outside and killed in a phase of choice."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lq_plugin.recipes.launch.resume import CHECKPOINTS
from lq_plugin.recipes.reports.metrics_file import read_rows

LOSS = "train/bits_per_byte"
SOURCES = Path(asyncio.__file__).parent  # a few hundred kilobytes of Python, read in no time
PHASES = ("save", "step", "start-up")
STEPS_UNTIL_KILL = 6  # at most, beyond one checkpoint; a kill in a save waits for the next checkpoint after them
START_UP_SHARE = 0.8  # of the time until the first step: the rest varies from start to start
SAVE_SECONDS = 0.01  # about what writing one of these checkpoints takes, and a step
MODEL = ("model.width=256", "model.depth=2", "model.heads=2", "model.context=32", "model.warmup_steps=10")
DATA = (f"data.roots=[{SOURCES}]", "data.batch_size=2", "data.validation_windows=4", "data.validation_share=0.3")
NOISE = "+callbacks.noise={_target_: lq_plugin.recipes.benchmarks.gradient_noise.GradientNoise, scale: 0.1}"
TRAINER = ("trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "trainer.val_check_interval=10")
REPORTS = ("logger=csv", "~callbacks.sample", "~callbacks.figure", "callbacks.checkpoints.save_top_k=1")


@dataclass(frozen=True)
class Plan:
    """experiment=bytes_gpt made small: steps in all, and a checkpoint after every `every` of them."""

    steps: int
    every: int

    def command(self, folder: Path) -> list[str]:
        length = (f"trainer.max_steps={self.steps}", f"callbacks.checkpoints.every_n_train_steps={self.every}")
        where = (f"hydra.run.dir={folder}", "resume=auto")
        words = (*MODEL, *DATA, NOISE, *TRAINER, *REPORTS, *length, *where)
        return [sys.executable, "-m", "lq_plugin.recipes.train", "experiment=bytes_gpt", *words]


class TrainingProcess:
    """Started at once; what it prints goes to `log`."""

    def __init__(self, plan: Plan, folder: Path, log: Path) -> None:
        self.plan, self.folder, self.log = plan, folder, log
        self._metrics_before = _identity(self.metrics)
        self.started = time.monotonic()
        with log.open("w") as output:
            self._process = subprocess.Popen(
                plan.command(folder.absolute()),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},  # the sum of a product must not depend on the load
                start_new_session=True,
            )

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics" / "metrics.csv"

    @property
    def has_stepped(self) -> bool:
        """The first row that a process logs puts a new metrics.csv in place of the one before."""
        return _identity(self.metrics) != self._metrics_before

    def partials(self) -> list[Path]:
        """Checkpoints that this process has begun to write."""
        return list((self.folder / CHECKPOINTS).glob(f".*-{self._process.pid}.partial"))

    def finish(self) -> None:
        if self._process.wait() != 0:
            raise RuntimeError(f"training ended with code {self._process.returncode}:\n{self.log.read_text()}")

    def kill_in(self, phase: str, random_numbers: random.Random, start_up_seconds: float) -> str:
        """Kills the process group in `phase` or as near to it as can be had; the phase that it was."""
        if phase == "start-up":
            time.sleep(random_numbers.uniform(0, START_UP_SHARE * start_up_seconds))
        else:
            self.wait_for(lambda: self.has_stepped)
            until = len(losses(self.metrics)) + self.plan.every + random_numbers.randrange(STEPS_UNTIL_KILL)
            self.wait_for(lambda: len(losses(self.metrics)) >= until)
            if phase == "save":
                self.wait_for(lambda: bool(self.partials()))
            time.sleep(random_numbers.uniform(0, SAVE_SECONDS))
        self._kill()
        if self.partials():
            return "save"
        return "step" if self.has_stepped else "start-up"

    def wait_for(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self._process.poll() is not None:
                raise RuntimeError(
                    f"training ended with code {self._process.returncode} before it was to be killed; it needs more "
                    f"steps, or failed:\n{self.log.read_text()}"
                )

    def _kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def losses(metrics: Path) -> dict[int, str]:
    """Step -> the logged training loss to the last bit, in hexadecimal."""
    return {int(row["step"]): float(row[LOSS]).hex() for row in read_rows(metrics) if row.get(LOSS)}


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_ctime_ns
