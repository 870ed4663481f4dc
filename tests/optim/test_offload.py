"""offload: the numbers and the state_dict of state on the device, and the streams that carry it there and back."""

import copy
import logging
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_streams import Event, Stream, Streams
from lightning.pytorch import LightningModule, Trainer
from lq_kernels.optimizer_step import Job
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.data import DataLoader

from lq_plugin import QuantPlugin, optim
from lq_plugin.optim import AdamW8bit, Options, from_bitsandbytes, offload, to_bitsandbytes, to_torch
from lq_plugin.optim.base import LowBitOptimizer
from lq_plugin.optim.offload import BUFFERS, Offload, Resident

SHAPES = [(64, 256), (33, 130), (5, 7, 11), (100,), (), (0, 3), (80, 200), (30, 257), (64, 128), (40, 300)]
ALGORITHMS: list[tuple[Any, dict[str, Any]]] = [
    (optim.AdamW, {"update_clip": "rms"}),
    (optim.Adam, {"weight_decay": 0.1}),
    (optim.AdEMAMix, {}),
    (optim.Lion, {}),
    (optim.SGD, {"momentum": 0.9}),
    (optim.SGD, {}),
    (optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (optim.Adagrad, {"initial_accumulator_value": 0.1}),
    (optim.LAMB, {}),
    (optim.LARS, {}),
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which small tensors stay, most travel in several groups, and the largest in float32 do not."""
    monkeypatch.setattr(offload, "OFFLOAD_FROM", 4000)
    monkeypatch.setattr(offload, "GROUP_BYTES", 40_000)
    monkeypatch.setattr(offload, "BUFFER_BYTES", 100_000)


def parameters(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Parameter]:
    generator = torch.Generator().manual_seed(5)
    return [Parameter((torch.randn(shape, generator=generator) * 0.1).to(device, dtype)) for shape in SHAPES]


def groups(params: list[Parameter]) -> list[dict[str, Any]]:
    """Two param groups, whose tensors lie between each other's by size."""
    return [{"params": params[:3], "lr": 0.1}, {"params": params[3:], "lr": 1e-3, "rounding_seed": 7}]


def train(params: list[Parameter], optimizer: LowBitOptimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for i, param in enumerate(params):
            grad = (torch.randn(param.shape, generator=generator) * 0.01).to(param)
            param.grad = None if (i + step) % 5 == 0 else grad
        optimizer.step()


def assert_same(a: LowBitOptimizer, b: LowBitOptimizer) -> None:
    """Parameters, states and param_groups, to the bit."""
    first, second = a.state_dict(), b.state_dict()
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for number, state in first["state"].items():
        assert state.keys() == second["state"][number].keys()
        for key, value in state.items():
            other = second["state"][number][key]
            assert value.dtype == other.dtype
            assert torch.equal(value.cpu().float(), other.cpu().float()), (number, key)
    for group, other_group in zip(a.param_groups, b.param_groups, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(group["params"], other_group["params"], strict=True))


def buffers(optimizer: LowBitOptimizer) -> list[Tensor]:
    assert isinstance(optimizer.memory, Offload)
    return [buffer for conveyor in optimizer.memory._conveyors.values() for buffer in conveyor._buffers]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("state", ["8bit", "fp8", "32bit"])
@pytest.mark.parametrize(("cls", "arguments"), ALGORITHMS, ids=lambda value: getattr(value, "__name__", ""))
def test_the_numbers_are_those_of_state_on_the_device(cls: Any, arguments: dict[str, Any], state: str) -> None:
    arguments = arguments | {"state": state, "percentile_clipping": 10}
    params, offloaded_params = parameters(), parameters()
    resident = cls(groups(params), **arguments)
    offloaded = cls(groups(offloaded_params), offload=True, **arguments)
    train(params, resident, range(4))
    for step in range(4):
        train(offloaded_params, offloaded, range(step, step + 1))
        for buffer in buffers(offloaded):  # nothing is kept there from step to step
            buffer.fill_(255)
    assert_same(resident, offloaded)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "how",
    [
        {"stochastic_rounding": True},
        {"master_weights": "8bit"},
        {"master_weights": "32bit"},
        {"clip_scope": "global", "percentile_clipping": 20},
    ],
    ids=str,
)
def test_bfloat16_weights_take_the_same_bits(how: dict[str, Any]) -> None:
    params, offloaded_params = parameters(torch.bfloat16), parameters(torch.bfloat16)
    resident = AdamW8bit(groups(params), **how)
    offloaded = AdamW8bit(groups(offloaded_params), offload=True, **how)
    train(params, resident, range(8))
    train(offloaded_params, offloaded, range(8))
    assert_same(resident, offloaded)


@pytest.mark.usefixtures("small")
def test_large_tensors_travel_in_groups_through_buffers_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    carried: list[tuple[int | None, list[tuple[int, ...]]]] = []
    carry = offload.Conveyor.carry

    def recorded(self: Any, piece: offload.Piece, job: Job) -> None:
        carried.append((piece.slot, [tuple(param.shape) for param in piece.batch.params]))
        start, end = (buffers(optimizer)[piece.slot or 0].data_ptr() + at for at in (0, 100_000))
        for state in piece.batch.states if piece.slot is not None else ():
            assert all(start <= state[key].data_ptr() < end for key in ("codes1", "codes2", "scale1", "scale2"))
        carry(self, piece, job)

    monkeypatch.setattr(offload.Conveyor, "carry", recorded)
    params = parameters()
    optimizer = AdamW8bit(params, offload=True)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert carried == [
        (0, [(64, 256)]),
        (1, [(33, 130)]),
        (2, [(80, 200)]),
        (0, [(30, 257), (64, 128)]),
        (1, [(40, 300)]),
        (None, [(5, 7, 11), (100,), (), (0, 3)]),
    ]
    assert len({buffer.numel() for buffer in buffers(optimizer)}) == 1
    carried.clear()
    for i in (0, 1, 6, 9):
        params[i].grad = None
    optimizer.step()
    assert [slot for slot, _ in carried] == [0, None]  # what has no gradient stays at home


@pytest.mark.usefixtures("small")
def test_buffers_grow_to_the_largest_and_smaller_ones_are_not_kept() -> None:
    params = sorted(parameters(), key=Tensor.numel)  # updated in this order
    optimizer = AdamW8bit(params, offload=True, gradient_release=True)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
            optimizer._release.update(param)
        optimizer.step()
    assert isinstance(optimizer.memory, Offload)
    present = {buffer.data_ptr() for buffer in buffers(optimizer)}
    pieces = [piece for pieces in optimizer.memory._pieces.values() for piece in pieces if piece.views]
    assert {piece.views[0].untyped_storage().data_ptr() for piece in pieces} == present
    largest = optimizer.state[params[-1]]
    assert sum(largest[key].nbytes for key in ("codes1", "codes2", "scale1", "scale2")) == buffers(optimizer)[0].nbytes


@pytest.mark.usefixtures("small")
def test_the_state_dict_is_that_of_state_on_the_device() -> None:
    params, offloaded_params, straight_params = parameters(), parameters(), parameters()
    resident, offloaded = AdamW8bit(params), AdamW8bit(offloaded_params, offload=True)
    straight = AdamW8bit(straight_params)
    train(straight_params, straight, range(6))
    train(params, resident, range(3))
    train(offloaded_params, offloaded, range(3))
    saved, offloaded_saved = copy.deepcopy(resident.state_dict()), copy.deepcopy(offloaded.state_dict())
    resident.load_state_dict(offloaded_saved)
    offloaded.load_state_dict(saved)
    assert isinstance(offloaded.memory, Offload)
    assert type(resident.memory) is Resident
    train(params, resident, range(3, 6))
    train(offloaded_params, offloaded, range(3, 6))
    assert_same(resident, straight)
    assert_same(offloaded, straight)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_offloads_too(duplicate: Callable[[Any], Any]) -> None:
    params, straight_params = parameters(), parameters()
    optimizer, straight = AdamW8bit(params, offload=True), AdamW8bit(straight_params)
    train(params, optimizer, range(2))
    copied_params, copied = duplicate((params, optimizer))
    assert isinstance(copied.memory, Offload)
    train(copied_params, copied, range(2, 4))
    train(straight_params, straight, range(4))
    assert_same(copied, straight)


@pytest.mark.usefixtures("small")
def test_state_goes_to_other_optimizers_formats() -> None:
    params, resident_params = parameters()[:2], parameters()[:2]
    offloaded, resident = AdamW8bit(params, offload=True), AdamW8bit(resident_params)
    train(params, offloaded, range(2))
    train(resident_params, resident, range(2))
    for number, state in to_torch(resident)["state"].items():
        for key, value in state.items():
            assert torch.equal(to_torch(offloaded)["state"][number][key], value)
    assert to_bitsandbytes(offloaded)["state"].keys() == to_bitsandbytes(resident)["state"].keys()
    again = AdamW8bit(params, offload=True)
    again.load_state_dict(from_bitsandbytes(to_bitsandbytes(offloaded), again))
    train(params, again, range(2, 3))


PAGED = {  # bitsandbytes.optim has these and no others
    name: base
    for base in ("Adam", "AdamW", "Lion", "AdEMAMix")
    for name in (f"Paged{base}", f"Paged{base}8bit", f"Paged{base}32bit")
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", PAGED)
def test_paged_classes_are_those_of_their_name_with_offload(name: str) -> None:
    cls, base = getattr(optim, name), getattr(optim, name.removeprefix("Paged"))
    params, base_params = parameters(), parameters()
    paged, unpaged = cls(params, weight_decay=0.1), base(base_params, weight_decay=0.1)
    assert isinstance(paged.memory, Offload)
    assert isinstance(paged, base)
    train(params, paged, range(3))
    train(base_params, unpaged, range(3))
    assert ("codes1" in paged.state[params[0]]) == name.endswith("8bit")
    assert_same(paged, unpaged)
    assert type(cls(params, offload=False).memory) is Resident


def test_paged_names_are_those_of_bitsandbytes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    theirs = {name for name in vars(bitsandbytes.optim) if name.startswith("Paged")}
    assert theirs == set(PAGED) == {name for name in optim.__all__ if name.startswith("Paged")}


def test_muon_cannot_offload() -> None:
    with pytest.raises(ValueError, match="Muon updates tensors together"):
        optim.Muon([Parameter(torch.zeros(64, 64))], offload=True)


def test_on_a_cpu_it_says_that_nothing_is_gained(caplog: pytest.LogCaptureFixture) -> None:
    params = [Parameter(torch.randn(400, 256))]
    optimizer = AdamW8bit(params, offload=True)
    with caplog.at_level(logging.INFO, "lq_plugin"):
        train(params, optimizer, range(1, 3))
    assert [record.getMessage() for record in caplog.records if "offload" in record.getMessage()] == [
        "offload: the parameters are in the CPU's memory, and so is their state; it is not pinned"
    ]


def test_bitsandbytes_rule_says_which_tensors_travel() -> None:
    assert offload.OFFLOAD_FROM == 100_000
    params = [Parameter(torch.randn(shape)) for shape in ((100, 1000), (99, 1010))]
    optimizer = AdamW8bit(params, offload=True)
    train(params, optimizer, range(1, 2))
    assert len(buffers(optimizer)) == BUFFERS
    batch = optimizer._plan.batches[0].batch
    assert [[batch.params[i].shape[0] for i in places] for places in offload._cut(batch)] == [[100], [99]]


def test_states_that_were_moved_come_home(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [Parameter(torch.randn(400, 256))]
    optimizer = AdamW8bit(params, offload=True)
    train(params, optimizer, range(1, 3))
    expected = {key: value.clone() for key, value in optimizer.state[params[0]].items()}
    optimizer.state[params[0]] = {key: value.to("meta") for key, value in expected.items()}
    asked: list[str] = []

    def at_home(param: Tensor, key: str, value: Tensor) -> Tensor:
        asked.append(key)
        assert value.is_meta
        return expected[key]

    monkeypatch.setattr(optimizer.memory, "at_home", at_home)
    optimizer.bring_state_home()
    assert asked == list(expected)
    assert all(optimizer.state[params[0]][key] is value for key, value in expected.items())


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 32))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss: Tensor = self.net(batch).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(tmp_path: Path, options: Options, epochs: int, resume_from: Path | None = None) -> tuple[Tiny, Path]:
    plugin = QuantPlugin(linear=None, optimizer=options, percentile_clipping=5)
    arguments: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    arguments |= {"enable_checkpointing": False, "accelerator": "cpu", "max_epochs": epochs, "plugins": [plugin]}
    trainer, model = Trainer(default_root_dir=tmp_path, **arguments), Tiny()
    data: DataLoader[Any] = DataLoader(torch.randn(64, 32, generator=torch.Generator().manual_seed(1)), batch_size=16)
    trainer.fit(model, data, ckpt_path=resume_from)
    path = tmp_path / f"{options.offload}{epochs}.ckpt"
    trainer.save_checkpoint(path)
    return model, path


@pytest.mark.usefixtures("small")
def test_lightning_brings_states_home_before_the_first_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    bring_home, training_step = LowBitOptimizer.bring_state_home, Tiny.training_step
    monkeypatch.setattr(LowBitOptimizer, "bring_state_home", lambda self: (events.append("home"), bring_home(self)))
    monkeypatch.setattr(
        Tiny, "training_step", lambda self, *batch: (events.append("step"), training_step(self, *batch))[1]
    )
    fit(tmp_path, Options(offload=True), 2)
    assert events == ["home", *["step"] * 8]


@pytest.mark.usefixtures("small")
def test_lightning_resumes_with_or_without_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    straight, _ = fit(tmp_path, Options(), 4)
    _, path = fit(tmp_path, Options(offload=True), 2)
    assert "large states in the CPU's memory" in capsys.readouterr().out
    for options in (Options(), Options(offload=True)):
        resumed, _ = fit(tmp_path, options, 4, path)
        for param, expected in zip(resumed.parameters(), straight.parameters(), strict=True):
            assert torch.equal(param, expected)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    """Conveyors as on a GPU, where copies and updates happen when `run` comes to them."""
    fake = Streams()
    monkeypatch.setattr(offload.Piece, "fetch", fake.late(offload.Piece.fetch))
    monkeypatch.setattr(offload.Piece, "put_back", fake.late(offload.Piece.put_back))
    step = fake.late(offload.optimizer_step)
    monkeypatch.setattr(offload, "optimizer_step", lambda jobs: step(list(map(without_owning, jobs))))
    monkeypatch.setattr(torch.cuda, "Stream", fake.new)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", fake.enter)
    monkeypatch.setattr(torch.cuda, "current_stream", fake.current)
    monkeypatch.setattr(offload, "_conveyor", offload.CudaConveyor)
    return fake


def without_owning(job: Job) -> Job:
    """What a kernel knows of gradients is where they are."""
    return replace(job, grads=[None if grad is None else grad.detach() for grad in job.grads])


def gradient(caller: Stream, values: Tensor) -> Tensor:
    """`values`, once the caller's stream has computed them; when nobody holds them it writes over their memory."""
    memory = torch.full_like(values, torch.nan)
    caller.does(lambda: memory.copy_(values))
    grad = memory.detach()
    weakref.finalize(grad, lambda: caller.does(lambda: memory.fill_(torch.nan)))
    return grad


# The stream that goes on, of n: always the caller's, always the last that can, or any.
CHOICES: dict[str, Callable[[int], int]] = {
    "first": lambda n: 0 if torch.rand(()) < 0.9 else int(torch.randint(n, ())),
    "last": lambda n: n - 1 if torch.rand(()) < 0.9 else int(torch.randint(n, ())),
    "any": lambda n: int(torch.randint(n, ())),
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("release", [False, True])
def test_no_order_of_the_streams_changes_the_numbers(streams: Streams, release: bool, choice: str) -> None:
    params, straight_params = parameters(), parameters()
    optimizer = AdamW8bit(groups(params), offload=True, gradient_release=release)
    straight = AdamW8bit(groups(straight_params))
    seen: list[list[Tensor]] = []
    caller = streams.all[0]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = gradient(caller, torch.randn(param.shape, generator=generator) * 0.01)
            if release:
                optimizer._release.update(param)
        optimizer.step()
        optimizer.zero_grad()
        caller.does(lambda: seen.append([param.detach().clone() for param in params]))
    with torch.no_grad():
        streams.run(CHOICES[choice])
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for expected in straight_params:
            expected.grad = torch.randn(expected.shape, generator=generator) * 0.01
        straight.step()
        with torch.no_grad():
            streams.run(CHOICES["first"])
        for weight, expected in zip(seen[step], straight_params, strict=True):
            assert torch.equal(weight, expected)
    for param, expected in zip(params, straight_params, strict=True):
        for key, value in straight.state[expected].items():
            assert torch.equal(optimizer.state[param][key], value)


@pytest.mark.gpu
@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("state", ["8bit", "32bit"])
def test_on_a_gpu_the_numbers_are_those_of_state_on_the_device(
    monkeypatch: pytest.MonkeyPatch, state: str, release: bool
) -> None:
    monkeypatch.setattr(offload, "GROUP_BYTES", 4 << 20)
    monkeypatch.setattr(offload, "BUFFER_BYTES", 24 << 20)  # 32-bit state of the largest stays behind the bus
    shapes = [(1024, 1024), (1024, 4096), (4096, 1024), (257, 1000), (100,)] * 4
    models = [
        [Parameter(torch.full(shape, 0.1, device="cuda", dtype=torch.bfloat16)) for shape in shapes] for _ in "ab"
    ]
    optimizers = [
        AdamW8bit(models[0], state=state, percentile_clipping=10),
        AdamW8bit(models[1], state=state, percentile_clipping=10, offload=True, gradient_release=release),
    ]
    for step in range(20):
        for params, optimizer in zip(models, optimizers, strict=True):
            generator = torch.Generator("cuda").manual_seed(step)
            losses = [(p.float() * torch.randn(p.shape, generator=generator, device="cuda")).sum() for p in params]
            torch.stack(losses).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(*optimizers)
    assert optimizers[1].state[models[1][0]]["codes1" if state == "8bit" else "state1"].is_pinned()


@pytest.mark.gpu
def test_on_a_gpu_memory_falls_by_the_states() -> None:
    held = []
    for offloads in (False, True):
        params = [Parameter(torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)) for _ in range(12)]
        optimizer = AdamW8bit(params, offload=offloads)
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
        optimizer.wait_for_state()
        held.append(torch.cuda.memory_allocated())
        del params, optimizer, param
    states, buffer = 12 * 4096 * 4096 * (2 + 8 / 256), 40 << 20
    assert held[0] - held[1] >= states - BUFFERS * buffer


@pytest.mark.gpu
def test_on_a_gpu_capture_is_refused() -> None:
    params = [Parameter(torch.randn(1024, 1024, device="cuda"))]
    optimizer = AdamW8bit(params, offload=True)
    params[0].grad = torch.randn_like(params[0])
    optimizer.step()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        params[0].grad.mul_(2)
        with pytest.raises(RuntimeError, match="cannot be captured"):
            optimizer.step()
