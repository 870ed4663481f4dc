"""All runs of this folder happen in one launch of torchrun; tests read what each rank wrote.

Each test module has an `on_rank(folder)` that every process calls, see run_cases.py.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("run_cases.py")


@pytest.fixture(scope="session", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids="{} processes".format)
def world_size(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="session")
def folder(world_size: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks wrote, all of which ended well. Of the workers of pytest-xdist the first launches them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"{world_size} ranks"
    told = folder / "stderr"
    try:
        folder.mkdir()
    except FileExistsError:
        while not told.exists():
            time.sleep(0.2)
    else:
        launched = launch(world_size, folder)
        unfinished = folder / "stderr.partial"
        unfinished.write_text("" if launched.returncode == 0 else launched.stderr or "failed")
        unfinished.rename(told)
    assert not told.read_text(), told.read_text()[-8000:]
    return folder


def launch(world_size: int, folder: Path) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    command = [sys.executable, "-W", "ignore", *torchrun, str(SCRIPT), str(folder)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="session")
def of_ranks(folder: Path, world_size: int) -> Callable[[str], list[Any]]:
    """What the ranks saved under a name, in order."""
    return lambda name: [torch.load(folder / f"{name}.{rank}.pt", weights_only=True) for rank in range(world_size)]
