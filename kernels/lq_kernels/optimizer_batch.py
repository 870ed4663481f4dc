"""Tensors that are updated by one launch, and what that launch reads from device memory.

A batch holds tensors of one device, parameter type and gradient type, whatever their param groups. Those whose state
has the same format and whose rows are whole blocks, or are not, share a launch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lq_kernels._triton import tl
from lq_kernels.blockwise import BLOCK_SIZE
from lq_kernels.multi_tensor import AddressTable, DeviceTable, State, refuse_capture, to_device, work_list
from lq_kernels.optimizer_state import format_of

FACTS = 16  # float32 for each tensor, written by the prepare kernel
HYPER = 16  # float64 for each param group, written by the host

_CHUNK = 8192  # values that a program of the norm reads at a time
_MOST_CHUNKS = 8192  # partial sums in a batch, one program each, beside one for each tensor
MOST_SUMS = 1024  # partial sums of one tensor that every program of the update adds up


@dataclass(frozen=True)
class Layout:
    """How a kernel finds a tensor's values."""

    format: str
    flat: bool  # rows are whole blocks: block b begins at value 256 b
    wide: bool = False  # parameters are float32, or have float32 master weights

    @property
    def blocks(self) -> int:
        """Blocks of 256 in one program's tile.

        Measured on an H200, AdamW in the dynamic map, 4 warps: 3.5e9 bfloat16 parameters take 11.2 ms by 8 and 11.6 by
        4; 1e9 float32 ones 4.2 by 4, and 4.3 by 8 with 8 warps. Ragged tiles hold the offsets of their values too.
        """
        return 8 if self.flat and not self.wide else 4


@dataclass(eq=False)
class Batch:
    """Tensors of one device, parameter type and gradient type that are updated together, with their states.

    A state is the optimizer's own dict for that parameter: "step" (0-d float32), for each moment i from 1 "codes{i}"
    and "scale{i}" or "state{i}", with clipping "gnorm_history" and "gnorm_counts", with master weights "master".
    groups[i] is the number of the hyper-parameters of tensor i, numbers[i] its own, by which its random bits differ
    from those of others.
    """

    params: Sequence[Tensor]
    states: Sequence[State]
    grad_type: torch.dtype
    groups: Sequence[int] = ()
    numbers: Sequence[int] = ()
    device: torch.device = field(init=False)
    _launch_data: "LaunchData | None" = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.device = self.params[0].device
        self.groups = self.groups or [0] * len(self.params)
        self.numbers = self.numbers or range(len(self.params))

    @property
    def master(self) -> str:
        """How the bits that the parameters do not hold are kept: "none", "correction" (int8) or "float32"."""
        master = self.states[0].get("master")
        return "none" if master is None else "correction" if master.dtype == torch.int8 else "float32"

    def launch_data(self) -> "LaunchData":
        """What the kernels read from device memory; made on first use."""
        if self._launch_data is None:
            self._launch_data = LaunchData(self)
        return self._launch_data

    @property
    def captured(self) -> bool:
        """True when a CUDA graph refers to this batch's device memory."""
        return self._launch_data is not None and self._launch_data.addresses.table.captured


@dataclass(frozen=True)
class Sums:
    """Partial sums of the tensors of a batch: work list, the first sum of each tensor, and the sums themselves."""

    work: Tensor
    first: Tensor
    partials: Tensor


class LaunchData:
    """The tables, the work lists by layout, and scratch memory of a batch."""

    def __init__(self, batch: Batch) -> None:
        refuse_capture(batch.device)
        self._device = batch.device
        lengths = [_row_length(param, state) for param, state in zip(batch.params, batch.states, strict=True)]
        numels = [param.numel() for param in batch.params]
        facts = list(zip(numels, lengths, batch.numbers, batch.groups, strict=True))
        self.addresses = AddressTable(batch.params, batch.states, facts)
        self.hyper = DeviceTable(torch.zeros(max(batch.groups) + 1, HYPER, dtype=torch.float64), batch.device)
        self.hyper_rows: list[tuple[float, ...]] = []
        self.facts = torch.empty(len(numels), FACTS, device=batch.device)
        self._numels = numels
        wide = batch.params[0].dtype == torch.float32 or batch.master == "float32"
        self._layouts = [
            Layout(format_of(state), length % BLOCK_SIZE == 0, wide)
            for state, length in zip(batch.states, lengths, strict=True)
        ]
        self._blocks = [
            numel // max(length, 1) * -(-length // BLOCK_SIZE) for numel, length in zip(numels, lengths, strict=True)
        ]
        self.work = {layout: self._work(layout, layout.blocks) for layout in dict.fromkeys(self._layouts)}
        self._norms: Sums | None = None
        self._measures: dict[Layout, Sums] = {}

    def _work(self, layout: Layout, per_program: Sequence[int] | int) -> Tensor:
        return to_device(work_list(self._blocks_of(layout), per_program), self._device)

    def _blocks_of(self, layout: Layout) -> list[int]:
        return [count if own == layout else 0 for count, own in zip(self._blocks, self._layouts, strict=True)]

    def norms(self) -> Sums:
        """Of the squares of the gradients; work in chunks of 256 values."""
        if self._norms is None:
            chunk = max(_CHUNK, 1 << (sum(self._numels) // _MOST_CHUNKS).bit_length()) // BLOCK_SIZE
            self._norms = self._sums([-(-numel // BLOCK_SIZE) for numel in self._numels], chunk, 1)
        return self._norms

    def measures(self, layout: Layout) -> Sums:
        """Of what a rule measures of each tensor, two sums; at most MOST_SUMS for a tensor."""
        if layout not in self._measures:
            blocks = self._blocks_of(layout)
            shares = [layout.blocks * max(1, -(-count // (layout.blocks * MOST_SUMS))) for count in blocks]
            self._measures[layout] = self._sums(blocks, shares, 2)
        return self._measures[layout]

    def _sums(self, blocks: Sequence[int], per_program: Sequence[int] | int, width: int) -> Sums:
        refuse_capture(self._device)
        work = work_list(blocks, per_program)
        counts = torch.bincount(work[:, 0], minlength=len(blocks))
        first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
        partials = torch.zeros(max(len(work), 1), width, device=self._device)
        return Sums(to_device(work, self._device), to_device(first, self._device), partials)


def triton_type(dtype: torch.dtype) -> tl.dtype:
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def _row_length(param: Tensor, state: State) -> int:
    """Values from one row to the next; float32 state has no rows."""
    rows = param.shape[0] if "codes1" in state else 1
    return param.numel() // max(rows, 1)
