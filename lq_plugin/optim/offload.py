"""Optimizer state in the CPU's memory between steps: it passes through the device a few parameters at a time.

Three buffers on the device take turns. While one group of parameters is updated, the states of the next come in and
those of the one before go out, each on a stream of its own; nothing on the host waits. Moments and master weights of
tensors from OFFLOAD_FROM elements on travel; steps and the norms of clipping stay on the device. A tensor whose state
is larger than BUFFER_BYTES does not travel: its kernel reads and writes the pinned memory over the bus. So do all
tensors when one norm is taken over them (clip_scope="global"), since no update can begin before that norm is known.

Parameters, states and state_dict are those of state on the device. There is one set of launches for each group, where
state on the device has one for all. On a CPU the same happens in the order of the calls, in memory that is not pinned.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from lq_kernels.multi_tensor import State, capturing
from lq_kernels.optimizer_batch import Batch
from lq_kernels.optimizer_step import Job, optimizer_step
from torch import Tensor

logger = logging.getLogger("lq_plugin")

OFFLOAD_FROM = 100_000  # elements; bitsandbytes pages the state of tensors from this size on
BUFFERS = 3  # one is filled, one updated and one emptied at the same time
BUFFER_BYTES = 128 << 20  # holds the 8-bit state of AdamW for 14336 x 4096, the largest matrix inside Llama 8B
GROUP_BYTES = 32 << 20  # small tensors travel together up to this: about 0.6 ms of PCIe 5

_STAY = ("step", "gnorm_history", "gnorm_counts")
_ALIGNMENT = 256


class Resident:
    """State on the device of its parameter."""

    def at_home(self, param: Tensor, key: str, value: Tensor) -> Tensor:
        """`value`, one of the states of `param`, where it is kept between steps; itself if it is there."""
        return value.to(param.device)

    def step(self, jobs: Sequence[Job]) -> None:
        optimizer_step(jobs)

    def join(self) -> None:
        """What follows on the current stream sees the updated parameters."""

    def wait(self) -> None:
        """Returns when the states may be read on the host."""


class Offload(Resident):
    """State in pinned memory of the CPU; in its ordinary memory for parameters that are on the CPU themselves."""

    def __init__(self) -> None:
        self._conveyors: dict[torch.device, Conveyor] = {}
        self._pieces: WeakKeyDictionary[Batch, list[Piece]] = WeakKeyDictionary()

    def at_home(self, param: Tensor, key: str, value: Tensor) -> Tensor:
        if key in _STAY or param.numel() < OFFLOAD_FROM:
            return value.to(param.device)
        value = value.to("cpu")
        return value.pin_memory() if param.is_cuda and not value.is_pinned() else value

    def step(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if capturing(job.batch.device):
                raise RuntimeError(
                    "a step that streams its state from the CPU's memory cannot be captured in a CUDA graph: "
                    "leave out offload (and the Paged classes), or step outside of the capture"
                )
        if any(job.clipping.is_global for job in jobs):
            optimizer_step(jobs)
            return
        for job in jobs:
            for piece in self._pieces_of(job.batch):
                own = piece.job(job)
                if any(grad is not None for grad in own.grads):
                    self._conveyors[job.batch.device].carry(piece, own)

    def join(self) -> None:
        for conveyor in self._conveyors.values():
            conveyor.join()

    def wait(self) -> None:
        for device in self._conveyors:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def _pieces_of(self, batch: Batch) -> "list[Piece]":
        if batch not in self._pieces:
            if batch.device not in self._conveyors:
                self._conveyors[batch.device] = _conveyor(batch.device)
            conveyor, cut = self._conveyors[batch.device], list(_cut(batch))
            if conveyor.grow(max(sum(_bytes(batch.states[i]) for i in members) for members in cut[:-1] or [[]])):
                self._pieces.clear()  # their views are of the buffers that were
            self._pieces[batch] = [conveyor.piece(batch, members) for members in cut[:-1]]
            if cut[-1]:
                self._pieces[batch].append(Piece.of(batch, cut[-1]))
        return self._pieces[batch]


@dataclass(frozen=True, eq=False)
class Piece:
    """Some tensors of a batch, updated together; `views` of the buffer number `slot` stand in for the states `home`."""

    batch: Batch
    members: list[int]
    groups: list[int]
    home: list[Tensor] = field(default_factory=list)
    views: list[Tensor] = field(default_factory=list)
    slot: int | None = None

    @classmethod
    def of(cls, batch: Batch, members: list[int], memory: Tensor | None = None, slot: int | None = None) -> "Piece":
        """Of the tensors at these places in `batch`; without `memory` nothing travels."""
        groups = sorted({batch.groups[i] for i in members})
        home: list[Tensor] = []
        views: list[Tensor] = []
        states: list[State] = []
        offset = 0
        for i in members:
            states.append(dict(batch.states[i]))
            for key, value in batch.states[i].items() if memory is not None else ():
                if key not in _STAY:
                    assert memory is not None
                    view = memory[offset : offset + value.nbytes].view(value.dtype).view(value.shape)
                    offset += _padded(value)
                    states[-1][key] = view
                    home.append(value)
                    views.append(view)
        own = Batch(
            [batch.params[i] for i in members],
            states,
            batch.grad_type,
            [groups.index(batch.groups[i]) for i in members],
            [batch.numbers[i] for i in members],
        )
        return cls(own, members, groups, home, views, slot)

    def job(self, whole: Job) -> Job:
        """The part of a job of the whole batch that is this piece's."""
        return Job(
            self.batch,
            [whole.grads[i] for i in self.members],
            [whole.rules[group] for group in self.groups],
            whole.clipping,
            None if whole.seeds is None else [whole.seeds[group] for group in self.groups],
        )

    def fetch(self) -> None:
        for view, home in zip(self.views, self.home, strict=True):
            view.copy_(home, non_blocking=True)

    def put_back(self) -> None:
        for view, home in zip(self.views, self.home, strict=True):
            home.copy_(view, non_blocking=True)


class Conveyor:
    """The buffers of a device; on a CPU everything happens in the order of the calls."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: list[Tensor] = []
        self._pieces = 0
        if device.type == "cpu":
            logger.info("offload: the parameters are in the CPU's memory, and so is their state; it is not pinned")

    def grow(self, bytes_needed: int) -> bool:
        """Makes each buffer as large as that; True when they are others than before."""
        if self._buffers and bytes_needed <= self._buffers[0].numel():
            return False
        self._buffers = []
        self._buffers = [torch.empty(bytes_needed, dtype=torch.uint8, device=self.device) for _ in range(BUFFERS)]
        return True

    def piece(self, batch: Batch, members: list[int]) -> Piece:
        """A piece that travels; the buffers are taken in turn."""
        slot = self._pieces % BUFFERS
        self._pieces += 1
        return Piece.of(batch, members, self._buffers[slot], slot)

    def carry(self, piece: Piece, job: Job) -> None:
        piece.fetch()
        optimizer_step([job])
        piece.put_back()

    def join(self) -> None:
        """See `Resident.join`."""


class _Turn:
    """Where a buffer is; `job` keeps the gradients until what follows on the current stream may overwrite them."""

    def __init__(self) -> None:
        self.filled, self.updated, self.emptied = (torch.cuda.Event() for _ in range(3))
        self.job: Job | None = None


class CudaConveyor(Conveyor):
    """States come in, are updated and go out on three streams; events say when a buffer may be used next."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._incoming, self._updating, self._outgoing = (torch.cuda.Stream(device) for _ in range(3))
        self._turns = [_Turn() for _ in range(BUFFERS)]

    def grow(self, bytes_needed: int) -> bool:
        self.join()
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._outgoing)  # the memory of the old buffers belongs to the current stream
        grown = super().grow(bytes_needed)
        self._incoming.wait_stream(current)
        return grown

    def carry(self, piece: Piece, job: Job) -> None:
        """Nothing on the current stream waits for this update, but for that of the piece BUFFERS before: no more
        gradients than buffers are kept.
        """
        if piece.slot is None:
            optimizer_step([job])
            return
        turn, current = self._turns[piece.slot], torch.cuda.current_stream(self.device)
        current.wait_event(turn.updated)
        turn.job = job
        self._incoming.wait_event(turn.emptied)
        with torch.cuda.stream(self._incoming):
            piece.fetch()
            turn.filled.record()
        self._updating.wait_event(turn.filled)
        self._updating.wait_stream(current)
        with torch.cuda.stream(self._updating):
            optimizer_step([job])
            turn.updated.record()
        self._outgoing.wait_event(turn.updated)
        with torch.cuda.stream(self._outgoing):
            piece.put_back()
            turn.emptied.record()

    def join(self) -> None:
        current = torch.cuda.current_stream(self.device)
        for turn in self._turns:
            current.wait_event(turn.updated)
            turn.job = None


def _conveyor(device: torch.device) -> Conveyor:
    return CudaConveyor(device) if device.type == "cuda" else Conveyor(device)


def _padded(value: Tensor) -> int:
    return -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT


def _bytes(state: State) -> int:
    return sum(_padded(value) for key, value in state.items() if key not in _STAY)


def _cut(batch: Batch) -> Iterator[list[int]]:
    """The places in `batch` that travel, some at a time; at last, perhaps empty, those that do not."""
    stay: list[int] = []
    together: list[int] = []
    filled = 0
    for i, (param, state) in enumerate(zip(batch.params, batch.states, strict=True)):
        size = _bytes(state)
        if param.numel() < OFFLOAD_FROM or not 0 < size <= BUFFER_BYTES:
            stay.append(i)
            continue
        if together and filled + size > GROUP_BYTES:
            yield together
            together, filled = [], 0
        together.append(i)
        filled += size
    if together:
        yield together
    yield stay
