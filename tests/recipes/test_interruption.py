"""Real signals to a real `python -m lq_plugin.recipes.train`, and two of them in one folder."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lq_plugin.recipes.launch import folder_lock
from lq_plugin.recipes.launch.folder_lock import lock_output_folder
from lq_plugin.recipes.reports.metrics_file import read_rows

pytestmark = pytest.mark.integration

MODEL = ["model.width=16", "model.depth=1", "model.heads=2", "model.context=16", "data.batch_size=2"]
ENDLESS = ["trainer.max_steps=100000", "trainer.val_check_interval=1000", "trainer.log_every_n_steps=1"]
REST = ["trainer.accelerator=cpu", "data.validation_windows=4", "callbacks.checkpoints.every_n_train_steps=100"]


@pytest.fixture
def start(tmp_path: Path, sources: Path):
    """start(override, ...) -> a training process in tmp_path/run that would take hours."""
    processes = []

    def popen(*overrides: str) -> subprocess.Popen[str]:
        words = [*MODEL, *ENDLESS, *REST, f"data.roots=[{sources}]", "hydra.run.dir=run", *overrides]
        command = [sys.executable, "-m", "lq_plugin.recipes.train", *words]
        pipe = subprocess.PIPE
        processes.append(
            subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        )
        return processes[-1]

    yield popen
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint_its_code_and_how_to_resume(number, start, tmp_path):
    pytest.importorskip("wandb")
    run = start("logger=wandb")
    wait_for(tmp_path / "run" / "metrics" / "metrics.csv", run)
    os.kill(run.pid, number)
    printed, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + number
    step = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    rows = read_rows(tmp_path / "run" / "metrics" / "metrics.csv")
    assert [int(row["step"]) for row in rows if row["train/bits_per_byte"]] == list(range(step))
    summary = printed[printed.index(f"{number.name}: saved step {step} to ") :].splitlines()
    assert summary[1].startswith(f"stopped early after {step} steps")
    assert summary[-2].startswith("upload to W&B: ")
    assert re.fullmatch(r"resume: .* resume=run/checkpoints/last\.ckpt", summary[-1])
    (wandb_run,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert wandb_run.stat().st_size > 0


def test_a_second_run_in_the_folder_is_refused_and_the_first_one_goes_on(start, tmp_path):
    first = start("logger=csv")
    wait_for(tmp_path / "run" / "metrics" / "metrics.csv", first)
    configuration = tmp_path / "run" / ".hydra" / "config.yaml"
    before = configuration.read_bytes()
    second = start("logger=csv", "resume=auto", "lr=0.5")
    _, error = second.communicate(timeout=60)
    assert second.returncode == 1
    assert re.match(rf"the output folder .*/run is in use by process {first.pid} on .* since .*hydra\.run\.dir", error)
    assert configuration.read_bytes() == before
    assert first.poll() is None
    first.kill()
    first.wait()
    third = start("logger=csv", "resume=auto", "trainer.max_steps=2")
    assert third.communicate(timeout=60)[0]
    assert third.returncode == 0


def test_other_processes_of_a_run_do_not_take_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock.rank_zero_only, "rank", 1)
    assert lock_output_folder("hydra.run.dir", str(tmp_path / "run")) is None
    assert not (tmp_path / "run").exists()


def test_a_system_without_locks_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folder_lock, "fcntl", None)
    assert lock_output_folder("hydra.run.dir", str(tmp_path / "run")) is None
    assert "no lock on this system" in capsys.readouterr().out
