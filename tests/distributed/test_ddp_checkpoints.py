"""Checkpoints of several ranks: written once, whole, and with the random generators of each rank."""

import random
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lq_plugin import LoRAConfig, QuantPlugin, record
from lq_plugin.adapter_checkpoint import ENTRY
from lq_plugin.callbacks.early_swap import EarlySwap
from lq_plugin.checkpoint_io import AtomicCheckpointIO

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]

WIDTH, BATCH, BATCHES, EPOCHS = 32, 4, 3, 2
LORA = LoRAConfig(r=4, lora_dropout=0.3)


class Net(LightningModule):
    """Its loss depends on three generators, which differ between ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Dropout(0.3), nn.Linear(2 * WIDTH, WIDTH))
        self.losses: list[float] = []

    def on_fit_start(self) -> None:
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(100 + self.global_rank)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        drawn = random.random() + np.random.rand()
        loss = nn.functional.mse_loss(self.net(batch[0]), drawn * batch[0].flip(1))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Stateful:
    """A loader that knows where it is, and draws as it starts, as torch's does."""

    def __init__(self, rank: int) -> None:
        self.data = torch.randn(BATCHES, BATCH, WIDTH, generator=torch.Generator().manual_seed(30 + rank))
        self.next = 0

    def __iter__(self) -> Iterator[list[Tensor]]:
        torch.empty((), dtype=torch.int64).random_()
        self.next %= BATCHES
        while self.next < BATCHES:
            self.next += 1
            yield [self.data[self.next - 1]]

    def __len__(self) -> int:
        return BATCHES

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


class Counted(AtomicCheckpointIO):
    """Knows how many files this process wrote."""

    def __init__(self) -> None:
        self.written = 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        self.written += 1


def trainer(files: Counted, *callbacks: Callback, strategy: Any = "auto", devices: int = 1, **plugin: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        plugins=[QuantPlugin(**plugin), files],
        callbacks=[*callbacks, EarlySwap()],
        max_epochs=EPOCHS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        use_distributed_sampler=False,
    )


def fit(folder: Path, ckpt_path: Path | None = None, **plugin: Any) -> dict[str, Any]:
    net, files = Net(), Counted()
    keep = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    processes = dist.get_world_size()
    # After its first step DDP lays gradients out anew, unless it looks for unused ones. That is another order in which
    # the gradients of three and more ranks are added, and a resumed run has a first step of its own.
    strategy = DDPStrategy(find_unused_parameters=processes > 2)
    runner = trainer(files, keep, strategy=strategy, devices=processes, **plugin)
    runner.fit(net, Stateful(dist.get_rank()), ckpt_path=ckpt_path)
    return {
        "losses": net.losses,
        "state_dict": {name: tensor.clone() for name, tensor in net.state_dict().items()},
        "optimizer": runner.optimizers[0].state_dict()["state"],
        "written": files.written,
    }


def saved_alone() -> dict[str, Any]:
    """Rank 0 makes a checkpoint that the others know nothing of, then all make one."""
    net = Net()
    runner = trainer(Counted(), strategy=DDPStrategy(), devices=dist.get_world_size())
    runner.fit(net, Stateful(dist.get_rank()))
    alone: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        patch.setattr(record, "_PATIENCE", timedelta(seconds=0.5))
        if dist.get_rank() == 0:
            alone = dict(runner._checkpoint_connector.dump_checkpoint()["lq_plugin"])
    runner.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed += 1  # a step later
    runner.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed += 1
    together = runner._checkpoint_connector.dump_checkpoint()["lq_plugin"]
    warned = [str(warning.message) for warning in told if "generators" in str(warning.message)]
    return {"alone": alone.get("rng_of_ranks"), "together": len(together["rng_of_ranks"]), "warned": warned}


def on_rank(folder: Path) -> None:
    found: dict[str, Any] = {"whole": fit(folder / "whole")}
    for step in (BATCHES, BATCHES + 1):
        found[f"from step {step}"] = fit(folder / f"again {step}", folder / "whole" / f"step={step}.ckpt")
    found["adapters"] = fit(folder / "adapters", linear="nf4_dq", lora=LORA)
    again = folder / "adapters" / f"step={BATCHES}.ckpt"
    found["adapters again"] = fit(folder / "adapters again", again, linear="nf4_dq", lora=LORA)
    found["alone"] = saved_alone()
    torch.save(found, folder / f"checkpoints.{dist.get_rank()}.pt")


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


@pytest.fixture(scope="session")
def runs(of_ranks: Callable[[str], list[Any]]) -> list[dict[str, Any]]:
    return of_ranks("checkpoints")


@pytest.mark.parametrize(
    ("resumed", "whole", "step"),
    [
        (f"from step {BATCHES}", "whole", BATCHES),
        (f"from step {BATCHES + 1}", "whole", BATCHES + 1),
        ("adapters again", "adapters", BATCHES),
    ],
)
def test_resuming_draws_what_each_rank_would_have_drawn(
    resumed: str, whole: str, step: int, runs: list[dict[str, Any]]
) -> None:
    for of_rank in runs:
        assert of_rank[resumed]["losses"] == of_rank[whole]["losses"][step:]
        assert same(of_rank[resumed]["state_dict"], of_rank[whole]["state_dict"])
        assert same(of_rank[resumed]["optimizer"], of_rank[whole]["optimizer"])
    assert runs[0][resumed]["losses"] != runs[1][resumed]["losses"]


def test_the_generators_of_the_ranks_differ_in_a_checkpoint(folder: Path, world_size: int) -> None:
    found = torch.load(folder / "whole" / f"step={BATCHES}.ckpt", weights_only=True)["lq_plugin"]
    assert found["rng"] is None
    assert len(found["rng_of_ranks"]) == world_size
    first, second = found["rng_of_ranks"][:2]
    assert not torch.equal(first["torch"], second["torch"])
    assert first["python"] != second["python"]
    assert not torch.equal(first["numpy"][0], second["numpy"][0])


@pytest.mark.parametrize("name", ["whole", "adapters"])
def test_the_first_rank_alone_writes(name: str, runs: list[dict[str, Any]], folder: Path) -> None:
    assert [of_rank[name]["written"] for of_rank in runs] == [BATCHES * EPOCHS, *[0] * (len(runs) - 1)]
    assert len(list((folder / name).iterdir())) == BATCHES * EPOCHS


def test_a_checkpoint_of_adapters_holds_what_trains(folder: Path) -> None:
    held = torch.load(folder / "adapters" / f"step={BATCHES}.ckpt", weights_only=True)["state_dict"]
    assert sum(ENTRY in name for name in held) == 1
    assert sum("lora_A" in name for name in held) == sum("lora_B" in name for name in held) == 2
    assert len(held) == 5


def test_a_rank_that_saves_alone_is_not_held_up(runs: list[dict[str, Any]]) -> None:
    first, *others = (of_rank["alone"] for of_rank in runs)
    assert first["alone"] == []
    assert len(first["warned"]) == 1
    assert f"ranks {list(range(1, len(runs)))} do not take part" in first["warned"][0]
    assert first["together"] == len(runs)
    assert all(other["together"] == 0 for other in others)


def test_another_number_of_processes_goes_on_and_says_so(
    folder: Path, world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(record, "rank_zero_info", said.append)
    net, keep = Net(), ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    trainer(Counted(), keep).fit(net, Stateful(0), ckpt_path=folder / "whole" / f"step={BATCHES}.ckpt")
    assert len(net.losses) == BATCHES
    assert [line.partition(": ")[0] for line in said] == [
        f"The checkpoint has the random generators of {world_size} processes and this run has 1"
    ]
