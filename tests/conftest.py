"""Without a GPU the kernels run in Triton's interpreter, which must be known before lq_kernels is imported."""

import os
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from lq_kernels._triton import HAS_TRITON

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: a GPU, or the CPU by way of Triton's interpreter."""
    pytest.importorskip("triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="session")
def _interpreter_rounds_bfloat16() -> None:
    """Triton's interpreter truncates float32 to bfloat16; GPUs round."""
    if torch.cuda.is_available() or not HAS_TRITON:
        return
    from triton.runtime import interpreter

    tl = interpreter.tl
    otherwise = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(builder: Any, source: Any, to: Any) -> Any:
        types = (source.dtype.scalar, to.scalar)
        if types == (tl.float32, tl.bfloat16):
            values = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.uint16)
        elif types == (tl.bfloat16, tl.float32):
            values = torch.from_numpy(np.array(source.data)).view(torch.bfloat16).float()
        else:
            return otherwise(builder, source, to)
        return interpreter.TensorHandle(values.numpy(), to.scalar)

    interpreter.InterpreterBuilder.cast_impl = cast_impl
