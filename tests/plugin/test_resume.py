"""A run that stops and goes on from its checkpoint in a new process ends where the undisturbed one does, to the bit.

As a script this file does the second half of every run: `python test_resume.py <folder>`.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin import QuantPlugin
from lq_plugin.optim import Options

pytestmark = pytest.mark.integration

BATCHES, EPOCHS, BATCH_SIZE, WIDTH = 6, 2, 8, 64


class Net(LightningModule):
    """Dropout draws from the generators, the schedule moves the learning rate, and the matrices have 8-bit state."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Dropout(0.2), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.optimizer = optimizer
        self.losses: list[Tensor] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[0].flip(1))
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


def shuffled(workers: int = 0) -> DataLoader[Any]:
    """torch's own loader, whose order comes from the global generator at the start of each epoch."""
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(BATCHES * BATCH_SIZE, WIDTH, generator=generator))
    return DataLoader(data, BATCH_SIZE, shuffle=True, num_workers=workers)


class Stateful:
    """A loader that knows where it is, as torchdata's StatefulDataLoader does."""

    def __init__(self) -> None:
        self.batches = list(shuffled())
        self.next = 0

    def __iter__(self) -> Iterator[list[Tensor]]:
        torch.empty((), dtype=torch.int64).random_()  # the seed of its workers, as torch's loader draws it
        self.next %= len(self.batches)
        while self.next < len(self.batches):
            self.next += 1
            yield self.batches[self.next - 1]

    def __len__(self) -> int:
        return len(self.batches)

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next, "batches": torch.stack([batch[0] for batch in self.batches])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next, self.batches = state["next"], [[batch] for batch in state["batches"]]


@dataclass(frozen=True)
class Run:
    plugin: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    trainer: dict[str, Any] = field(default_factory=dict)
    loader: Callable[[], Any] = shuffled
    callbacks: Callable[[], list[Callback]] = list
    step: int = BATCHES  # the checkpoint is that of this step

    def fit(self, folder: Path, **arguments: Any) -> dict[str, Any]:
        """Trains; returns the losses and all that the Trainer would save after the last step."""
        seed_everything(3, verbose=False)
        net = Net(self.optimizer)
        keep = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
        trainer = Trainer(
            accelerator="cpu",
            plugins=[QuantPlugin(**self.plugin)],
            callbacks=[*self.callbacks(), keep],
            max_epochs=EPOCHS,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **self.trainer,
        )
        trainer.fit(net, self.loader(), **arguments)
        state = trainer._checkpoint_connector.dump_checkpoint()
        return {"losses": torch.stack(net.losses), **{key: state[key] for key in COMPARED}}


COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")

RUNS = {
    "int8_switchback": Run(),
    "int8_switchback_vectorwise": Run({"linear": "int8_switchback_vectorwise"}),
    "int8_switchback_mem_efficient": Run({"linear": "int8_switchback_mem_efficient"}),
    "16-bit linears": Run({"linear": None}),
    "Adam": Run(optimizer=torch.optim.Adam),
    "AdamW, 32-bit state": Run({"optimizer": "32bit"}),
    "AdamW of torch": Run({"optimizer": None}),
    "percentile 50": Run({"optimizer": Options(percentile_clipping=50, min_8bit_size=64)}),
    "bf16-mixed": Run({"precision": "bf16-mixed"}),
    "bf16-true": Run({"precision": "bf16-true"}),
    "16-mixed": Run({"precision": "16-mixed"}),
    "gradient accumulation": Run(trainer={"accumulate_grad_batches": 2}, step=BATCHES // 2),
    "workers in the loader": Run(loader=partial(shuffled, workers=2)),
    "middle of an epoch": Run(loader=Stateful, step=4),
    "EMA": Run(callbacks=lambda: [EMAWeightAveraging(decay=0.9)]),
}


def resume_all(folder: Path) -> None:
    for name, run in RUNS.items():
        whole = next((folder / name).glob(f"step={run.step}.ckpt"))
        torch.save(run.fit(folder / f"{name} resumed", ckpt_path=whole), folder / f"{name}.pt")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Every run whole, and the folder with what the resumed ones ended in."""
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    whole = {name: run.fit(folder / name) for name, run in RUNS.items()}
    command = [sys.executable, "-W", "ignore", __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    resume_all(Path(sys.argv[1]))
