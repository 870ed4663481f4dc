"""Triton, or stand-ins that let every module import where Triton does not exist (macOS, Windows)."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Absent:
        """Answers every attribute with itself and leaves what it decorates as it is."""

        def __getattr__(self, name: str) -> "_Absent":
            if name.startswith("__"):
                raise AttributeError(name)
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self

    triton = tl = _Absent()
    HAS_TRITON = False
else:
    HAS_TRITON = True

__all__ = ["HAS_TRITON", "DeviceLimits", "device_limits", "tl", "triton"]


@dataclass(frozen=True)
class DeviceLimits:
    """What a launcher chooses tiles by; shared memory in bytes per program."""

    shared_memory: int
    multiprocessors: int


def device_limits(device: torch.device) -> DeviceLimits:
    """Of a GPU; of the interpreter (a CPU): tiles as small as they come."""
    if device.type == "cpu":
        return DeviceLimits(shared_memory=0, multiprocessors=1)
    return _gpu_limits(triton.runtime.driver.active, device.index or 0)


@cache
def _gpu_limits(driver: Any, index: int) -> DeviceLimits:
    properties = driver.utils.get_device_properties(index)
    return DeviceLimits(properties["max_shared_mem"], properties["multiprocessor_count"])
