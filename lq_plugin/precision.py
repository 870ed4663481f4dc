"""The dtype of everything that is not quantised, as a Lightning precision plugin.

Lightning takes one precision plugin and refuses `precision=` beside it, so the plugin that quantises does this too.
FSDPPrecision is the one base class that every strategy accepts; on other strategies it has to autocast on the device
at hand, leave float32 alone and clip by norm, as Lightning's plugins for them do.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

import torch
from lightning.fabric.plugins.precision.fsdp import _PRECISION_INPUT
from lightning.fabric.plugins.precision.utils import _DtypeContextManager
from lightning.pytorch.plugins.precision import FSDPPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

PRECISIONS: tuple[str, ...] = get_args(_PRECISION_INPUT)

_PARAMETER_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
_SHORT_NAMES = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}  # as Trainer(precision=...) maps them


def precision_named(name: object) -> str:
    """One of PRECISIONS, from it or from the short names 32, 16 and bf16; ValueError for anything else."""
    precision = _SHORT_NAMES.get(str(name), str(name))
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision={name!r} is not known; expected one of {', '.join(PRECISIONS)}, or None to choose by device"
        )
    return precision


def default_precision(device: torch.device) -> str:
    """bf16-mixed on GPUs with bfloat16 matrix units, 16-mixed on other GPUs, 32-true elsewhere."""
    if device.type != "cuda":
        return "32-true"
    if torch.version.hip:
        has_bfloat16 = torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx94")
    else:
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16-mixed" if has_bfloat16 else "16-mixed"


class AnyStrategyPrecision(FSDPPrecision):
    """A precision that is chosen once the strategy is known: `set_precision` before the model is set up."""

    def __init__(self) -> None:
        super().__init__("32-true")
        self._device_type = "cpu"
        self._fsdp_root: FullyShardedDataParallel | None = None

    def set_precision(self, precision: str, strategy: Strategy) -> None:
        self._device_type = strategy.root_device.type
        if precision == self.precision:
            return
        self.precision = precision  # type: ignore[assignment]
        self._desired_input_dtype = _PARAMETER_DTYPES.get(precision, torch.float32)
        if precision == "16-mixed":
            fsdp = isinstance(strategy, FSDPStrategy)
            self.scaler = FSDPPrecision(precision).scaler if fsdp else torch.amp.GradScaler(self._device_type)  # type: ignore

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module if self._is_float32 else super().convert_module(module)

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        self._fsdp_root = model if isinstance(model, FullyShardedDataParallel) else None
        return model, optimizers, lr_schedulers

    def forward_context(self) -> AbstractContextManager:
        if self.precision.endswith("-mixed"):
            dtype = torch.bfloat16 if self.precision == "bf16-mixed" else torch.float16
            return torch.autocast(self._device_type, dtype=dtype, cache_enabled=False)
        return self.tensor_init_context()

    def tensor_init_context(self) -> AbstractContextManager:
        return nullcontext() if self._is_float32 else _DtypeContextManager(self._desired_input_dtype)

    def module_init_context(self) -> AbstractContextManager:
        return self.tensor_init_context()

    def convert_input(self, data: Any) -> Any:
        return data if self._is_float32 else super().convert_input(data)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        if self._fsdp_root is not None:
            self._fsdp_root.clip_grad_norm_(clip_val)
        else:
            Precision.clip_grad_by_norm(self, optimizer, clip_val)

    @property
    def _is_float32(self) -> bool:
        return self._desired_input_dtype is torch.float32
