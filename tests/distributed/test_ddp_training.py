"""Lightning's DDP with QuantPlugin: all ranks hold the same bits after every run, or are refused by name."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_hook
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin import LoRAConfig, QuantPlugin, optim, run_facts
from lq_plugin.callbacks.early_swap import EarlySwap
from lq_plugin.formats import FROZEN_FORMATS, TRAINABLE_FORMATS
from lq_plugin.optim import TWINS, Options
from lq_plugin.optim.base import LowBitOptimizer

pytestmark = pytest.mark.integration

WIDTH, BATCH, STEPS = 32, 8, 4
LORA = LoRAConfig(r=4, init_lora_weights=False)


class Net(LightningModule):
    """Every rank begins with weights of its own, and keeps those it began with."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer], unused: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(10 + dist.get_rank())
            self.net = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            self.unused = nn.Linear(WIDTH, WIDTH) if unused else nn.Identity()
        self.optimizer = optimizer
        self.losses: list[float] = []
        self.began: dict[str, Tensor] = {}
        self.buffers_sent = -1

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        if not self.losses:
            self.buffers_sent = len(self.trainer.strategy.model.modules_buffers)
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[0].flip(1))
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        if any(kind is self.optimizer for kind in (torch.optim.Muon, optim.Muon8bit)):
            trained = [p for p in trained if p.ndim == 2]
        return self.optimizer(trained, lr=1e-2)


class Reduced(Callback):
    """How gradients are sent (Lightning registers hooks on GPUs only), and how often."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook
        self.buckets: list[int] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.model.register_comm_hook(None, self.send)

    def send(self, state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.buckets.append(bucket.index())
        return self.hook(None, bucket)


class KeepStart(Callback):
    """What a rank has before DDP gives it what rank 0 has."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, Net)
        pl_module.began = integers_and_parameters(pl_module)


def integers_and_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


@dataclass(frozen=True)
class Case:
    plugin: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    trainer: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    samples: int = STEPS * BATCH  # for each rank
    hook: Callable[..., Any] = allreduce_hook
    unused: bool = False
    other_sizes: bool = False  # the last batch of each rank has another size

    def loader(self) -> DataLoader[Any]:
        rank = dist.get_rank()
        samples = self.samples - (rank if self.other_sizes else 0)
        x = torch.randn(samples, WIDTH, generator=torch.Generator().manual_seed(20 + rank))
        growing = 1 + torch.arange(samples)[:, None] / BATCH  # so do norms, which are clipped then
        return DataLoader(TensorDataset(growing * x * x.abs()), BATCH)

    def run(self) -> dict[str, Any]:
        net, printed, reduced = Net(self.optimizer, self.unused), io.StringIO(), Reduced(self.hook)
        error = "none"
        with contextlib.redirect_stdout(printed):
            try:
                self.trainer_with(reduced).fit(net, self.loader())
            except (ValueError, RuntimeError) as refusal:
                error = str(refusal)
        state = net.trainer.optimizers[0].state_dict()["state"] if net.losses else {}
        return {
            "error": error,
            "printed": printed.getvalue(),
            "losses": net.losses,
            "began": net.began,
            "ended": integers_and_parameters(net),
            "state": state,
            "optimizer": type(net.trainer.optimizers[0]).__name__ if net.losses else "",
            "buffers_sent": net.buffers_sent,
            "buckets": len(reduced.buckets),
        }

    def trainer_with(self, *callbacks: Callback) -> Trainer:
        return Trainer(
            accelerator="cpu",
            devices=dist.get_world_size(),
            strategy=DDPStrategy(**self.strategy),
            plugins=[QuantPlugin(**self.plugin)],
            callbacks=[EarlySwap(), KeepStart(), *callbacks],  # the first as its entry point gives it
            max_epochs=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
            **self.trainer,
        )


def options(**given: Any) -> dict[str, Any]:
    return {"optimizer": Options(**({"min_8bit_size": 64} | given))}


def lion(**given: Any) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters, lr: optim.Lion8bit(parameters, lr=lr, min_8bit_size=64, **given)


CASES = (
    {name: Case({"linear": name}) for name in TRAINABLE_FORMATS}
    | {name: Case({"linear": name, "lora": LORA}) for name in FROZEN_FORMATS}
    | {kind.__name__: Case(options(), kind) for kind in TWINS}
    | {
        "Lion8bit": Case(optimizer=lion()),
        "AdEMAMix8bit": Case(optimizer=lambda p, lr: optim.AdEMAMix8bit(p, lr=lr, min_8bit_size=64)),
        "LAMB8bit": Case(optimizer=lambda p, lr: optim.LAMB8bit(p, lr=lr, min_8bit_size=64)),
        "LARS8bit": Case(optimizer=lambda p, lr: optim.LARS8bit(p, lr=lr, momentum=0.9, min_8bit_size=64)),
        "torch's AdamW": Case({"optimizer": None}),
        "fp8 state": Case(options(state="fp8")),
        "32-bit state": Case(options(state="32bit")),
        "clipped by tensor": Case(options(percentile_clipping=20)),
        "clipped together": Case(options(percentile_clipping=20, clip_scope="global")),
        "gradient_clip_val": Case(trainer={"gradient_clip_val": 0.01}),
        "update clip": Case(options(update_clip="rms")),
        "stochastic rounding": Case({**options(stochastic_rounding=True, rounding_seed=5), "precision": "bf16-true"}),
        "8-bit master weights": Case({**options(master_weights="8bit"), "precision": "bf16-true"}),
        "32-bit master weights": Case({**options(master_weights="32bit"), "precision": "bf16-true"}),
        "offload": Case(options(offload=True)),
        "bf16-mixed": Case({"precision": "bf16-mixed"}),
        "16-mixed": Case({"precision": "16-mixed"}),
        "bf16 gradients sent": Case(options(), hook=bf16_compress_hook),
        "accumulation": Case(trainer={"accumulate_grad_batches": 2}),
        "static graph": Case(strategy={"static_graph": True}),
        "gradients in buckets": Case(options(percentile_clipping=20), strategy={"gradient_as_bucket_view": True}),
        "last batch of 3": Case(samples=2 * BATCH + 3),
        "last batches of 7, 6, ...": Case(samples=2 * BATCH + 7, other_sizes=True),
        "unused, found": Case(unused=True, strategy={"find_unused_parameters": True}),
    }
)


def other_lr(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr * (1 + dist.get_rank()))


def refused() -> dict[str, Case]:
    """One rank, the last, with another configuration; and what DDP cannot do."""
    last = dist.get_rank() == dist.get_world_size() - 1
    return {
        "another format": Case({"linear": "int8_rowwise" if last else "int8_switchback"}),
        "another option": Case({**options(state="fp8" if last else "8bit")}),
        "other adapters": Case({"linear": "nf4", "lora": LoRAConfig(r=8 if last else 4)}),
        "another learning rate": Case(optimizer=other_lr),
        "accumulation on one": Case(trainer={"accumulate_grad_batches": 2 if last else 1}),
        "gradient release": Case(options(gradient_release=True)),
        "unused": Case(unused=True),
    }


def of_another_version() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_facts, "__version__", f"0.0.{dist.get_rank()}")
        return Case().run()


def validated() -> dict[str, Any]:
    case = CASES["nf4_dq"]
    net = Net(case.optimizer)
    case.trainer_with().validate(net, case.loader(), verbose=False)
    return {"began": net.began, "ended": integers_and_parameters(net)}


def on_rank(folder: Path) -> None:
    found = {"validated": validated()}
    for name, case in CASES.items():
        found[name] = case.run()
    found["another version"] = of_another_version()
    found |= {name: case.run() for name, case in refused().items()}
    torch.save(found, folder / f"training.{dist.get_rank()}.pt")


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


@pytest.fixture(scope="session")
def runs(of_ranks: Callable[[str], list[Any]]) -> list[dict[str, Any]]:
    return of_ranks("training")


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_end_with_the_same_bits(name: str, runs: list[dict[str, Any]]) -> None:
    first, *others = (of_rank[name] for of_rank in runs)
    assert first["error"] == "none"
    assert first["state"]
    moved = [key for key, value in first["ended"].items() if not torch.equal(value, first["began"][key].to(value))]
    assert moved
    for other in others:
        assert not same(other["began"], first["began"])
        assert other["losses"] != first["losses"]
        assert same(other["ended"], first["ended"])
        assert same(other["state"], first["state"])


@pytest.mark.parametrize("name", FROZEN_FORMATS)
def test_the_frozen_base_of_all_ranks_is_that_of_the_first(name: str, runs: list[dict[str, Any]]) -> None:
    began = runs[0][name]["began"]
    integers = [key for key, value in began.items() if not value.is_floating_point()]
    assert len(integers) >= 4
    nested = [key for key in began if "nested" in key]
    assert bool(nested) == name.endswith("_dq")
    for of_rank in runs:
        ended = of_rank[name]["ended"]
        assert all(same(ended[key], began[key]) for key in [*integers, *nested])
        assert of_rank[name]["buffers_sent"] == 0  # DDP would send them again before every step
    assert any(not torch.equal(runs[1][name]["began"][key], began[key]) for key in integers)


def test_validation_alone_takes_all_of_the_first_rank(runs: list[dict[str, Any]]) -> None:
    first, *others = (of_rank["validated"] for of_rank in runs)
    assert any("nested_offset" in key for key in first["began"])
    for other in others:
        assert not same(other["began"], first["began"])
        assert same(other["ended"], first["began"])


@pytest.mark.parametrize("name", ["clipped by tensor", "clipped together", "gradients in buckets"])
def test_gradients_were_clipped(name: str, runs: list[dict[str, Any]]) -> None:
    counts = [state["gnorm_counts"].tolist() for state in runs[0][name]["state"].values()]
    assert all(recorded == STEPS for recorded, _, _ in counts)
    assert any(clipped for _, clipped, _ in counts)


def test_a_norm_over_all_tensors_is_one_norm(runs: list[dict[str, Any]]) -> None:
    histories = [state["gnorm_history"] for state in runs[0]["clipped together"]["state"].values()]
    assert all(torch.equal(history, histories[0]) for history in histories)


def test_optimizers_are_swapped(runs: list[dict[str, Any]]) -> None:
    names = {runs[0][kind.__name__]["optimizer"] for kind in TWINS}
    assert names == {twin.__name__ for twin in TWINS.values()}
    assert all(issubclass(twin, LowBitOptimizer) for twin in TWINS.values())


def test_accumulation_sends_gradients_once_for_each_step(runs: list[dict[str, Any]]) -> None:
    every, second = runs[0]["gradient_clip_val"], runs[0]["accumulation"]
    assert len(second["losses"]) == len(every["losses"]) == STEPS
    assert second["buckets"] == every["buckets"] // 2 > 0


def test_gradients_sent_in_bf16_are_others(runs: list[dict[str, Any]]) -> None:
    plain, compressed = (runs[0][name]["ended"] for name in ("AdamW", "bf16 gradients sent"))
    assert not torch.equal(plain["net.0.weight"], compressed["net.0.weight"])


def test_a_parameter_that_no_rank_uses_stays_as_it_is(runs: list[dict[str, Any]]) -> None:
    for of_rank in runs:
        run = of_rank["unused, found"]
        assert torch.equal(run["ended"]["unused.weight"], runs[0]["unused, found"]["began"]["unused.weight"])


@pytest.mark.parametrize("name", CASES)
def test_the_first_rank_alone_prints_one_table(name: str, runs: list[dict[str, Any]]) -> None:
    assert [
        of_rank[name]["printed"].count("of the weights outside the embeddings are quantised") for of_rank in runs
    ] == [
        1,
        *[0] * (len(runs) - 1),
    ]


DIFFERENCES = {
    "another format": "layer 'net.0' is int8_rowwise (rank 0: int8_switchback); layer 'net.2' is",
    "another option": "optimizer option state is 'fp8' (rank 0: '8bit')",
    "another learning rate": "optimizer 0, param group 0: lr is {lr} (rank 0: 0.01)",
    "accumulation on one": "accumulate_grad_batches is 2 (rank 0: 1)",
    "another version": "lq_plugin's version is 0.0.{last} (rank 0: 0.0.0)",
    "other adapters": "lora is LoRAConfig(r=8",
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_rank_with_another_configuration_is_named_on_every_rank(name: str, runs: list[dict[str, Any]]) -> None:
    last = len(runs) - 1
    expected = DIFFERENCES[name].format(last=last, lr=0.01 * (1 + last))
    for of_rank in runs:
        assert f"rank {last} differs from rank 0: " in of_rank[name]["error"]
        assert expected in of_rank[name]["error"]
        assert "start every process with the same configuration".lower() in of_rank[name]["error"].lower()
        assert of_rank[name]["losses"] == []


def test_gradient_release_is_refused(runs: list[dict[str, Any]]) -> None:
    for of_rank in runs:
        assert f"{len(runs)} processes average theirs after it" in of_rank["gradient release"]["error"]


def test_unused_parameters_are_reported_as_without_the_plugin(runs: list[dict[str, Any]]) -> None:
    for of_rank in runs:
        assert "parameters that were not used in producing the loss" in of_rank["unused"]["error"]
        assert "find_unused_parameters_true" in of_rank["unused"]["error"]
