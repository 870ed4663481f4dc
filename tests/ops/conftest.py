"""Triton's interpreter rounds float32 to fp8 wrongly and loses NaN on the way back; here it converts as GPUs do."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lq_kernels._triton import HAS_TRITON


@pytest.fixture(autouse=True, scope="session")
def _interpreter_converts_fp8() -> Iterator[None]:
    if torch.cuda.is_available() or not HAS_TRITON:
        yield
        return
    from triton.runtime import interpreter

    tl = interpreter.tl
    fp8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
    others = {tl.float16: torch.float16, tl.float32: torch.float32, tl.bfloat16: torch.bfloat16}
    otherwise = interpreter._convert_float

    def convert(values: Any, source: Any, to: Any, rounding: Any) -> Any:
        source, to = source.scalar, to.scalar
        if source in others and to in fp8:
            floats = torch.from_numpy(np.array(values)).view(others[source])
            largest = torch.finfo(fp8[to]).max  # GPUs saturate
            return floats.float().clamp(-largest, largest).to(fp8[to]).view(torch.uint8).numpy()
        if source in fp8 and to in others:
            floats = torch.from_numpy(np.array(values)).view(torch.uint8).view(fp8[source]).to(others[to])
            return floats.view(torch.uint32 if to == tl.float32 else torch.uint16).numpy()
        return otherwise(values, source, to, rounding)

    interpreter._convert_float = convert
    yield
    interpreter._convert_float = otherwise
