"""Checkpoints are whole or absent, damage is named, and nothing is unpickled."""

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lq_plugin.checkpoint_io import AtomicCheckpointIO, DamagedCheckpointError, replacing

CHECKPOINT: dict[str, Any] = {
    "weight": torch.arange(10_000.0),
    "codes": torch.arange(256, dtype=torch.uint8),
    "step": 3,
}


@pytest.fixture
def io() -> AtomicCheckpointIO:
    return AtomicCheckpointIO()


def test_what_is_saved_is_loaded(io: AtomicCheckpointIO, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "last.ckpt"
    io.save_checkpoint(CHECKPOINT, path)
    loaded = io.load_checkpoint(path)
    assert torch.equal(loaded["weight"], CHECKPOINT["weight"])
    assert loaded["codes"].dtype == torch.uint8
    assert loaded["step"] == 3
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_whichever_bit_flips_damage_is_named_and_never_used(io: AtomicCheckpointIO, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    io.save_checkpoint({"weight": torch.arange(20.0), "step": 3}, path)
    whole = path.read_bytes()
    named = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            loaded = io.load_checkpoint(path)  # the bit may be in padding or in a time stamp
        except DamagedCheckpointError as error:
            named += str(path) in str(error)
        else:
            assert torch.equal(loaded.pop("weight"), torch.arange(20.0))
            assert loaded == {"step": 3}
    assert named > len(whole) / 2


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_file_cut_short_is_named(share: float, io: AtomicCheckpointIO, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    io.save_checkpoint(CHECKPOINT, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DamagedCheckpointError, match=r"last\.ckpt is not a whole checkpoint"):
        io.load_checkpoint(path)


FULL_DISK = """
import resource, sys, torch
from lq_plugin.checkpoint_io import AtomicCheckpointIO
path, io = sys.argv[1], AtomicCheckpointIO()
io.save_checkpoint({"step": 1}, path)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for elements in (30_000, 3_000_000):  # the limit falls into the first flush, and between records
    try:
        io.save_checkpoint({"step": 2, "weight": torch.ones(elements)}, path)
    except OSError as error:
        print(error)
print(io.load_checkpoint(path))
"""


def test_a_full_disk_keeps_the_previous_file_and_says_what_was_needed(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    command = [sys.executable, "-c", FULL_DISK, str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for line, elements in zip(lines[:2], (30_000, 3_000_000), strict=True):
        needed = int(line.split("needs ")[1].split(" bytes")[0].replace(",", ""))
        assert 4 * elements < needed < 4 * elements + 5_000
        assert str(path) in line
    assert lines[2] == "{'step': 1}"
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_folder_that_cannot_be_written_is_named(io: AtomicCheckpointIO, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=r"file"):
        io.save_checkpoint(CHECKPOINT, tmp_path / "file" / "last.ckpt")


def test_an_error_while_saving_leaves_no_trace(io: AtomicCheckpointIO, tmp_path: Path) -> None:
    io.save_checkpoint(CHECKPOINT, tmp_path / "last.ckpt")
    with pytest.raises((AttributeError, pickle.PicklingError), match="pickle"):
        io.save_checkpoint({"weight": torch.ones(3), "function": lambda: None}, tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert io.load_checkpoint(tmp_path / "last.ckpt")["step"] == 3


WRITES = """
import sys, time
from pathlib import Path
from lq_plugin.checkpoint_io import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write(b"half a checkpoint")
    print("writing", flush=True)
    time.sleep(600)
"""


def writing(path: Path) -> subprocess.Popen[str]:
    """A process in the middle of writing `path`."""
    process = subprocess.Popen([sys.executable, "-c", WRITES, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.mark.integration
def test_what_killed_processes_left_is_removed_and_what_living_ones_write_stays(
    io: AtomicCheckpointIO, tmp_path: Path
) -> None:
    killed, living = writing(tmp_path / "last.ckpt"), writing(tmp_path / "step.ckpt")
    killed.kill()
    killed.communicate()
    host = socket.gethostname().replace(".", "_")
    left = tmp_path / f".last.ckpt.{host}-{killed.pid}.partial"
    kept = {f".step.ckpt.{host}-{living.pid}.partial", f".a.ckpt.other{host}-{killed.pid}.partial", ".mine.partial"}
    of_this_pid = tmp_path / f".step.ckpt.{host}-{os.getpid()}.partial"  # of a container's previous life
    for path in (*(tmp_path / name for name in kept), of_this_pid):
        path.touch()
    assert left.exists()
    try:
        io.save_checkpoint(CHECKPOINT, tmp_path / "new.ckpt")
        assert set(os.listdir(tmp_path)) == {"new.ckpt", *kept}
    finally:
        living.kill()
        living.communicate()


def test_two_checkpoints_can_be_written_at_once(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.ckpt") as a, replacing(tmp_path / "b.ckpt") as b:
        a.write(b"a")
        b.write(b"b")
    assert sorted(os.listdir(tmp_path)) == ["a.ckpt", "b.ckpt"]


TRAINING = """
import resource, sys
from pathlib import Path
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lq_plugin.checkpoint_io import AtomicCheckpointIO

folder, fault = Path(sys.argv[1]), sys.argv[2]

class Growing(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(8, 8)
    def training_step(self, batch, index):
        if self.global_step == 2 and fault == "no folder":
            folder.rename(folder.with_name("moved"))
            folder.touch()
        return self.net(batch).square().mean()
    def on_save_checkpoint(self, checkpoint):
        checkpoint["history"] = torch.zeros(100_000 * self.global_step)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(20, 8), batch_size=2)

if fault == "full disk":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
Trainer(
    accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
    plugins=[AtomicCheckpointIO()],
    callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)],
).fit(Growing())
"""


@pytest.mark.integration
@pytest.mark.parametrize(("fault", "left"), [("full disk", "checkpoints"), ("no folder", "moved")])
def test_a_training_run_ends_with_the_file_that_failed_and_its_earlier_checkpoints(
    fault: str, left: str, io: AtomicCheckpointIO, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    command = [sys.executable, "-W", "ignore", "-c", TRAINING, str(folder), fault]
    done = subprocess.run(command, capture_output=True, text=True)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert str(folder) in error
    if fault == "full disk":
        needed = int(error.split("needs ")[1].split(" bytes")[0].replace(",", ""))
        assert 4 * 300_000 < needed < 4 * 300_000 + 20_000
        assert error.endswith(f"'{folder / 'step=3.ckpt'}'")
    assert set(os.listdir(tmp_path / left)) == {"step=1.ckpt", "step=2.ckpt", "last.ckpt"}
    for name, step in (("step=1.ckpt", 1), ("step=2.ckpt", 2), ("last.ckpt", 2)):
        assert io.load_checkpoint(tmp_path / left / name)["global_step"] == step


def test_objects_that_would_not_load_again_are_refused_while_there_is_a_run_to_mend(
    io: AtomicCheckpointIO, tmp_path: Path
) -> None:
    io.save_checkpoint(CHECKPOINT, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"holds Python objects, which would not be loaded again: pathlib"):
        io.save_checkpoint({"hyper_parameters": {"folder": tmp_path}}, tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert io.load_checkpoint(tmp_path / "last.ckpt")["step"] == 3


class _Runs:
    """What an attacker would put in a file: an object that runs a function of its choice when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (str(self.marker),)


def test_a_checkpoint_that_carries_code_is_refused_and_not_run(io: AtomicCheckpointIO, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "extra": _Runs(tmp_path / "ran")}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt holds Python objects, which can run code when they are loaded"):
        io.load_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="weights_only=False"):
        io.load_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert not (tmp_path / "ran").exists()
