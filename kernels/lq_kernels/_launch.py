"""A launch that repeats an earlier one without what Triton does to find out that it does.

Triton binds, specialises and looks up every argument of every launch, which takes longer than many a kernel. Here the
first launch goes through Triton; the compiled kernel that it found serves all later ones with the same numbers and
constants, and with tensors of the same dtypes and alignment.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def cdiv(a: int, b: int) -> int:
    """triton.cdiv, which takes microseconds because kernels call it too."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """triton.next_power_of_2, likewise; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


_MOST = 8192  # launches that are remembered; a training step has some hundreds

# What starts the compiled kernel, what stands for its constants, and the kernel, whose id is in the key.
_COMPILED: dict[tuple[Any, ...], tuple[Callable[..., None], tuple[None, ...], Any]] = {}


def launch(kernel: Any, programs: int, tensors: tuple[Any, ...], numbers: tuple[int, ...], **constants: Any) -> None:
    """`kernel[(programs,)](*tensors, *numbers, **constants)`; constants are constexpr parameters and Triton's options.

    The first parameters of the kernel are the tensors: a Tensor, a TensorDescriptor or None. Those after the numbers
    are constexpr. A tensor's device is the current one. Where a kernel reads and writes depends on numbers, constants
    and programs only: on AMD Triton asks too whether a tensor's memory ends within 2 GB.
    """
    key: list[Any] = [id(kernel), programs, numbers, *constants, *constants.values()]
    pointers: list[Any] = []
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            pointer = tensor.data_ptr()
            key += (tensor.dtype, pointer % 16 == 0, tensor.get_device())
            pointers.append(pointer)
        else:
            key.append(tensor and (tensor.base.dtype, tensor.base.get_device(), *tensor.block_shape))
            pointers.append(tensor)
    known = tuple(key)
    again = _COMPILED.get(known)
    if again is not None:
        start, left, _ = again
        start(*pointers, *numbers, *left)
        return
    compiled = kernel[(programs,)](*tensors, *numbers, **constants)
    if getattr(compiled, "module", None) is not None:  # the interpreter compiles nothing
        if len(_COMPILED) >= _MOST:
            _COMPILED.clear()
        left = (None,) * (len(kernel.arg_names) - len(tensors) - len(numbers))  # these values are compiled in
        _COMPILED[known] = compiled[(programs, 1, 1)], left, kernel
