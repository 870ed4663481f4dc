"""A signal finishes the step in flight, leaves a checkpoint of it, and ends the process with the conventional code."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.integration

PROGRAM = """
import sys, time
from pathlib import Path
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lq_plugin import GracefulStop, QuantPlugin
from lq_plugin.checkpoint_io import AtomicCheckpointIO

folder = Path(sys.argv[1])

class Slow(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(64, 64)
    def training_step(self, batch, index):
        if index == 3:
            (folder / "in step 3").touch()
            time.sleep(2)
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(2000, 64), batch_size=2)

Trainer(
    accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
    accumulate_grad_batches=2, plugins=[QuantPlugin(), AtomicCheckpointIO()],
    callbacks=[ModelCheckpoint(folder / "checkpoints"), GracefulStop()],
).fit(Slow())
"""


def signalled(folder: Path, *numbers: signal.Signals) -> tuple[int, str]:
    """Sends signals to a run whose fourth micro-batch takes two seconds; the exit code and what it printed."""
    run = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder)], stdout=subprocess.PIPE, text=True
    )
    while not (folder / "in step 3").exists():
        assert run.poll() is None
        time.sleep(0.01)
    for number in numbers:
        os.kill(run.pid, number)
        time.sleep(0.3)
    text, _ = run.communicate(timeout=60)
    return run.returncode, text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_step_in_flight_is_finished_and_saved(number: signal.Signals, tmp_path: Path) -> None:
    code, text = signalled(tmp_path, number)
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert code == 128 + number
    assert f"{number.name}: finishing this step and saving a checkpoint; a second one stops at once" in text
    assert f"{number.name}: saved step 2 to {path}; go on with ckpt_path='{path}'" in text
    assert torch.load(path, weights_only=True)["global_step"] == 2
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    begun = time.monotonic()
    code, text = signalled(tmp_path, signal.SIGINT, signal.SIGINT)
    assert code == -signal.SIGINT  # ended by the signal itself, which a shell reports as 130
    assert "saved" not in text
    assert not (tmp_path / "checkpoints").exists()
    assert time.monotonic() - begun < 60
