"""The states of all random generators that training draws from, as plain values and tensors."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def capture(own_device_only: bool = False) -> dict[str, Any]:
    """Python's, NumPy's, torch's and, on a machine that has used them, every GPU's generator.

    own_device_only: of the GPUs that of the current device, for a process among several that has one each.
    """
    _, key, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [torch.from_numpy(np.asarray(key).astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device) for device in _devices(own_device_only)],
    }


def restore(states: dict[str, Any], own_device_only: bool = False) -> None:
    """Sets the generators to what `capture` returned; GPUs that are not there now are passed over."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    key, *rest = states["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    devices = [torch.cuda.current_device()] if own_device_only and states["cuda"] else range(torch.cuda.device_count())
    for device, state in zip(devices, states["cuda"], strict=False):
        torch.cuda.set_rng_state(state.cpu(), device)


def _devices(own_device_only: bool) -> Sequence[int]:
    if not torch.cuda.is_initialized():
        return ()
    return (torch.cuda.current_device(),) if own_device_only else range(torch.cuda.device_count())
