"""One launch over many tensors: a table of addresses and a list of (tensor, block) pairs in device memory.

A program reads its pair from the work list, the addresses of that tensor from the table, and works on a few blocks.
Both are built once; only the table is written again, and only when an address has changed. Under CUDA graph capture
the table is filled from pinned memory that stays alive with the graph, so that a replay finds what was captured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lq_kernels._triton import tl, triton
from lq_kernels.blockwise import BLOCK_SIZE

# Columns of the table: addresses, then sizes in elements. An address of 0 means that the tensor is absent.
COLUMNS = 11
_PARAM, _GRAD, _STATE1, _STATE2, _SCALE1, _SCALE2, _STEP, _HISTORY, _COUNTS, _NUMEL, _ROW_LENGTH = range(COLUMNS)

# The same for kernels, which read nothing but constexpr globals.
TABLE_COLUMNS = tl.constexpr(COLUMNS)
PARAM = tl.constexpr(_PARAM)
GRAD = tl.constexpr(_GRAD)
STATE1 = tl.constexpr(_STATE1)
STATE2 = tl.constexpr(_STATE2)
SCALE1 = tl.constexpr(_SCALE1)
SCALE2 = tl.constexpr(_SCALE2)
STEP = tl.constexpr(_STEP)
HISTORY = tl.constexpr(_HISTORY)
COUNTS = tl.constexpr(_COUNTS)
NUMEL = tl.constexpr(_NUMEL)
ROW_LENGTH = tl.constexpr(_ROW_LENGTH)

_STATE_KEYS = {
    _STATE1: ("codes1", "state1"),
    _STATE2: ("codes2", "state2"),
    _SCALE1: ("scale1",),
    _SCALE2: ("scale2",),
    _STEP: ("step",),
    _HISTORY: ("gnorm_history",),
    _COUNTS: ("gnorm_counts",),
}

_VECTOR_BYTES = 16  # the widest load
_EMPTY = 16  # the address of a gradient that is there but has no values; it is never read

State = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How a kernel finds a tensor's values: tensors of one layout share an update launch."""

    eight_bit: bool  # codes and scales, or float32
    flat: bool  # rows are whole blocks: block b begins at value 256 b


@dataclass(eq=False)
class Batch:
    """Tensors of one device, parameter type and gradient type that are updated together, with their states.

    A state is the optimizer's own dict for that parameter: "step" (0-d float32), "codes1", "scale1", "codes2",
    "scale2" or "state1", "state2", and with clipping "gnorm_history" and "gnorm_counts".
    """

    params: Sequence[Tensor]
    states: Sequence[State]
    grad_type: torch.dtype
    device: torch.device = field(init=False)
    _launch_data: "LaunchData | None" = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.device = self.params[0].device

    def launch_data(self) -> "LaunchData":
        """What the kernels read from device memory; made on first use."""
        if self._launch_data is None:
            self._launch_data = LaunchData(self)
        return self._launch_data

    @property
    def captured(self) -> bool:
        """True when a CUDA graph refers to this batch's device memory."""
        return self._launch_data is not None and self._launch_data.table.captured


class LaunchData:
    """The table, the work lists by layout, and scratch memory of a batch."""

    def __init__(self, batch: Batch) -> None:
        device = batch.device
        _refuse_capture(device)
        self.table = AddressTable(_rows(batch), device)
        self.work = {layout: to_device(pairs, device) for layout, pairs in _work_by_layout(batch).items()}
        self.facts = torch.empty(len(batch.params), 4, device=device)
        self.chunked: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._numels = [param.numel() for param in batch.params]
        self._device = device

    def chunks(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Work list over chunks of `size` values, the first chunk of each tensor, one float32 per chunk."""
        if size not in self.chunked:
            _refuse_capture(self._device)
            counts = [-(-numel // size) for numel in self._numels]
            first = torch.tensor([0, *counts]).cumsum(0).int()
            work = work_list(counts, 1)
            partials = torch.empty(len(work), device=self._device)
            self.chunked[size] = to_device(work, self._device), to_device(first, self._device), partials
        return self.chunked[size]


class AddressTable:
    """(tensors, COLUMNS) int64 in device memory; `refresh` writes it again when an address has changed."""

    def __init__(self, rows: Tensor, device: torch.device) -> None:
        self._rows = rows
        self._addresses: tuple[list[int], list[int]] | None = None
        self._table = torch.empty_like(rows, device=device)
        self._spare: Tensor | None = None
        self._kept: list[tuple[Tensor, Tensor]] = []
        self.aligned = False  # every address is a multiple of 16 bytes

    @property
    def captured(self) -> bool:
        return bool(self._kept)

    def refresh(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Tensor:
        """The table with the present addresses of `params` and `grads`, on the device."""
        addresses = [p.data_ptr() for p in params], [0 if g is None else g.data_ptr() or _EMPTY for g in grads]
        changed = addresses != self._addresses
        if changed:
            self._addresses = addresses
            self._rows[:, _PARAM] = torch.tensor(addresses[0])
            self._rows[:, _GRAD] = torch.tensor(addresses[1])
            self.aligned = not bool((self._rows[:, : _SCALE2 + 1] % _VECTOR_BYTES).any())
        if _capturing(self._table.device):
            self._addresses = None
            return self._captured()
        if changed:
            self._upload()
        return self._table

    def _upload(self) -> None:
        if not self._table.is_cuda:
            self._table.copy_(self._rows)
            return
        if self._spare is None:
            self._spare = torch.empty_like(self._rows, pin_memory=True)
        # PyTorch's pinned allocator hands this memory out again only after the copy has run.
        self._table.copy_(self._rows.pin_memory(), non_blocking=True)

    def _captured(self) -> Tensor:
        if self._spare is None:
            raise RuntimeError(_NEEDS_STEP)
        host, self._spare = self._spare.copy_(self._rows), None
        table = torch.empty_like(self._table)
        table.copy_(host, non_blocking=True)
        self._kept.append((host, table))
        return table


_NEEDS_STEP = "an optimizer takes one step outside of CUDA graph capture before each capture, with the same tensors"


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _refuse_capture(device: torch.device) -> None:
    """What is copied to the device while capturing would be copied again, from freed memory, at every replay."""
    if _capturing(device):
        raise RuntimeError(_NEEDS_STEP)


def work_list(blocks: Sequence[int], per_program: int) -> Tensor:
    """(programs, 2) int32: the tensor of each program and its first block; tensor i has `blocks[i]` of them."""
    counts = torch.tensor([-(-count // per_program) for count in blocks], dtype=torch.int64)
    tensor = torch.repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    program = torch.arange(len(tensor)) - first[tensor]
    return torch.stack([tensor, program * per_program], dim=1).int()


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` that does not wait for it."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def blocks_per_program(layout: Layout) -> int:
    """Blocks of 256 in one program's tile; short rows leave lanes idle, so ragged tiles are the same size."""
    return 8 if layout.flat else 4


def _row_length(param: Tensor, state: State) -> int:
    """Values from one row to the next; float32 state has no rows."""
    rows = param.shape[0] if "codes1" in state else 1
    return param.numel() // max(rows, 1)


def _rows(batch: Batch) -> Tensor:
    rows = torch.zeros(len(batch.params), COLUMNS, dtype=torch.int64)
    for row, param, state in zip(rows, batch.params, batch.states, strict=True):
        for column, keys in _STATE_KEYS.items():
            row[column] = next((state[key].data_ptr() for key in keys if key in state), 0)
        row[_NUMEL] = param.numel()
        row[_ROW_LENGTH] = _row_length(param, state)
    return rows


def _work_by_layout(batch: Batch) -> dict[Layout, Tensor]:
    lengths = [_row_length(param, state) for param, state in zip(batch.params, batch.states, strict=True)]
    layouts = [
        Layout("codes1" in state, length % BLOCK_SIZE == 0) for state, length in zip(batch.states, lengths, strict=True)
    ]
    blocks = [
        param.numel() // max(length, 1) * math.ceil(length / BLOCK_SIZE)
        for param, length in zip(batch.params, lengths, strict=True)
    ]
    return {
        layout: work_list([n if own == layout else 0 for n, own in zip(blocks, layouts, strict=True)], per_program)
        for layout in dict.fromkeys(layouts)
        if (per_program := blocks_per_program(layout))
    }


@triton.jit
def address(table_ptr, tensor, COLUMN: tl.constexpr):
    """The int64 in a column of the table."""
    return tl.load(table_ptr + tensor.to(tl.int64) * TABLE_COLUMNS + COLUMN)


@triton.jit
def pointer(table_ptr, tensor, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer in a column; ALIGNED promises a multiple of 16 bytes, which makes loads 16 bytes wide."""
    result = address(table_ptr, tensor, COLUMN).to(tl.pointer_type(TYPE))
    if ALIGNED:  # a hint on what a function returned would be lost: it goes on the pointer
        result = tl.multiple_of(result, 16)
    return result
