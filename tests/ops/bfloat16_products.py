"""Triton's interpreter multiplies the bits of bfloat16 matrices as integers; here it multiplies their values."""

from typing import Any

import numpy as np
import torch
from lq_kernels._triton import HAS_TRITON


def multiply_bfloat16() -> None:
    """Mends the interpreter; for good, since nothing wants the other."""
    if torch.cuda.is_available() or not HAS_TRITON:
        return
    from triton.runtime import interpreter

    tl = interpreter.tl
    otherwise = interpreter.InterpreterBuilder.create_dot

    def as_float32(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        values = torch.from_numpy(np.array(operand.data)).view(torch.bfloat16).float()
        return interpreter.TensorHandle(values.numpy(), tl.float32)

    def create_dot(builder: Any, a: Any, b: Any, *others: Any) -> Any:
        return otherwise(builder, as_float32(a), as_float32(b), *others)

    interpreter.InterpreterBuilder.create_dot = create_dot
