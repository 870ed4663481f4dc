"""ClipMonitor: how often and how strongly percentile clipping acts, and how many gradients were not finite."""

from lightning.pytorch import LightningModule, Trainer

from lq_plugin.callbacks.step_monitor import StepMonitor
from lq_plugin.optim.base import LowBitOptimizer


class ClipMonitor(StepMonitor):
    """Logs clip/share_clipped, of the gradients so far; clip/factor, by which the last gradients were multiplied, the
    mean over tensors; and clip/skipped_nonfinite, the gradients whose tensors were left alone because their norm was
    NaN or infinite. The first of those is a warning with the names of the tensors.
    """

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        figures: dict[str, float] = {}
        for number, optimizer in enumerate(o for o in trainer.optimizers if isinstance(o, LowBitOptimizer)):
            suffix = f"/optimizer_{number}" if number else ""
            figures |= {f"{name}{suffix}": value for name, value in optimizer.read_clip_statistics().items()}
        return figures
