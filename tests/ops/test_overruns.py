"""No kernel touches memory beyond its tensors, not even where it throws away what it read."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded_memory import guarded, new_tensors_guarded
from lq_kernels._op import OPS
from test_parity import samples
from torch import Tensor

pytest.importorskip("triton")
# On a GPU compute-sanitizer finds what this finds in the interpreter.
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU"),
]

LARGEST = 12288  # values in a tensor: up to three tiles of most kernels


def small(name: str) -> list[tuple[Any, ...]]:
    return [
        args
        for args in samples(name).values()
        if all(arg.numel() <= LARGEST for arg in args if isinstance(arg, Tensor))
    ]


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "beginning"])
@pytest.mark.parametrize("name", sorted(OPS))
def test_kernels_stay_within_their_tensors(name: str, at_end: bool) -> None:
    launcher = OPS[name].launcher
    assert launcher is not None
    for args in small(name) if at_end else small(name)[::4]:  # few kernels run backwards
        inside = [guarded(arg, at_end) if isinstance(arg, Tensor) else arg for arg in args]
        with new_tensors_guarded():
            launcher(*inside)


def test_guarded_tensors_are_copies_with_their_strides() -> None:
    for at_end in (True, False):
        for tensor in (
            torch.randn(3, 7),
            torch.randn(7, 5).t(),
            torch.randn(20, 20)[3:9:2, ::3],
            torch.randn(1, 1).expand(4, 5),
            torch.arange(5000, dtype=torch.uint8),
            torch.tensor(1.0),
            torch.zeros(0, 3),
        ):
            copy = guarded(tensor, at_end)
            assert torch.equal(copy, tensor)
            assert copy.stride() == tensor.stride()


READS = """
import ctypes, torch
from guarded_memory import guarded, new_tensors_guarded
with new_tensors_guarded():
    made = torch.zeros(9).new_empty(3, dtype=torch.int8)
ctypes.string_at({0}, 1)
"""


@pytest.mark.parametrize(
    "address",
    ["guarded(torch.zeros(3)).data_ptr() + 12", "guarded(torch.zeros(3), False).data_ptr() - 1", "made.data_ptr() + 3"],
)
def test_the_first_byte_beyond_ends_the_process(address: str) -> None:
    command = [sys.executable, "-c", READS.format(address)]
    child = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert child.returncode == -signal.SIGSEGV, child.stderr
