"""Tensors whose memory ends, or begins, at a page that cannot be touched: a kernel that goes past it crashes at once.

Of a load beyond a mask nothing shows where the value is not used; in Triton's interpreter, which reads real memory, it
shows here. The crash ends the process: what pytest, or a worker of it, says last is the test that was running.
"""

import ctypes
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

_NO_ACCESS = 0  # PROT_NONE


def guarded(values: Tensor, at_end: bool = True) -> Tensor:
    """A copy on the CPU with the same strides; behind its last element, or before its first, memory is forbidden."""
    if values.numel() == 0:
        return values
    span = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, values.stride(), strict=True))
    size = span * values.element_size()
    used = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, used + 2 * mmap.PAGESIZE)
    _forbid(memory, 0)
    _forbid(memory, mmap.PAGESIZE + used)
    begin = mmap.PAGESIZE + (used - size if at_end else 0)
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=begin).view(values.dtype)
    flat.copy_(values.as_strided((span,), (1,), values.storage_offset()))  # what lies between the elements too
    return flat.as_strided(values.shape, values.stride())


def _forbid(memory: mmap.mmap, offset: int) -> None:
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory, offset))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), _NO_ACCESS):
        raise OSError(ctypes.get_errno(), "mprotect")


@contextmanager
def new_tensors_guarded() -> Iterator[None]:
    """Inside, torch.empty, empty_like and Tensor.new_empty return guarded memory."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _guarding(getattr(owner, name)))
        yield


def _guarding(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        return guarded(tensor) if tensor.device.type == "cpu" else tensor

    return made
