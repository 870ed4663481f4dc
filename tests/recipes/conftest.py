"""`train(...)` runs the recipe in this process, on a tiny model and a few files."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from lq_plugin.recipes.train import main

TINY = ["model.width=16", "model.depth=1", "model.heads=2", "model.context=16", "data.batch_size=2"]
SHORT = ["trainer.max_steps=6", "trainer.val_check_interval=3", "trainer.log_every_n_steps=2"]
ARTEFACTS = ["data.validation_windows=4", "callbacks.checkpoints.every_n_train_steps=2", "callbacks.sample.length=5"]


@dataclass(frozen=True)
class Run:
    """The output folder of a run and what it printed."""

    folder: Path
    printed: str


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder of Python files, twenty of which are long enough for validation to get some."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for number in range(40):
        (folder / f"module_{number}.py").write_text(f"def function_{number}(x):\n    return x + {number}\n" * 5)
    return folder


@pytest.fixture
def train(tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """train(override, ...) -> Run; each run has its own output folder below tmp_path/outputs."""
    monkeypatch.chdir(tmp_path)
    # As in a process of its own; imported where logging is set up already, Lightning hands its messages on to Hydra.
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", False)
    runs = iter(range(100))

    def run(*overrides: str, tiny: bool = True) -> Run:
        folder = tmp_path / "outputs" / f"run_{next(runs)}"
        small = [*TINY, *SHORT, *ARTEFACTS, "trainer.accelerator=cpu", f"data.roots=[{sources}]"] if tiny else []
        monkeypatch.setattr(sys, "argv", ["lq-train", f"hydra.run.dir={folder}", "logger=csv", *small, *overrides])
        main()
        return Run(folder, capsys.readouterr().out)

    return run
