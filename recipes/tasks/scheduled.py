"""What all language tasks train with: an optimizer of what is trained, a cosine schedule, and a last validation."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

FINAL_LR_SHARE = 0.05  # the learning rate ends here: nothing is gained at exactly zero

MakeOptimizer = Callable[[list[dict]], Optimizer]


class ScheduledModule(LightningModule):
    """optimizer: makes an optimizer from parameter groups. Matrices decay, vectors do not, frozen weights are left out.

    The learning rate rises for `warmup_steps` and then falls along a cosine until the Trainer's max_steps.
    """

    def __init__(self, warmup_steps: int = 0, optimizer: MakeOptimizer = AdamW) -> None:
        super().__init__()
        self.warmup_steps = warmup_steps
        self.optimizer = optimizer

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Has the last step validated, wherever it falls: Lightning validates when it is told to stop."""
        if self.trainer.global_step >= self.trainer.max_steps > 0:
            self.trainer.should_stop = True

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        steps = int(self.trainer.estimated_stepping_batches)
        if steps < 1:
            raise ValueError(f"the cosine schedule ends at trainer.max_steps, which must be positive; it is {steps}")
        optimizer = self.optimizer(self.parameter_groups())
        schedule = LambdaLR(optimizer, partial(cosine_share, warmup_steps=self.warmup_steps, steps=steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self) -> list[dict]:
        trained = [p for p in self.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.dim() >= 2]
        vectors = [p for p in trained if p.dim() < 2]
        return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def cosine_share(step: int, warmup_steps: int, steps: int) -> float:
    """Share of the peak learning rate at a step: a line up to 1, then half a cosine down to FINAL_LR_SHARE."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    done = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * (1 + math.cos(math.pi * done)) / 2
