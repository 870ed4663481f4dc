"""One launch over many tensors: a table of addresses and lists of work in device memory.

A program reads its place from a work list, the addresses of that tensor from the table, and works on a few blocks.
Both are built once; only the table is written again, and only when an address has changed. Under CUDA graph capture
tables are filled from pinned memory that stays alive with the graph, so that a replay finds what was captured.
"""

import operator
from array import array
from collections.abc import Sequence
from itertools import repeat
from typing import TypeGuard

import torch
from torch import Tensor

from lq_kernels._triton import tl, triton

MAX_STATES = 3

# Columns of the table: addresses, then sizes in elements. An address of 0 means that the tensor is absent.
COLUMNS = 16
_PARAM, _GRAD, _STATE, _SCALE, _MASTER, _STEP, _HISTORY, _COUNTS = 0, 1, 2, 5, 8, 9, 10, 11
_NUMEL, _ROW_LENGTH, _NUMBER, _GROUP = 12, 13, 14, 15

# The same for kernels, which read nothing but constexpr globals. STATE + i and SCALE + i belong to state i.
TABLE_COLUMNS = tl.constexpr(COLUMNS)
PARAM = tl.constexpr(_PARAM)
GRAD = tl.constexpr(_GRAD)
STATE = tl.constexpr(_STATE)
SCALE = tl.constexpr(_SCALE)
MASTER = tl.constexpr(_MASTER)
STEP = tl.constexpr(_STEP)
HISTORY = tl.constexpr(_HISTORY)
COUNTS = tl.constexpr(_COUNTS)
NUMEL = tl.constexpr(_NUMEL)
ROW_LENGTH = tl.constexpr(_ROW_LENGTH)
NUMBER = tl.constexpr(_NUMBER)
GROUP = tl.constexpr(_GROUP)

_STATE_COLUMNS = {
    **{f"codes{i + 1}": _STATE + i for i in range(MAX_STATES)},
    **{f"state{i + 1}": _STATE + i for i in range(MAX_STATES)},
    **{f"scale{i + 1}": _SCALE + i for i in range(MAX_STATES)},
    "master": _MASTER,
    "step": _STEP,
    "gnorm_history": _HISTORY,
    "gnorm_counts": _COUNTS,
}

_SERIAL_ROWS = 1024  # torch copies 32768 elements and more in threads, which take longer to wake than to copy
_VECTOR_BYTES = 16  # the widest load
_EMPTY = 16  # the address of a gradient that is there but has no values; it is never read

State = dict[str, Tensor]

_NEEDS_STEP = "an optimizer takes one step outside of CUDA graph capture before each capture, with the same tensors"


class DeviceTable:
    """Rows that change seldom, kept on the device; a captured graph reads copies that nothing overwrites."""

    def __init__(self, rows: Tensor, device: torch.device) -> None:
        self.rows = rows
        self._table = torch.empty_like(rows, device=device)
        self._spare: Tensor | None = None
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._stale = True

    @property
    def captured(self) -> bool:
        return bool(self._kept)

    def changed(self) -> None:
        """`rows` has been written: the device gets it with the next `on_device`."""
        self._stale = True

    def on_device(self) -> Tensor:
        """The table on the device; nothing waits for it. While capturing, a table of that graph's own."""
        if capturing(self._table.device):
            self._stale = True
            return self._captured()
        if self._stale:
            self._stale = False
            self._upload()
        return self._table

    def _upload(self) -> None:
        if not self._table.is_cuda:
            self._table.copy_(self.rows)
            return
        if self._spare is None:
            self._spare = torch.empty_like(self.rows, pin_memory=True)
        # PyTorch's pinned allocator hands this memory out again only after the copy has run.
        pinned = torch.empty_like(self.rows, pin_memory=True)
        for target, rows in zip(pinned.split(_SERIAL_ROWS), self.rows.split(_SERIAL_ROWS), strict=True):
            target.copy_(rows)
        self._table.copy_(pinned, non_blocking=True)

    def _captured(self) -> Tensor:
        if self._spare is None:
            raise RuntimeError(_NEEDS_STEP)
        host, self._spare = self._spare.copy_(self.rows), None
        table = torch.empty_like(self._table)
        table.copy_(host, non_blocking=True)
        self._kept.append((host, table))
        return table


class AddressTable:
    """(tensors, COLUMNS) int64: addresses and sizes of parameters, gradients and states."""

    def __init__(self, params: Sequence[Tensor], states: Sequence[State], facts: Sequence[tuple[int, ...]]) -> None:
        """`facts` are the columns from NUMEL on."""
        rows = torch.zeros(len(params), COLUMNS, dtype=torch.int64)
        for row, state in zip(rows, states, strict=True):
            for key, value in state.items():
                if key in _STATE_COLUMNS:
                    row[_STATE_COLUMNS[key]] = value.data_ptr()
        rows[:, _NUMEL:] = torch.tensor(facts)
        self.table = DeviceTable(rows, params[0].device)
        self._addresses: list[list[int]] = [[], []]
        self._aligned = [False, False, _are_aligned(rows[:, _STATE:_STEP])]

    @property
    def aligned(self) -> bool:
        """Whether every address is a multiple of 16 bytes."""
        return all(self._aligned)

    def refresh(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Tensor:
        """The table with the present addresses of `params` and `grads`, on the device."""
        rows = self.table.rows
        for column, addresses in ((_PARAM, list(map(Tensor.data_ptr, params))), (_GRAD, _gradient_addresses(grads))):
            if addresses != self._addresses[column]:
                self._addresses[column] = addresses
                # torch.tensor takes four times as long for a list of integers
                values = torch.frombuffer(array("q", addresses), dtype=torch.int64)
                rows[:, column] = values
                self._aligned[column] = _are_aligned(values)
                self.table.changed()
        return self.table.on_device()


def all_there(tensors: Sequence[Tensor | None]) -> TypeGuard[Sequence[Tensor]]:
    """Whether none is None: without a step of Python's for each, of which a model has thousands."""
    return all(map(operator.is_not, tensors, repeat(None)))


def _are_aligned(addresses: Tensor) -> bool:
    return not bool((addresses & _VECTOR_BYTES - 1).any())


def _gradient_addresses(grads: Sequence[Tensor | None]) -> list[int]:
    if all_there(grads):
        addresses = list(map(Tensor.data_ptr, grads))
        if all(addresses):
            return addresses
    return [0 if grad is None else grad.data_ptr() or _EMPTY for grad in grads]


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device) -> None:
    """What is copied to the device while capturing would be copied again, from freed memory, at every replay."""
    if capturing(device):
        raise RuntimeError(_NEEDS_STEP)


def work_list(blocks: Sequence[int], per_program: Sequence[int] | int) -> Tensor:
    """(programs, 3) int32: tensor, first block, one past the last; tensor i has `blocks[i]` of them."""
    count = torch.tensor(blocks, dtype=torch.int64)
    share = torch.as_tensor(per_program).expand(len(blocks))
    programs = (count + share - 1) // share
    tensor = torch.repeat_interleave(programs)
    first = (torch.arange(len(tensor)) - (programs.cumsum(0) - programs)[tensor]) * share[tensor]
    return torch.stack([tensor, first, torch.minimum(first + share[tensor], count[tensor])], dim=1).int()


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` that does not wait for it."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@triton.jit
def address(table_ptr, tensor, COLUMN: tl.constexpr):
    """The int64 in a column of the table."""
    return tl.load(table_ptr + tensor.to(tl.int64) * TABLE_COLUMNS + COLUMN)


@triton.jit
def pointer(table_ptr, tensor, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer in a column; ALIGNED promises a multiple of 16 bytes, which makes loads 16 bytes wide."""
    result = tl.load(table_ptr + tensor.to(tl.int64) * TABLE_COLUMNS + COLUMN).to(tl.pointer_type(TYPE))
    if ALIGNED:  # a hint on what a function returned would be lost: it goes on the pointer
        result = tl.multiple_of(result, 16)
    return result
