"""TokenThroughput: tokens per second, step time and model FLOPs utilisation, without slowing the run down."""

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lq_plugin.callbacks.memory_monitor import tensors_in
from lq_plugin.callbacks.model_flops import Utilisation, utilisation
from lq_plugin.callbacks.step_monitor import StepMonitor


def count_tokens(batch: Any) -> int:
    """Elements of `input_ids`, or of the first integer tensor of the batch."""
    if isinstance(batch, Mapping) and "input_ids" in batch:
        return batch["input_ids"].numel()
    for tensor in tensors_in(batch):
        if not tensor.is_floating_point():
            return tensor.numel()
    raise ValueError(
        f"TokenThroughput counts the elements of input_ids or of an integer tensor; this {type(batch).__name__} "
        "has neither. Pass tokens_fn, a function from a batch to its number of tokens"
    )


class TokenThroughput(StepMonitor):
    """Logs throughput/tokens_per_second and samples_per_second over all ranks, step_seconds, and mfu_bf16.

    Time runs from batch to batch, data loading included; validation, checkpoints and the first batch (compilation,
    warm-up) are left out. The device is waited for only when something is logged. A sample is a row of the batch's
    first tensor.

    mfu_bf16 is the share of the device's dense bf16 peak that the model's arithmetic takes, whatever its format. Its
    FLOPs per token are `flops_per_token`, else the LightningModule's attribute of that name, else 6 per parameter.
    """

    progress_bar = {"throughput/tokens_per_second": "tokens/s"}  # noqa: RUF012 (a ClassVar in the base)

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        tokens_fn: Callable[[Any], int] = count_tokens,
        flops_per_token: float | None = None,
    ) -> None:
        super().__init__(every_n_steps)
        self.tokens_fn = tokens_fn
        self.flops_per_token = flops_per_token
        self._utilisation: Utilisation | None = None
        self._window: _Window | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._window = None
        if self._utilisation is None:
            flops = self.flops_per_token or getattr(pl_module, "flops_per_token", None)
            self._utilisation = utilisation(pl_module, flops, pl_module.device)
            rank_zero_info(f"TokenThroughput: {self._utilisation.note}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._window is not None:
            self._window.resume()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._window is not None:
            self._window.tokens += self.tokens_fn(batch)
            self._window.samples += next(tensors_in(batch)).shape[0]
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._window is None:
            self._window = _Window(pl_module.device, trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._pause()

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        window = self._window
        if window is None:
            return {}
        window.pause()
        self._window = _Window(pl_module.device, trainer.global_step)
        counts = torch.tensor([window.tokens, window.samples], device=pl_module.device, dtype=torch.float32)
        tokens, samples = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        metrics = {
            "throughput/tokens_per_second": tokens / window.seconds,
            "throughput/samples_per_second": samples / window.seconds,
            "throughput/step_seconds": window.seconds / (trainer.global_step - window.first_step),
        }
        assert self._utilisation is not None, "on_train_start sets it"
        mfu = self._utilisation.share(tokens / window.seconds / trainer.world_size)
        return metrics if mfu is None else metrics | {"throughput/mfu_bf16": mfu}

    def _pause(self) -> None:
        if self._window is not None:
            self._window.pause()


class _Window:
    """Tokens, samples and seconds of training since step `first_step`; its clock runs from the start."""

    def __init__(self, device: torch.device, first_step: int) -> None:
        self.device = device
        self.first_step = first_step
        self.tokens = self.samples = 0
        self.seconds = 0.0
        self._since: float | None = None
        self.resume()

    def resume(self) -> None:
        if self._since is None:
            self._wait_for_device()
            self._since = perf_counter()

    def pause(self) -> None:
        if self._since is not None:
            self._wait_for_device()
            self.seconds += perf_counter() - self._since
            self._since = None

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
