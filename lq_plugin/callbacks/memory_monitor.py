"""MemoryMonitor: bytes held by weights, gradients and optimizer state, and what the process needs beyond them."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from lq_plugin.callbacks.step_monitor import StepMonitor

MEGABYTE = 1e6
PROCESS_STATUS = Path("/proc/self/status")  # Linux
KILOBYTE = 1024  # the unit of /proc and, outside of macOS, of getrusage


class MemoryMonitor(StepMonitor):
    """Logs memory in MB (10^6 bytes), of the rank that has most:

    memory/weights_mb, gradients_mb, optimizer_state_mb: tensors on the training device, each storage counted once;
    weights are parameters and buffers.
    memory/current_mb, peak_mb: CUDA: allocated by tensors now, and at most since the last measurement. CPU: resident
    memory of the process now, and at most since it started; where the system tells neither, both are left out.
    memory/rest_mb: the peak less the first three: activations and temporaries; on a CPU also Python and its libraries.
    """

    progress_bar = {"memory/peak_mb": "peak MB"}  # noqa: RUF012 (a ClassVar in the base)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        static = static_bytes(pl_module, trainer.optimizers, pl_module.device)
        used = device_bytes(pl_module.device)
        if "peak" in used:
            used["rest"] = max(0, used["peak"] - sum(static.values()))
        figures = {f"memory/{name}_mb": size / MEGABYTE for name, size in (static | used).items()}
        largest = trainer.strategy.reduce(torch.tensor([*figures.values()], device=pl_module.device), reduce_op="max")
        return dict(zip(figures, largest.tolist(), strict=True))


def static_bytes(
    module: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer], device: torch.device
) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer_state on the device; a storage counts where it comes first."""
    parameters = list(module.parameters())
    held = {
        "weights": [*parameters, *module.buffers()],
        "gradients": [p.grad for p in parameters],
        "optimizer_state": [state for optimizer in optimizers for state in optimizer.state.values()],
    }
    seen: set[int] = set()
    return {name: _storage_bytes(tensors_in(values), device, seen) for name, values in held.items()}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Plain tensors in nested lists and dicts; of a DTensor the local part, of other subclasses what they hold."""
    if isinstance(value, DTensor):
        yield from tensors_in(value.to_local())
    elif isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        yield from tensors_in([getattr(value, name) for name in value.__tensor_flatten__()[0]])
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def device_bytes(device: torch.device) -> dict[str, int]:
    """current and peak of the device's allocator, or of the process on a CPU; reading a CUDA peak starts a new one."""
    if device.type == "cuda":
        used = {"current": torch.cuda.memory_allocated(device), "peak": torch.cuda.max_memory_allocated(device)}
        torch.cuda.reset_peak_memory_stats(device)
        return used
    if PROCESS_STATUS.exists():
        fields = dict(line.split(":", 1) for line in PROCESS_STATUS.read_text().splitlines())
        names = {"current": "VmRSS", "peak": "VmHWM"}
        return {name: int(fields[field].split()[0]) * KILOBYTE for name, field in names.items()}
    if sys.platform == "win32":
        return {}
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak": peak if sys.platform == "darwin" else peak * KILOBYTE}


def _storage_bytes(tensors: Iterable[Tensor], device: torch.device, seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.device == device and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
