"""A run that stops and goes on from its checkpoint, in a new process, ends where the undisturbed one does: to the bit."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed_runs import RUNS
from torch import Tensor

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Every run whole, and the folder with what the resumed ones ended in."""
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    whole = {name: run.fit(folder / name) for name, run in RUNS.items()}
    script = Path(__file__).parent / "resumed_runs.py"
    done = subprocess.run([sys.executable, "-W", "ignore", str(script), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return whole, folder


@pytest.mark.parametrize("name", RUNS)
def test_resuming_changes_nothing(name: str, finished: tuple[dict[str, Any], Path]) -> None:
    whole, folder = finished
    resumed = torch.load(folder / f"{name}.pt", weights_only=True)
    losses = resumed.pop("losses")
    assert 0 < len(losses) < len(whole[name]["losses"])
    assert torch.equal(losses, whole[name]["losses"][-len(losses) :])
    for key, value in resumed.items():
        assert same(value, whole[name][key]), key


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b
